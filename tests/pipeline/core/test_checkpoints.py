"""Which files may be checkpoints, told from how they begin."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.core.checkpoints import begins_as_safetensors, existing, require_kind
from pipeline.core.errors import CheckpointError


def test_what_torch_and_safetensors_write_may_be_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
        archive.writestr("data.pkl", b"x")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    header = json.dumps({}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for path in sorted(tmp_path.iterdir()):
        require_kind(path)
        assert existing(path) == path
    assert begins_as_safetensors((tmp_path / "a.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"just words", "name a file that torch.save or safetensors wrote"),
        (b"<!DOCTYPE html>", "no checkpoint but a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b'{"weight_map": {}}', "an index of shards"),
    ],
)
def test_what_is_none_says_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        require_kind(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        require_kind(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        require_kind(tmp_path)


def test_no_framework_is_loaded_for_it() -> None:
    program = "import sys, pipeline.core.checkpoints; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
