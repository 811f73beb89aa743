"""`clean`: what of the results can be made again, and how much room does it take?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from calibration.kept import Kept
from pipeline.core.hashes import HashCache
from pipeline.core.replacing import Whose, is_set_aside
from pipeline.report.history import entries
from pipeline.stages.shards import kept_in, remove
from pipeline.steps import keys
from pipeline.steps.artifact import whose_folder
from pipeline.steps.folders import DEEPEST, EVALUATIONS, HASHES, IMPORTS, locked, results_folders

DECODED = ("validate/samples", "calibration")
"""Artifacts that hold decoded images: most of the room, and minutes to make again."""


@dataclass(frozen=True)
class Found:
    """Something that takes room.

    Attributes:
        path: Where it lies.
        size: Bytes.
        what: What it is.
        remove: Removes it.
    """

    path: Path
    size: int
    what: str
    remove: Callable[[Path], None]


def clean(output: Path, name: str | None, *, set_aside: bool, history: bool, dry_run: bool) -> str:
    """Remove what the next run makes again, and say what that frees.

    Artifacts, results and reports stay. What is not whole, or holds somebody else's files, stays.

    Args:
        output: Where results lie.
        name: Which results; None for all.
        set_aside: Also remove folders that runs set aside: files of the user's may be in them.
        history: Also remove what earlier runs came to; the newest entry, which is that of the
            results themselves, stays.
        dry_run: Only say what would go.

    Raises:
        InputError: There are no such results.
        LockedError: A run works there.
    """
    lines, total = [], 0
    for folder in results_folders(output, name):
        with locked(folder):
            for found in _in(folder, set_aside=set_aside, history=history):
                if not dry_run:
                    found.remove(found.path)
                total += found.size
                lines.append(f"{found.size / 1e6:9.2f} MB  {found.path}  ({found.what})")
    did = "would free" if dry_run else "freed"
    return "\n".join(
        [*lines, f"{did} {total / 1e6:.2f} MB; the next run makes again what it needs"]
    )


def _in(folder: Path, *, set_aside: bool, history: bool) -> Iterator[Found]:
    for name in DECODED:
        path = folder / name
        if whose_folder(path) is Whose.OURS:
            yield Found(path, _size(path), "decoded images", _remove)
    for name, is_ours in ((HASHES, HashCache.is_cache), (IMPORTS, keys.is_cache)):
        path = folder / name
        if path.is_file() and not path.is_symlink() and is_ours(path):
            yield Found(path, path.stat().st_size, "cache", _remove)
    yield from _evaluations(folder / EVALUATIONS)
    if history:
        yield from _earlier(folder)
    if set_aside:
        for depth in range(1, DEEPEST + 1):
            for path in sorted(folder.glob("/".join("*" * depth))):
                if path.is_dir() and not path.is_symlink() and _is_aside(path, folder):
                    yield Found(path, _size(path), "set aside", _remove)


def _evaluations(folder: Path) -> Iterator[Found]:
    """What validations and searches kept that did not end."""
    for path in kept_in(folder):
        yield Found(path, _size(path), "of a validation that did not end", remove)
    for path in sorted(folder.glob("*.jsonl")):
        if path.is_file() and not path.is_symlink() and Kept.is_ours(path):
            yield Found(path, path.stat().st_size, "of a search that did not end", _remove)


def _earlier(folder: Path) -> Iterator[Found]:
    """What earlier runs came to: nothing makes that again."""
    for path in entries(folder)[:-1]:
        yield Found(path, _size(path), "history", _remove)


def _is_aside(path: Path, folder: Path) -> bool:
    """Whether a folder was set aside, and none around it: that one goes as a whole."""
    relative = path.relative_to(folder)
    return is_set_aside(relative) and not is_set_aside(relative.parent)


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
