"""Files: hashed by content, written whole or not at all, never over somebody else's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError
from pipeline.core.replacing import Whose, cannot_write, put, refuse_foreign, whose_file, workspace

if TYPE_CHECKING:
    from pipeline.core.remote import RemotePath


def file_hash(path: Path | RemotePath) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed read names no file by itself
        raise


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to read it; nothing is followed, and nothing waited for.

    Raises:
        ArtifactError: It is a link, a folder, a pipe, a socket or a device, or cannot be read.
        FileNotFoundError: Nothing is there.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path} is {what_is(path)}, where a regular file belongs")
        return os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


def what_is(path: Path) -> str:
    """What lies at a path, for messages: "a link", "a folder", "a file", "a pipe or a device"."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a pipe, a socket or a device"


def read_regular(path: Path, most: int) -> bytes:
    """Read a whole regular file; see `open_regular`.

    Args:
        path: The file.
        most: Largest size in bytes that such a file may have.

    Raises:
        ArtifactError: It is no regular file, larger, or cannot be read.
        FileNotFoundError: Nothing is there.
    """
    with open_regular(path) as stream:
        try:
            data = stream.read(most + 1)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > most:
        raise ArtifactError(f"{path} is larger than {most / 1e6:g} MB")
    return data


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
