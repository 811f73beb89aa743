from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import care.networks  # noqa: F401  registers the models
from care import checkpoint
from pipeline.core import inputs
from pipeline.core.errors import CheckpointError
from pipeline.core.shards import weights_hash
from tests.care.small import STRUCTURE


@pytest.fixture
def model() -> nn.Module:
    """Two blocks: what is tested here is the same for each of their tensors."""
    torch.manual_seed(0)
    created: nn.Module = timm.create_model("care_tiny", **STRUCTURE)
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
    "model_state_dict": lambda state: {"epoch": 1, "model_state_dict": state, "loss": 0.1},
    "net": lambda state: {"net": state, "acc": 92.1},
    "params": lambda state: {"params": state},
    "DeepSpeed": lambda state: {"module": state, "global_steps": 7},
    "nested": lambda state: {"model": {"state_dict": state}},
    "Lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
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


def test_a_moving_average_may_be_wrapped(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    average = other(model)
    torch.save({"model": model.state_dict(), "ema": {"module": average, "decay": 0.99}}, path)
    assert_same(checkpoint.read(path, ema=True), average)
    counted = {f"module.{name}": value for name, value in average.items()}
    torch.save({"model_ema": {**counted, "n_averaged": torch.tensor(3)}}, path)
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


@pytest.mark.parametrize("record", ["data/0", "data.pkl"])
def test_a_flipped_bit_is_found_by_the_checksum(
    record: str, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(other(model), path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        found = next(r for r in archive.infolist() if r.filename.endswith(f"/{record}"))
        content = archive.read(found)
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for read in (checkpoint.read_metadata, lambda path: checkpoint.load(path, model)):
        with pytest.raises(CheckpointError, match=f"its record .*/{record} differs from its CRC"):
            read(path)
    assert_same(dict(model.state_dict()), before)


def test_variances_below_zero_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = other(model)
    name = next(name for name in state if name.endswith("running_var"))
    torch.save({**state, name: state[name].clone().zero_()}, path)
    checkpoint.load(path, model)
    state[name][3] = -1e-6
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"variances below zero in {re.escape(name)}: "):
        checkpoint.load(path, model)


@pytest.mark.parametrize("form", ["x.pt", "x.safetensors"])
def test_only_a_file_of_the_hash_that_is_asked_for_is_loaded(
    form: str, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / form
    checkpoint.save(path, other(model))
    stated = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint.load(path, model, sha256=stated)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save(path, {name: value * 2 for name, value in other(model).items()})
    with pytest.raises(CheckpointError, match=f"{form} has changed since this run began"):
        checkpoint.load(path, model, sha256=stated)
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("form", ["x.pt", "x.safetensors"])
def test_a_file_is_opened_once_for_its_content(
    form: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swaps it after that changes nothing."""
    path = tmp_path / form
    checkpoint.save(path, other(model))
    stated = hashlib.sha256(path.read_bytes()).hexdigest()

    def then_swap(path: Path, *rest: Any) -> bytes:
        data = inputs.read_input(path, *rest)
        path.write_bytes(b"swapped")
        return data

    monkeypatch.setattr(checkpoint, "read_input", then_swap)
    checkpoint.load(path, model, sha256=stated)
    assert_same(dict(model.state_dict()), other(timm_tiny()))


def timm_tiny() -> nn.Module:
    torch.manual_seed(0)
    created: nn.Module = timm.create_model("care_tiny", **STRUCTURE)
    return created


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":' * 200 + b"1" + b"}" * 200, "its header is nested deeper than 64 levels"),
        (b'{"__metadata__":{"metadata":5}}', "its metadata is no text by name"),
        (b'{"__metadata__":[]} ', None),
        (b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}', "names '__metadata__' twice"),
        (b'{"__metadata__":{"metadata":"[1]"}}', "its metadata is no mapping"),
        (b'{"__metadata__":{"metadata":"{\\"a\\":1,\\"a\\":2}"}}', "its metadata names 'a' twice"),
        (
            json.dumps({"__metadata__": {"metadata": "[" * 100 + "]" * 100}}).encode(),
            "its metadata is nested deeper than 64 levels",
        ),
    ],
)
def test_headers_of_anybody_are_limited(header: bytes, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    if message is None:
        assert checkpoint.read_metadata(path) == {}
        return
    for read in (checkpoint.read_metadata, checkpoint.read_all):
        with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
            read(path)
        assert len(str(caught.value)) < len(str(path)) + 300


def test_a_header_longer_than_the_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="its header would have 4611686018427387904 bytes"):
        checkpoint.read_metadata(path)


def test_a_file_that_the_system_does_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"w": torch.zeros(1)})

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    for name in ("is_dir", "open"):
        with monkeypatch.context() as changed:
            changed.setattr(Path, name, refuse)
            with pytest.raises(CheckpointError, match=r"x\.pt cannot be opened: Permission denied"):
                checkpoint.read(path)


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda w: w.to_sparse(), "is a sparse tensor: save it dense"),
    "sparse rows": (lambda w: w.to_sparse_csr(), "is a sparse tensor"),
    "quantized": (
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "is a quantized tensor: save the float weights",
    ),
    "meta": (lambda w: w.to("meta"), "is a tensor without values"),
    # What newer versions of PyTorch save of it is refused before it is a tensor.
    "nested": (
        lambda w: torch.nested.nested_tensor(list(w)),
        "is a nested tensor: save it padded|was refused: .*rebuild_nested",
    ),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "is of type float8_e4m3fn: save it as float32"),
    "whole": (lambda w: w.to(torch.int8), r"of another type head\.fc\.weight \(is int8, should be"),
    "beyond": (lambda w: torch.full_like(w, 1e300, dtype=torch.float64), "holds NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's remarks on its own prototypes
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_no_network_takes_are_named(
    kind: str, model: nn.Module, tmp_path: Path
) -> None:
    make, message = ODD[kind]
    path = tmp_path / "x.pth"
    torch.save({**other(model), "head.fc.weight": make(other(model)["head.fc.weight"])}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path, model)
    assert "head.fc.weight" in str(caught.value) or kind == "nested"
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_conjugated_and_half_complex_values_are_read(tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j, 3 - 1j])
    torch.save({"a": value.conj(), "b": value.to(torch.complex32)}, tmp_path / "x.pth")
    state = checkpoint.read(tmp_path / "x.pth")
    torch.testing.assert_close(state["a"], torch.tensor([[1.0, -2.0], [3.0, 1.0]]))
    torch.testing.assert_close(state["b"], torch.tensor([[1.0, 2.0], [3.0, -1.0]]))


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "a\nb", "\0", "\ud800", "\u202e", "x" * 300, "x" * 10**6]
)
def test_names_out_of_a_file_are_escaped_and_shortened(
    name: str, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    for content in ({**other(model), name: torch.zeros(1)}, {name: {}, "epoch": 3}):
        torch.save(content, path)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path, model)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


def test_the_same_name_with_and_without_a_wrapper_is_refused(
    model: nn.Module, tmp_path: Path
) -> None:
    state = other(model)
    wrapped = {f"module.{name}": value + 1 for name, value in state.items()}
    torch.save({**state, **wrapped}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth holds .* twice"):
        checkpoint.load(tmp_path / "x.pth", model)


def test_a_shape_without_end_makes_nothing_large(model: nn.Module, tmp_path: Path) -> None:
    # The variant of such a checkpoint would have 10^9 classes: it is not made to compare.
    first = torch.zeros(1).expand(10**9, 384)
    content = {"head.fc.weight": first, "stem.0.weight": torch.zeros(1, 3, 3, 3)}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not fit care_tiny"):
        checkpoint.load(tmp_path / "x.pth", model)


# What is no checkpoint.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "a HDF5 file"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (b"BZh91AY", "compressed by bzip2"),
    ],
)
def test_what_people_take_for_a_checkpoint_is_named(
    data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    for read in (checkpoint.read, checkpoint.read_metadata, checkpoint.read_all):
        with pytest.raises(CheckpointError, match=rf"x\.pth is no checkpoint but {message}"):
            read(tmp_path / "x.pth")


def test_the_length_of_a_header_is_taken_for_nothing_else(tmp_path: Path) -> None:
    # 0x8b1f bytes of header: the file begins as one that gzip compressed.
    path = tmp_path / "x.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", 0x8B1F) + header.ljust(0x8B1F) + bytes(4))
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert_same(checkpoint.read(path), {"w": torch.zeros(1)})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"is no checkpoint but a TorchScript program"):
        checkpoint.read(tmp_path / "x.pt")


@pytest.mark.parametrize("metadata", ['{"a":' * 5000, "[" * 5000, "9" * 5000, "[5]", "5", "null"])
def test_metadata_of_anybody_is_refused_in_one_line(metadata: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}, {"metadata": metadata}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no checkpoint") as caught:
        checkpoint.read_metadata(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [5, 500])
def test_nested_content_is_refused(levels: int, tmp_path: Path) -> None:
    content: Any = {"w": torch.zeros(1)}
    for _ in range(levels):
        content = {"model": content}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # for PyTorch, which writes what it cannot read
    torch.save(content, tmp_path / "x.pth")
    sys.setrecursionlimit(limit)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        checkpoint.read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", "is a device or a pipe"),
        ("/dev/zero", "is a device or a pipe"),
        ("loop", "no checkpoint at"),
        ("x" * 300, "has a name of 300 bytes"),
        ("a\0b", "is no path"),
    ],
)
def test_paths_that_are_no_file(name: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / name)


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


# Several files with an index.


def sharded(folder: Path, state: dict[str, Tensor], count: int = 3) -> Path:
    """Weights in several files, as transformers and the Hub have them."""
    holder = {name: f"model-{i % count}.safetensors" for i, name in enumerate(state)}
    for number in range(count):
        part = {n: v for n, v in state.items() if holder[n] == f"model-{number}.safetensors"}
        safetensors.torch.save_file(part, folder / f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": holder}))
    return index


def test_shards_are_read_by_their_index(model: nn.Module, tmp_path: Path) -> None:
    state = other(model)
    index = sharded(tmp_path, state)
    checkpoint.load(index, model)
    assert_same(model.state_dict(), state)
    assert checkpoint.read_metadata(index) == {}
    known = weights_hash(index)
    assert_same(checkpoint.read(index, sha256=known), state)
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model-9.safetensors")
    assert_same(checkpoint.read(index, sha256=known), state)  # what is not named is not read


def test_a_shard_that_changed_is_not_loaded(model: nn.Module, tmp_path: Path) -> None:
    index = sharded(tmp_path, model.state_dict())
    known = weights_hash(index)
    sharded(tmp_path, other(model))
    with pytest.raises(CheckpointError, match=r"index\.json has changed since this run began"):
        checkpoint.read(index, sha256=known)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({}, r"model-0\.safetensors holds other tensors .*index\.json says: missing a: download"),
        ({"a": 0, "b": 0}, "unexpected b: download both again"),
        ({"c": 0}, "missing a; unexpected c"),
    ],
)
def test_a_shard_that_holds_other_tensors_is_named(
    part: dict[str, int], words: str, tmp_path: Path
) -> None:
    index = sharded(tmp_path, {"a": torch.ones(1), "b": torch.ones(2)}, count=2)
    tensors = {name: torch.ones(1) for name in part} or {"z": torch.ones(1)}
    if not part:
        words = words.replace("missing a", "missing a; unexpected z")
    safetensors.torch.save_file(tensors, tmp_path / "model-0.safetensors")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(index)


def test_a_shard_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"a": torch.ones(1), "b": torch.ones(2)}, count=2)
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is no checkpoint"):
        checkpoint.read(index)
    shard.write_bytes(index.read_bytes())  # an index of itself
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is no checkpoint"):
        checkpoint.read(index)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is no .* pointer of Git LFS"):
        checkpoint.read(index)


def test_all_shards_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = sharded(tmp_path, {"a": torch.ones(99), "b": torch.ones(99)}, count=2)
    monkeypatch.setattr(checkpoint, "_LARGEST", 900)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is larger"):
        checkpoint.read(index)
