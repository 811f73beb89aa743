"""Memory in huge pages, where Linux has them.

A CPU has the places of some 2,000 pages of 4 KB at hand. What a network works in takes more, and
each page that is not among them has to be looked up, on a virtual machine in two tables. In pages
of 2 MB all of it fits. Linux gives them to memory that asks, which runtimes for CPUs do not: so
what one has taken is moved once it has all (`MADV_COLLAPSE`, Linux 6.1). Values, addresses and
rights stay as they are.

    pages = HugePages()     # what is here already stays where it is
    session = open_model()
    pages.before_call()     # the second call begins with the move
    session.run(images)
    pages.after_call(len(images))
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Span = tuple[int, int]
"""Addresses from the first to the one behind the last."""

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")
_TOTALS = Path("/proc/self/smaps_rollup")

_MADV_COLLAPSE = 25
"""Of `include/uapi/asm-generic/mman-common.h`, since Linux 6.1."""


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Attributes:
        bytes: How much memory lies in huge pages since then that did not before.
        why: Why it is none; "" if it is some.
    """

    bytes: int
    why: str = ""


def why_not() -> str:
    """Why this system has no huge pages to give; "" if it has."""
    if not _MAPS.exists():
        return "only Linux has them"
    return "" if _SIZE.exists() else "this kernel has no transparent huge pages"


class HugePages:
    """Moves what the process takes from here on, while something is opened and called.

    Memory that was there before, such as a caller's own arrays, is left alone.

    Args:
        wanted: False leaves all memory where it is, whatever is called.

    Attributes:
        moved: What was moved so far; None before the first move.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self.moved: Moved | None = None
        self._wanted = wanted
        self._why = why_not()
        self._before = self._memory() if wanted else []
        self._taken: list[Span] = []
        self._due, self._most = False, 0

    def before_call(self) -> None:
        """Move what an earlier call took, if that was not done yet.

        So the first call is answered at once, and the second takes longer by some milliseconds for
        each 10 MB.
        """
        if self._due:
            self.relocate()

    def after_call(self, images: int) -> None:
        """A call with more images than any before took memory, which is to be moved.

        Args:
            images: How many it was given.
        """
        if self._wanted and images > self._most:
            self._most = images
            self.note()

    def note(self) -> None:
        """What has been taken by now is to be moved, and nothing that comes later."""
        self._due = True
        self._taken = list(without(self._memory(), self._before))

    def relocate(self) -> None:
        """Move what was noted. A system that does not let it leaves memory where it is."""
        self._due = False
        try:
            found = Moved(0, self._why) if self._why else _move(self._taken)
        except OSError as error:
            found = Moved(0, str(error))
        before = self.moved.bytes if self.moved else 0
        self.moved = Moved(before + found.bytes, "" if before else found.why)

    def _memory(self) -> list[Span]:
        """See `_own_memory`; what does not let itself be read is remembered as the reason."""
        if not self._why:
            try:
                return _own_memory()
            except OSError as error:
                self._why = str(error)
        return []


def _move(taken: Sequence[Span]) -> Moved:
    size = int(_SIZE.read_text())
    before = _in_huge_pages()
    errors = {error for span in whole_pages(taken, _own_memory(), size) if (error := _ask(span))}
    moved = max(0, _in_huge_pages() - before)
    if moved:
        return Moved(moved)
    if errors:
        return Moved(0, f"the kernel refuses: {os.strerror(min(errors))}")
    if before:
        return Moved(0, "all that fills them lies there already")
    return Moved(0, f"nothing fills {size >> 20} MB in one piece")


def without(spans: Sequence[Span], others: Sequence[Span]) -> Iterator[Span]:
    """The parts of spans that lie in none of the others.

    Args:
        spans: Ascending, none within another.
        others: Likewise.
    """
    for first, end in spans:
        at = first
        for low, high in others:
            if high > at and low < end:
                if low > at:
                    yield at, low
                at = max(at, high)
        if at < end:
            yield at, end


def whole_pages(wanted: Sequence[Span], mappings: Sequence[Span], size: int) -> list[Span]:
    """Places for huge pages in which something wanted lies, ascending.

    Such a place begins at a multiple of its size, and lies in one mapping as a whole.

    Args:
        wanted: What shall be moved, ascending.
        mappings: All that is mapped, ascending.
        size: Bytes of a huge page.
    """
    places = {
        place
        for first, end in mappings
        for low, high in wanted
        if low < end and high > first
        for place in range(max(low, first) // size, -(-min(high, end) // size))
        if place * size >= first and (place + 1) * size <= end
    }
    spans: list[Span] = []
    for place in sorted(places):
        if spans and spans[-1][1] == place * size:
            spans[-1] = spans[-1][0], (place + 1) * size
        else:
            spans.append((place * size, (place + 1) * size))
    return spans


def _own_memory() -> list[Span]:
    """Private memory of the process that may be written to and belongs to no file, ascending."""
    spans = []
    for line in _MAPS.read_text().splitlines():
        where, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and not (name and name[0].startswith("[stack")):
            first, end = (int(address, 16) for address in where.split("-"))
            spans.append((first, end))
    return spans


def _in_huge_pages() -> int:
    """Bytes of the process that lie in huge pages."""
    for line in _TOTALS.read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def _ask(span: Span) -> int:
    """Ask for huge pages; 0, or the number of the error."""
    system = ctypes.CDLL(None, use_errno=True)
    first, end = span
    address, length = ctypes.c_void_p(first), ctypes.c_size_t(end - first)
    return ctypes.get_errno() if system.madvise(address, length, _MADV_COLLAPSE) else 0
