from __future__ import annotations

from pathlib import Path

import pytest
import torch

from care import checkpoint
from pipeline.core.described import NOTHING, HoldOut, describe
from pipeline.core.errors import CheckpointError

WEIGHTS = {"weight": torch.zeros(2)}


def test_what_training_writes_is_read(tmp_path: Path) -> None:
    held_out = {"share": 0.05, "seed": 42, "identity": "abc"}
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, WEIGHTS, {"labels": ["a", "b"], "hold_out": held_out})
    found = describe(path)
    assert (found.labels, found.preprocess) == (("a", "b"), None)
    assert found.hold_out == HoldOut(0.05, 42, "abc")


def test_what_others_write_says_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.safetensors", WEIGHTS)
    torch.save(WEIGHTS, tmp_path / "x.pt")
    (tmp_path / "x.txt").write_text("weights")
    for name in ("x.safetensors", "x.pt", "x.txt"):
        assert describe(tmp_path / name) == NOTHING


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        describe(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        describe(tmp_path / "gone.safetensors")
