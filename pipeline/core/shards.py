"""Checkpoints in several files: an index, `model.safetensors.index.json`, says which holds what.

All files lie beside the index: it may come from anybody, and names no other place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CheckpointError
from pipeline.core.files import digest_of, file_hash
from pipeline.core.inputs import read_input, why_no_path
from pipeline.core.plain import parse_json
from pipeline.core.words import shown

_LARGEST = 50_000_000
"""Bytes of an index."""

_MOST = 1000
"""Files of a checkpoint: those that are published have some dozens."""

_KEY = "weight_map"
"""Under which an index says which file holds a tensor."""


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint.

    Attributes:
        index: The file that names them.
        digest: SHA-256 of it, in hexadecimal.
        holder: Name of the file that holds a tensor, by the tensor's name.
    """

    index: Path
    digest: str
    holder: Mapping[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files beside the index, in order."""
        return tuple(sorted(set(self.holder.values())))

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.index.parent / name

    def names(self, file: str) -> set[str]:
        """The tensors that a file holds."""
        return {name for name, holder in self.holder.items() if holder == file}

    def hash(self, files: Iterable[tuple[str, str]]) -> str:
        """SHA-256 of the whole checkpoint.

        Args:
            files: Name and SHA-256 of each file, in order.
        """
        return digest_of([self.digest, [list(each) for each in files]])


def read_shards(path: Path) -> Shards | None:
    """What an index names; None for a file that is no index.

    Raises:
        CheckpointError: It names other places than its own folder, or a file is missing there.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(64).lstrip().startswith(b"{")
        if not begins or path.stat().st_size > _LARGEST:
            return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    data = read_input(path, _LARGEST, CheckpointError, "give the checkpoint file")
    try:
        content = parse_json(data, str(path), CheckpointError, _LARGEST)
    except CheckpointError:
        return None  # whatever it is, it is no index
    if not isinstance(content, dict) or _KEY not in content:
        return None
    shards = Shards(path, hashlib.sha256(data).hexdigest(), _holders(content[_KEY], path))
    _require_files(shards)
    return shards


def weights_hash(path: Path) -> str:
    """SHA-256 of a checkpoint, in hexadecimal: of the file, or of an index and all its files.

    Raises:
        OSError: A file cannot be read.
        CheckpointError: It is an index that names what it may not, or what is not there.
    """
    shards = read_shards(path)
    if shards is None:
        return file_hash(path)
    return shards.hash((name, file_hash(shards.path(name))) for name in shards.files)


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, and what it names where it is an index.

    Raises:
        CheckpointError: It is an index that names what it may not, or what is not there.
    """
    shards = read_shards(path)
    return [path, *(shards.path(name) for name in shards.files)] if shards else [path]


def _holders(stated: object, path: Path) -> dict[str, str]:
    if not isinstance(stated, dict) or not stated:
        raise CheckpointError(
            f"{path} is an index of shards that names no tensor: download it again"
        )
    for tensor, name in stated.items():
        if not isinstance(name, str) or not _lies_beside(name):
            raise CheckpointError(
                f"{path} was refused: it says that {shown(tensor)} lies in {shown(repr(name))}, "
                "and shards lie beside their index: take a checkpoint that you trust"
            )
    if (count := len(set(stated.values()))) > _MOST:
        raise CheckpointError(f"{path} names {count} shards, and {_MOST} are the most that is read")
    return stated


def _lies_beside(name: str) -> bool:
    """Whether a name is that of a file, and no way to elsewhere."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:") and not why_no_path(name)


def _require_files(shards: Shards) -> None:
    missing = [name for name in shards.files if not shards.path(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{shards.index}: the shard {shown(missing[0])} is missing ({len(missing)} of "
            f"{len(shards.files)}): download all of them into {shards.index.parent}"
        )
