"""Files: hashed by content, written whole or not at all, never over somebody else's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError
from pipeline.core.replacing import Whose, cannot_write, put, refuse_foreign, whose_file, workspace


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed read names no file by itself
        raise


def digest_of(value: Any) -> str:
    """SHA-256 of a value that JSON can express, independent of the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_atomically(
    path: Path, content: str | bytes, is_ours: Callable[[Path], bool] = lambda path: True
) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    Args:
        path: The file.
        content: What it shall hold.
        is_ours: Whether an existing file is one that we wrote, and may be replaced. The default is
            for folders that we are making, and for names that nobody else would give to a file.

    Raises:
        ArtifactError: The file in its place is somebody else's, the folder is read-only or the disk
            is full; the old content stays.
    """
    refuse_foreign_file(path, is_ours)
    # Text may hold names of files that are not UTF-8.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        with workspace(path) as new:
            with new.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            put(new, path, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(path, error)) from error


def refuse_foreign_file(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a file that somebody else put where one of ours shall lie.

    Raises:
        ArtifactError: There is one.
    """
    refuse_foreign(path, whose_file(path, is_ours), "holds something else")
