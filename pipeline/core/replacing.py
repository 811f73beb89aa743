"""Moves what was made into its place, and never at the cost of what somebody else put there.

One rule holds for every command. What lies in the way

    carries our mark, and holds nothing else                is replaced
    carries our mark and other files, or a damaged mark     is set aside whole, and this is said
    carries no mark of ours                                 is refused, before anything is changed

The mark of a folder is its manifest (see `steps.artifact`), that of a file is its content. What is
set aside is renamed to NAME.before-YYYYMMDD-HHMMSS, beside its old place.

Everything is made in a workspace: a temporary folder beside its place, which says whose it is and
for which place, so that leftovers of a killed run are told from other people's folders.

    engines/trial/.making-export-x7y2k9q1/
      made-by-care-deploy   "export"
      new/                  what is being made
      old/                  what was in its place, while the two change places
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path

from pipeline.core.errors import ArtifactError

TEMPORARY_PREFIX = ".making-"
_MARK, _NEW, _OLD = "made-by-care-deploy", "new", "old"
_WORKSPACE = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<place>.+)-[a-z0-9_]{8}")
_SET_ASIDE = re.compile(r".+\.before-\d{8}-\d{6}(-\d+)?")
_FULL = 64 * 1024
"""With fewer free bytes than this, a disk counts as full: file systems keep some blocks back."""


class Whose(Enum):
    """Whose a path is."""

    FREE = "nothing is there, or something empty"
    OURS = "we made all of it"
    MIXED = "we made it, but it holds other files too, or its mark is damaged"
    FOREIGN = "somebody else's"


def whose_file(path: Path, is_ours: Callable[[Path], bool]) -> Whose:
    """Whose a file is.

    Args:
        path: The file. A link or a folder in its place is not ours: we write neither.
        is_ours: Whether its content is of the kind that we write.

    Raises:
        ArtifactError: It cannot be read, so that nobody knows whose it is.
    """
    if not os.path.lexists(path):
        return Whose.FREE
    if path.is_symlink() or not path.is_file():
        return Whose.FOREIGN
    try:
        if path.stat().st_size == 0:
            return Whose.FREE
        return Whose.OURS if is_ours(path) else Whose.FOREIGN
    except OSError as error:
        raise ArtifactError(cannot_read(path, error)) from error


def refuse_foreign(path: Path, whose: Whose, sign: str) -> None:
    """Refuse what somebody else put in our way.

    Args:
        path: Where something of ours shall lie.
        whose: Whose that path is now.
        sign: What shows that it is not ours, such as "holds no artifact.json".

    Raises:
        ArtifactError: It is somebody else's.
    """
    if whose is Whose.FOREIGN:
        raise ArtifactError(
            f"{path} is in the way and was not made by this program (it {sign}): move it away, or "
            "choose another name or output folder"
        )


def foreign_paths(folder: Path, files: Mapping[str, object]) -> list[Path]:
    """Everything under a folder that is neither one of the files nor a folder of theirs.

    Args:
        folder: The folder; links are not followed.
        files: The files that belong there, by relative POSIX path.
    """
    parents = {parent.as_posix() for name in files for parent in Path(name).parents}
    found = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            is_plain_folder = name in folders and not path.is_symlink()
            known = parents if is_plain_folder else files
            if relative not in known or path.is_symlink():
                found.append(path)
    return sorted(found)


@contextlib.contextmanager
def workspace(place: Path) -> Iterator[Path]:
    """Make a temporary folder beside a place, and remove it in the end.

    If what was in the place had been moved out of it and nothing else came in, it moves back.

    Args:
        place: Where something shall lie. Its parent is made if it is missing.

    Yields:
        Path of what is to be made, not there yet, to be moved into the place by `put`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY_PREFIX}{place.name}-"
    work = Path(tempfile.mkdtemp(dir=place.parent, prefix=prefix))
    try:
        (work / _MARK).write_bytes(os.fsencode(place.name))
        yield work / _NEW
    finally:
        _clear(work, place)


def put(new: Path, place: Path, whose: Whose) -> Path | None:
    """Move what a workspace holds into its place.

    A file is replaced in one step. A folder changes places with the old one in two: after a kill
    between them `sweep` puts the old one back.

    Args:
        new: What `workspace` yielded, made by now.
        place: Where it shall lie.
        whose: Whose that path is now; not somebody else's.

    Returns:
        Where the old one was set aside; None if there was none or it was all ours.
    """
    assert whose is not Whose.FOREIGN
    aside = set_aside(place) if whose is Whose.MIXED else None
    if new.is_dir() and whose is Whose.OURS:
        place.rename(new.with_name(_OLD))
        new.rename(place)
    else:
        new.replace(place)
    return aside


def set_aside(path: Path) -> Path:
    """Rename a path to NAME.before-YYYYMMDD-HHMMSS; returns its new path."""
    wanted = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside, number = wanted, 1
    while os.path.lexists(aside):
        number += 1
        aside = wanted.with_name(f"{wanted.name}-{number}")
    return path.rename(aside)


def is_set_aside(path: Path) -> bool:
    """Whether the path, or a folder that it is in, was set aside."""
    return any(_SET_ASIDE.fullmatch(part) for part in path.parts)


def is_temporary(path: Path) -> bool:
    """Whether the path is in a workspace."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in path.parts)


def sweep(root: Path) -> None:
    """Clear the workspaces of killed runs in a folder and in the folders in it.

    Only what carries a workspace's mark is touched. Call it only under the folder's lock.
    """
    pattern = f"{TEMPORARY_PREFIX}*"
    for work in [*root.glob(pattern), *root.glob(f"*/{pattern}")]:
        name = _place_name(work)
        if name is not None:
            _clear(work, work.with_name(name))


def _place_name(work: Path) -> str | None:
    """Name of the place that a workspace is for; None if it is no workspace of ours."""
    match = _WORKSPACE.fullmatch(work.name)
    if match is None or work.is_symlink() or not work.is_dir():
        return None
    name = match["place"]
    held = {path.name for path in work.iterdir()}
    if not held:
        return name  # killed before it could be marked
    mark = work / _MARK
    if not held <= {_MARK, _NEW, _OLD} or mark.is_symlink() or not mark.is_file():
        return None
    # A kill, or a full disk, may have cut the mark short.
    return name if os.fsencode(name).startswith(mark.read_bytes()) else None


def _clear(work: Path, place: Path) -> None:
    old = work / _OLD
    if old.exists() and not os.path.lexists(place):
        old.rename(place)
    shutil.rmtree(work, ignore_errors=True)


def cannot_read(path: Path | str, error: OSError) -> str:
    """What to tell the user after a failed read."""
    return (
        f"cannot read {path}: {error.strerror or error}; make it readable, or check the disk that "
        "it lies on"
    )


_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space",
    errno.EFBIG: "allow larger files (ulimit -f)",
}


def cannot_write(path: Path | str, error: OSError) -> str:
    """What to tell the user after something could not be written, or read for it.

    Args:
        path: What should be written.
        error: What the system said; if it names another file, that one could not be read.
    """
    stated = error.filename
    if isinstance(stated, str | bytes) and not _is_written(Path(os.fsdecode(stated)), Path(path)):
        return cannot_read(os.fsdecode(stated), error)
    remedy = _REMEDIES.get(error.errno or 0, "make the folder writable")
    return (
        f"cannot write {path}: {error.strerror or error}; {remedy}, or choose another output folder"
    )


def _is_written(stated: Path, place: Path) -> bool:
    """Whether a path is written when something is put in a place: it, parts of it, or around it."""
    return (
        is_temporary(stated)
        or stated.is_relative_to(place)
        or place.is_relative_to(stated)
        or (stated.parent == place.parent and is_set_aside(stated))
    )


def disk_is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no room left."""
    return shutil.disk_usage(folder).free < _FULL
