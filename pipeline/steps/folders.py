"""A results' folder: its lock, and the files that belong to no step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from pipeline.core.errors import (
    ArtifactError,
    InputError,
    LockedError,
)
from pipeline.core.files import refuse_foreign_file
from pipeline.core.replacing import cannot_write, is_set_aside, is_temporary, sweep
from pipeline.steps.artifact import MANIFEST

LOCK_FILE = ".lock"
HASHES = ".hashes.sqlite"
IMPORTS = ".imports.json"
LOG_FILE = "run.log"
RESULTS_FILE = "results.json"
EVALUATIONS = ".evaluations"
"""What searches and validations that did not end have evaluated."""

UNREPORTED = ".unreported.json"
"""Seals of what was made since results.json was written."""

ANNOUNCING = ".announcing.lock"
"""Held while `UNREPORTED` is written: several processes of a run may do so."""

DEEPEST = 3
"""Folders below the results' one in which artifacts are looked for: it may hold a whole disk."""


@contextmanager
def locked(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock of a results' folder, and clean up after killed runs.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: The results' folder; it is made if it is missing.
        wait_s: How long to wait for another run.

    Raises:
        LockedError: Another run holds it.
        ArtifactError: The folder cannot be written, or its lock is somebody else's file.
    """
    refuse_foreign_lock(folder)
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=wait_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise LockedError(
            f"another run works on {folder}: wait for it, or give --wait SECONDS"
        ) from error
    except OSError as error:
        raise ArtifactError(cannot_write(folder / LOCK_FILE, error)) from error
    # What goes wrong from here on is no matter of the lock, and says so itself.
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def refuse_foreign_lock(folder: Path) -> None:
    """Refuse a lock file that somebody else wrote."""
    for name in (LOCK_FILE, ANNOUNCING):
        refuse_foreign_file(folder / name, lambda path: False)  # ours is always empty


def results_folders(output: Path, name: str | None = None) -> list[Path]:
    """Folders of results under `output`, or the one called `name`.

    Raises:
        InputError: There is none.
    """
    if name is not None:
        folder = output / name
        if not folder.is_dir():
            known = ", ".join(path.name for path in _folders(output))
            raise InputError(
                f"{folder} does not exist: "
                + (f"there are {known}" if known else "run python -m pipeline run first")
            )
        return [folder]
    found = _folders(output)
    if not found:
        raise InputError(f"{output} holds no results: run python -m pipeline run first")
    return found


def _folders(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    return [path for path in sorted(output.iterdir()) if any(path.glob(f"*/{MANIFEST}"))]


def artifact_folders(
    root: Path, below: str = "", depth: int = DEEPEST
) -> Iterator[tuple[str, Path]]:
    """Folders with a manifest in a results' folder, by name; links to such ones as well.

    No link is followed. What is still being made, or was set aside, is passed over, and so are
    parts of what did not end.
    """
    try:
        entries = sorted(os.scandir(root / below), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name, path = f"{below}{entry.name}", Path(entry.path)
        is_place = entry.is_symlink() or entry.is_dir()
        if not is_place or name == EVALUATIONS:
            continue
        if is_temporary(Path(name)) or is_set_aside(Path(name)):
            continue
        if os.path.lexists(path / MANIFEST):
            yield name, path
        if depth > 1 and not entry.is_symlink():
            yield from artifact_folders(root, f"{name}/", depth - 1)
