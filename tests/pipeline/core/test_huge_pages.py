"""Memory in huge pages: which places are moved, and that values stay what they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import huge_pages
from pipeline.core.huge_pages import HugePages, Moved, whole_pages, why_not, without

MB = 1 << 20
LARGE = 32 * MB


def test_what_was_there_before_is_left_out() -> None:
    assert list(without([(0, 10), (20, 30)], [])) == [(0, 10), (20, 30)]
    assert list(without([(0, 10), (20, 30)], [(0, 10), (20, 30)])) == []
    assert list(without([(0, 40)], [(10, 20), (25, 30)])) == [(0, 10), (20, 25), (30, 40)]
    assert list(without([(5, 15), (30, 50)], [(0, 10), (40, 60)])) == [(10, 15), (30, 40)]
    assert list(without([(5, 15)], [(0, 5), (15, 20)])) == [(5, 15)]


def test_places_begin_at_multiples_and_lie_in_one_mapping() -> None:
    # Places of 10: 10 to 20 and 20 to 30 lie in the first mapping as a whole, 0 to 10 does not.
    mappings = [(5, 32), (50, 58), (60, 80)]
    assert whole_pages([(5, 32)], mappings, 10) == [(10, 30)]
    assert whole_pages([(25, 26)], mappings, 10) == [(20, 30)]
    assert whole_pages([(19, 21)], mappings, 10) == [(10, 30)]
    assert whole_pages([(50, 58)], mappings, 10) == []
    assert whole_pages([(5, 15), (60, 61)], mappings, 10) == [(10, 20), (60, 70)]
    assert whole_pages([(40, 45)], mappings, 10) == []


def taken() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Memory of its own, written to."""
    made = np.frombuffer(mmap.mmap(-1, LARGE, flags=mmap.MAP_PRIVATE), np.uint8)
    made[:] = np.arange(LARGE, dtype=np.uint64) % 251
    return made


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_new_memory_is_moved_and_keeps_its_values() -> None:
    before = taken()
    pages = HugePages()
    pages.before_call()
    made = taken()
    address = made.ctypes.data
    pages.after_call(images=1)
    at_first = pages.moved
    pages.before_call()
    assert at_first is None  # the first call is answered at once
    assert pages.moved is not None
    if pages.moved.why:
        pytest.skip(f"the system has none left: {pages.moved.why}")
    # What was there before would make it twice as much; a neighbour may share the last place.
    assert before.size == LARGE
    assert MB <= pages.moved.bytes <= LARGE + 16 * MB
    assert huge(address) > 0
    assert made.ctypes.data == address
    assert (made == np.arange(LARGE, dtype=np.uint64) % 251).all()


def huge(address: int) -> int:
    """Kilobytes in huge pages of the mapping with an address in its middle."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address + LARGE // 2 < high
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many megabytes are noted at each move; nothing is moved."""
    found: list[int] = []

    def move(spans: list[huge_pages.Span]) -> Moved:
        found.append(sum(end - first for first, end in spans) // MB)
        return Moved(2 * MB)

    monkeypatch.setattr(huge_pages, "why_not", lambda: "")
    monkeypatch.setattr(huge_pages, "_move", move)
    return found


def test_a_larger_batch_is_moved_again(moves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [(0, MB)]
    monkeypatch.setattr(huge_pages, "_own_memory", lambda: memory[:])
    pages = HugePages()
    for images, grown in ((1, 3), (1, 9), (4, 12), (2, 15), (4, 20), (4, 20)):
        pages.before_call()
        memory[:] = [(0, grown * MB)]
        pages.after_call(images)
    # What the first call took, and what all did until the first of four images had been given.
    assert moves == [2, 11]
    assert pages.moved == Moved(4 * MB)


def test_a_system_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE", tmp_path / "missing")
    monkeypatch.setattr(huge_pages, "_MAPS", Path(__file__))
    assert why_not() == "this kernel has no transparent huge pages"
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "missing")
    assert why_not() == "only Linux has them"
    pages = HugePages()
    pages.before_call()
    pages.after_call(1)
    pages.before_call()
    assert pages.moved == Moved(0, "only Linux has them")


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_what_the_kernel_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = HugePages()
    made = taken()
    pages.note()
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", 12345)  # no such advice
    pages.relocate()
    assert pages.moved == Moved(0, "the kernel refuses: Invalid argument")
    assert made.size == LARGE


MAPS = """\
00400000-00600000 r-xp 00000000 08:01 1234 /usr/bin/python
00600000-00700000 rw-p 00000000 08:01 1234 /usr/bin/python
01000000-01200000 rw-p 00000000 00:00 0 [heap]
10000000-10800000 rw-p 00000000 00:00 0
20000000-20800000 rw-s 00000000 00:01 99 /dev/shm/shared
30000000-30200000 ---p 00000000 00:00 0
7ff000000000-7ff000021000 rw-p 00000000 00:00 0 [stack]
"""


def test_only_what_is_written_to_and_belongs_to_no_file_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maps").write_text(MAPS)
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    assert huge_pages._own_memory() == [(0x01000000, 0x01200000), (0x10000000, 0x10800000)]


def test_what_lies_in_huge_pages_is_read_from_the_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = tmp_path / "smaps_rollup"
    monkeypatch.setattr(huge_pages, "_TOTALS", totals)
    totals.write_text("Rss: 9 kB\nAnonHugePages:      4096 kB\nShmemPmdMapped: 2048 kB\n")
    assert huge_pages._in_huge_pages() == 4 * MB
    totals.write_text("Rss: 9 kB\n")
    assert huge_pages._in_huge_pages() == 0


def test_memory_that_is_not_to_be_moved_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> list[huge_pages.Span]:
        pytest.fail("it was looked at")

    monkeypatch.setattr(huge_pages, "_own_memory", look)
    pages = HugePages(wanted=False)
    pages.before_call()
    pages.after_call(images=1)
    pages.before_call()
    assert pages.moved is None


@pytest.mark.parametrize(
    ("inside", "why"),
    [(0, "nothing fills 2 MB in one piece"), (2 * MB, "all that fills them lies there already")],
)
def test_what_needs_no_move_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: int, why: str
) -> None:
    (tmp_path / "size").write_text(f"{2 * MB}\n")
    monkeypatch.setattr(huge_pages, "_SIZE", tmp_path / "size")
    monkeypatch.setattr(huge_pages, "why_not", lambda: "")
    monkeypatch.setattr(huge_pages, "_own_memory", list)
    monkeypatch.setattr(huge_pages, "_in_huge_pages", lambda: inside)
    pages = HugePages()
    pages.relocate()
    assert pages.moved == Moved(0, why)


def refuse() -> list[huge_pages.Span]:
    raise PermissionError("not for you")


@pytest.mark.parametrize("what", ["_own_memory", "_in_huge_pages"])
def test_a_system_that_hides_its_memory_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "size").write_text(f"{2 * MB}\n")
    monkeypatch.setattr(huge_pages, "_SIZE", tmp_path / "size")
    monkeypatch.setattr(huge_pages, "why_not", lambda: "")
    monkeypatch.setattr(huge_pages, "_own_memory", list)
    monkeypatch.setattr(huge_pages, what, refuse)
    pages = HugePages()
    pages.after_call(1)
    pages.before_call()
    assert pages.moved == Moved(0, "not for you")
