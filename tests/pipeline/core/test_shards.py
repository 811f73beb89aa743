from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CheckpointError
from pipeline.core.shards import read_shards, weight_files, weights_hash

MAP = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}


def write(folder: Path, content: Any = None) -> Path:
    """An index, and the files that it should name."""
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (folder / name).write_bytes(name.encode())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": MAP} if content is None else content))
    return index


def test_an_index_names_its_files(tmp_path: Path) -> None:
    found = read_shards(write(tmp_path))
    assert found is not None
    assert found.files == ("m-1.safetensors", "m-2.safetensors")
    assert found.names("m-1.safetensors") == {"a", "c"}
    assert found.path("m-2.safetensors") == tmp_path / "m-2.safetensors"


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    index = write(tmp_path)
    assert [path.name for path in weight_files(index)] == [
        "model.safetensors.index.json",
        "m-1.safetensors",
        "m-2.safetensors",
    ]
    assert weight_files(tmp_path / "m-1.safetensors") == [tmp_path / "m-1.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"PK", b'{"a": 1, "a": 2}'])
def test_other_files_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read_shards(tmp_path / "x") is None
    assert weights_hash(tmp_path / "x") == hashlib.sha256(content).hexdigest()


ELSEWHERE = (
    *("../m-1.safetensors", "/etc/passwd", "sub/m-1.safetensors", "..", ".", "", "a\\b", "c:x"),
    *("m\0", "x" * 300, None, 1, ["m-1.safetensors"]),
)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_file_lies_elsewhere(name: object, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m-1.safetensors").write_bytes(b"x")
    index = write(tmp_path / "sub", {"weight_map": {**MAP, "b": name}})
    (tmp_path / "m-1.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"was refused: it says that b lies in .* beside"):
        read_shards(index)


@pytest.mark.parametrize("stated", [{}, [], "x", None])
def test_an_index_without_tensors_is_refused(stated: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no tensor"):
        read_shards(write(tmp_path, {"weight_map": stated}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    index = write(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the shard m-2\.safetensors is missing \(1 of 2\)"):
        read_shards(index)
    (tmp_path / "m-2.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is missing"):
        weights_hash(index)


def test_thousands_of_files_are_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {"weight_map": {str(i): str(i) for i in range(1001)}})
    with pytest.raises(CheckpointError, match="1001 shards"):
        read_shards(index)


def test_the_hash_is_of_the_index_and_of_every_file(tmp_path: Path) -> None:
    index = write(tmp_path)
    known = {weights_hash(index)}
    (tmp_path / "m-2.safetensors").write_bytes(b"other")
    known.add(weights_hash(index))
    (tmp_path / "m-1.safetensors").write_bytes(b"other")
    known.add(weights_hash(index))
    index.write_text(index.read_text() + " ")
    known.add(weights_hash(index))
    assert len(known) == 4
    (tmp_path / "unnamed.safetensors").write_bytes(b"other")
    assert weights_hash(index) in known
