"""Files: hashed by content, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError

TEMPORARY_PREFIX = ".making-"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a value that JSON can express, independent of the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    Raises:
        ArtifactError: The folder is read-only or the disk is full; the old content stays.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=TEMPORARY_PREFIX, delete=False
        ) as stream:
            temporary = Path(stream.name)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ArtifactError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: OSError) -> str:
    """Say that a file or folder cannot be written, and what to do."""
    return (
        f"cannot write {path}: {error.strerror or error}; make the folder writable, free disk "
        "space, or choose another output folder"
    )
