from __future__ import annotations

import argparse
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import care  # noqa: F401  registers the models
from care import checkpoint
from pipeline.core.errors import CheckpointError


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    created: nn.Module = timm.create_model("care_tiny")
    return created


def other(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the model's shapes that it does not have yet."""
    return {
        name: value + 1 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


PUBLISHED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 299},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "module.": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "timm": lambda state: {
        "state_dict": state,
        "args": argparse.Namespace(lr=1e-3),
        "metric": np.float64(78.4),
    },
}


@pytest.mark.parametrize("shape", PUBLISHED)
@pytest.mark.parametrize("legacy", [False, True])
def test_published_layouts(shape: str, legacy: bool, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "CARETrans_S0.pth.tar"
    state = other(model)
    torch.save(PUBLISHED[shape](state), path, _use_new_zipfile_serialization=not legacy)
    checkpoint.load(path, model)
    assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_moving_average_on_request(key: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    state, average = dict(model.state_dict()), other(model)
    torch.save({"state_dict": state, key: average}, path)
    assert_same(checkpoint.read(path), state)
    assert_same(checkpoint.read(path, ema=True), average)


def test_missing_moving_average_is_an_error(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"no moving average.* it holds state_dict, epoch"):
        checkpoint.load(path, model, ema=True)


def test_format_is_told_from_content(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "misnamed.pth"
    safetensors.torch.save_file(dict(model.state_dict()), path)
    assert_same(checkpoint.read(path), dict(model.state_dict()))
    assert checkpoint.read_metadata(path) == {}


def test_complex_rotations_become_real(tmp_path: Path) -> None:
    path = tmp_path / "mlla.pth"
    angles = torch.rand(7, 7, 4)
    torch.save({"model": {"rope.rotations": torch.polar(torch.ones(7, 7, 4), angles)}}, path)
    rotations = checkpoint.read(path)["rope.rotations"]
    torch.testing.assert_close(rotations, torch.stack([angles.cos(), angles.sin()], -1))


def test_published_mlla_with_complex_rotations(tmp_path: Path) -> None:
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    model = timm.create_model("mlla_t", num_classes=3, **small)
    state = {
        name: torch.view_as_complex(value) if name.endswith("rotations") else value
        for name, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "mlla.pth")
    checkpoint.load(tmp_path / "mlla.pth", model)


def test_counters_may_be_missing(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = other(model)
    torch.save({k: v for k, v in state.items() if "num_batches_tracked" not in k}, path)
    checkpoint.load(path, model)
    assert_same(dict(model.state_dict()), state)


# What does not fit.


def test_mismatches_are_listed_and_nothing_is_loaded(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = other(model)
    del state["head.fc.weight"]
    state["stem.0.bias"] = torch.zeros(5)
    state.update({f"extra.{number}": torch.zeros(1) for number in range(13)})
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, model)
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit care_tiny: missing head.fc.weight; unexpected")
    assert "extra.9 and 3 more" in message
    assert "extra.10" not in message
    assert "misshapen stem.0.bias (is 5, should be 32)" in message
    assert "\n" not in message
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("variant", "classes"), [("care_s0", 1000), ("care_s1", 7), ("mlla_t", 10), ("care_tiny", 3)]
)
def test_other_variant_is_recognized(
    variant: str, classes: int, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(timm.create_model(variant, num_classes=classes).state_dict(), path)
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=f"checkpoint of {variant}, {classes} classes"):
        checkpoint.load(path, model)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_damaged_weights_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = other(model)
    state["stem.0.bias"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in stem\.0\.bias"):
        checkpoint.load(path, model)


# What is no checkpoint.


def zip_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(1000.0)}, buffer)
    return buffer.getvalue()


def legacy_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(1000.0)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


TENSORS = safetensors.torch.save({"w": torch.arange(1000.0)})


@pytest.mark.parametrize(
    "whole", [zip_checkpoint(), legacy_checkpoint(), TENSORS], ids=["zip", "legacy", "safetensors"]
)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.99])
def test_truncated_checkpoint(whole: bytes, share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    with pytest.raises(CheckpointError, match=r"x\.pth is no checkpoint, or truncated or corrupt"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "data",
    [
        b"<html>404</html>",
        b"\0" * 100,
        b"\x89PNG\r\n\x1a\n",
        b"12345678{not json",
        b"x",
    ],
)
def test_other_files_are_no_checkpoints(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pth is no checkpoint"):
        checkpoint.read(path)


def test_damaged_bytes_give_tensors_or_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    rng = np.random.default_rng(0)
    whole = (zip_checkpoint()[:900] + zip_checkpoint()[-900:], legacy_checkpoint()[:900])
    for number in range(200):
        data = bytearray(whole[number % 2])
        for place in rng.integers(0, len(data), 5):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


def test_missing_empty_or_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*x\.pth: check the path"):
        checkpoint.read(tmp_path / "x.pth")
    (tmp_path / "x.pth").touch()
    with pytest.raises(CheckpointError, match=r"x\.pth is empty \(0 bytes\)"):
        checkpoint.read(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a Tensor, not a state dict"),
        ({}, "no state dict \\(under state_dict, model, .*\\), but nothing"),
        ({"epoch": 3, "optimizer": {}}, "but epoch, optimizer"),
    ],
)
def test_other_content_is_no_checkpoint(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "x.pth")


class Payload:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trap}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_is_refused(form: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "x.pth.tar"
    content = {"state_dict": {"w": torch.zeros(1)}, "extra": Payload(trap)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"extra": Payload(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    assert not trap.exists()
    assert str(caught.value).startswith(f"{path} was refused: loading it asks for posix.system,")
    assert "\n" not in str(caught.value)


# Our own.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip_with_metadata(suffix: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"new/model{suffix}"
    metadata = {
        "model": "care_tiny",
        "num_classes": 10,
        "top1": 92.5,
        "labels": ["Höse"],
        "a": None,
    }
    checkpoint.save(path, other(model), metadata)
    assert checkpoint.read_metadata(path) == metadata
    assert checkpoint.read_all(path).keys() == {"state_dict", "metadata"}
    expected = other(model)
    checkpoint.load(path, model)
    assert_same(dict(model.state_dict()), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_training_checkpoint(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {
        "model": model.state_dict(),
        "model_ema": other(model),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
    }
    checkpoint.save(path, parts, {"model": "care_tiny"})
    content = checkpoint.read_all(path)
    assert content["epoch"] == 3
    assert content["optimizer"] == optimizer.state_dict()
    assert content["metadata"] == {"model": "care_tiny"}
    assert_same(checkpoint.read(path, ema=True), other(model))


def test_views_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    state = {"a": base, "b": base, "c": base.T}
    checkpoint.save(tmp_path / "x.safetensors", state)
    assert_same(checkpoint.read(tmp_path / "x.safetensors"), state)


def test_safetensors_holds_tensors_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"save a training checkpoint as \.pt"):
        checkpoint.save(tmp_path / "x.safetensors", {"model": {}, "epoch": 3})


def test_metadata_is_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not JSON"):
        checkpoint.save(tmp_path / "x.pt", {"w": torch.zeros(1)}, {"path": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"w": torch.zeros(1)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be written: .*No space left"):
        checkpoint.save(path, {"w": torch.ones(1)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="run cannot be a folder"):
        checkpoint.save(tmp_path / "run" / "x.pt", {"w": torch.ones(1)})


def test_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.embedded("care_s0") is None
    monkeypatch.setattr(checkpoint, "_ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"care_tiny\.safetensors is missing"):
        checkpoint.embedded()
    (tmp_path / "care_tiny.safetensors").touch()
    assert checkpoint.embedded() == tmp_path / "care_tiny.safetensors"
