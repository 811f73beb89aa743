"""Which files may be checkpoints, and what they say of themselves: no framework is loaded for that.

Both are told from how a file begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.core.inputs import read_at_most, why_no_path
from pipeline.core.plain import parse_json
from pipeline.core.shards import read_shards
from pipeline.core.words import shown

HUB = "hub:"
"""Before the name of a repository of the Hub, where a checkpoint's file may stand, too."""

HUB_NAMED = r"^\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?$"
"""What a repository of the Hub is called: organization, name and, after an @, a revision."""

# What is taken for a checkpoint, by how such files begin, and what to do about it.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS to the file: fetch the file itself with git lfs pull",
    ),
    (b"<!doctype", "a web page: download the file itself"),
    (b"<html", "a web page: download the file itself"),
    (b"\x89hdf\r\n", "a HDF5 file, as Keras writes them: save the state dict with PyTorch"),
    (b"gguf", "a GGUF file: take the checkpoint in PyTorch's format or safetensors"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"\xfd7zxz", "compressed by xz: unpack it"),
    (b"bzh", "compressed by bzip2: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
)
_BEGINNINGS = (b"PK\x03\x04", b"\x80")
"""How what torch.save writes begins: a ZIP archive, or a pickle in the older format."""
_LENGTH = 8
"""Bytes that state the length of a safetensors header."""
_LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as the library itself has it."""
_LARGEST_METADATA = 10_000_000
METADATA_KEY = "metadata"
"""Under which a checkpoint of ours keeps what it says of itself."""


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that may be a checkpoint, as far as its first bytes tell.

    Raises:
        CheckpointError: It is missing, empty, no file, or of a kind that is not read.
    """
    path = Path(path)
    if problem := why_no_path(str(path)):
        raise CheckpointError(f"the checkpoint's path {shown(path)} {problem}")
    try:
        start = _beginning(path)
        what = _other_kind(start)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
    if what:
        raise CheckpointError(f"{path} is no checkpoint but {what}")
    return path


def _beginning(path: Path) -> bytes:
    """The first bytes of a file, which has to be one, and not an empty one."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint file in it")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe: give the checkpoint file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): copy or download it again")
    with path.open("rb") as file:
        return file.read(64)


def _other_kind(start: bytes) -> str | None:
    """What a file is that people take for a checkpoint; None if it may be one."""
    if begins_as_safetensors(start):
        return None  # its length may look like anything
    beginning = start.lstrip().lower()
    for signature, what in _OTHERS:
        if beginning.startswith(signature):
            return what
    return None


def begins_as_safetensors(start: bytes) -> bool:
    """A safetensors file starts with the length of its JSON header, then the header."""
    return start[_LENGTH : _LENGTH + 1] == b"{"


def require_kind(path: Path) -> None:
    """Refuse a file of which the first bytes already tell that it is no checkpoint.

    Raises:
        CheckpointError: It is none.
    """
    start = _beginning(existing(path))
    known = begins_as_safetensors(start) or start.startswith(_BEGINNINGS)
    if not known and read_shards(path) is None:
        raise CheckpointError(
            f"{path} is no checkpoint: name a file that torch.save or safetensors wrote"
        )


def stated_metadata(path: Path) -> dict[str, Any] | None:
    """What a safetensors file says of itself; None for a file of another format.

    Raises:
        CheckpointError: It cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH)
            if not begins_as_safetensors(start + file.read(1)):
                return None
            file.seek(0)
            length = int.from_bytes(start, "little")
            begin = read_at_most(file, _LENGTH + min(length, _LARGEST_HEADER))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return metadata_of(header_of(begin, path), path)


def header_of(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON with which a safetensors file begins, after the length of it.

    Args:
        data: The file, or its beginning up to there.
        path: Where it lies, for messages.

    Raises:
        CheckpointError: There is none.
    """
    length = int.from_bytes(data[:_LENGTH], "little")
    if length > min(len(data) - _LENGTH, _LARGEST_HEADER):
        raise unreadable(path, f"its header would have {length} bytes")
    return _json_mapping(data[_LENGTH : _LENGTH + length], _LARGEST_HEADER, "its header", path)


def metadata_of(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint of ours says of itself; other programs may state more: it is not read.

    Args:
        header: See `header_of`.
        path: Where it lies, for messages.

    Raises:
        CheckpointError: It is no mapping.
    """
    stated = header.get("__metadata__") or {}
    if not isinstance(stated, dict) or not all(isinstance(v, str) for v in stated.values()):
        raise unreadable(path, "its metadata is no text by name")
    text = stated.get(METADATA_KEY, "{}").encode("utf-8", "surrogatepass")
    return _json_mapping(text, _LARGEST_METADATA, "its metadata", path)


def unreadable(path: Path, reason: str) -> CheckpointError:
    """The error for a file that is no checkpoint, or no longer."""
    return CheckpointError(
        f"{path} is no checkpoint, or truncated or corrupt ({reason[:120]}): copy or download it "
        "again"
    )


def _json_mapping(data: bytes, most: int, what: str, path: Path) -> dict[str, Any]:
    try:
        content = parse_json(data, what, CheckpointError, most)
    except CheckpointError as error:
        raise unreadable(path, str(error)) from error
    if not isinstance(content, dict):
        raise unreadable(path, f"{what} is no mapping")
    return content
