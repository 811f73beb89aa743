"""Checkpoints: tensors of odd kinds, names and nesting, wrappers, other files, damaged bytes."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from attacks import ground
from attacks.attempt import Attempt
from care import checkpoint
from care.factory import create_model

State = dict[str, Tensor]

KEYS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "params", "module", "weights"),
    *("state_dict_ema", "model_ema", "ema", "", "\x1b[2J", "x" * 300, 5, None, (1, 2), b"model"),
)
PREFIXES = ("module.", "model.", "net.", "backbone.", "_orig_mod.", "module.model.", "a.b.c.", ".")
PLAIN: tuple[Any, ...] = (None, 0, 1.5, "x", b"x", True, [], (), {})
METADATA: tuple[Any, ...] = (None, [], {"a": 1}, {"metadata": "x"}, {"format": 1})
VALUES: Mapping[str, Callable[[], Any]] = {
    **{repr(value)[:30]: partial(copy.copy, value) for value in PLAIN},
    "a set": lambda: {1, 2},
    "a date": lambda: datetime.date(2025, 2, 3),
    "a path": lambda: Path("x"),
    "a namespace": lambda: argparse.Namespace(x=1),
    "an ordered dictionary": lambda: collections.OrderedDict(a=1),
    "a counter": lambda: collections.Counter("aab"),
    "an array": lambda: np.zeros(3),
    "a number of numpy": lambda: np.float64(1),
    "a module": lambda: nn.Linear(2, 2),
    "a parameter": lambda: nn.Parameter(torch.zeros(2)),
    "a tensor": lambda: torch.zeros(2),
    "a storage": lambda: torch.zeros(2).untyped_storage(),
    "a size": lambda: torch.Size([1, 2]),
    "a type": lambda: torch.float32,
    "a device": lambda: torch.device("cuda:7"),
    "a function": lambda: print,
    "an optimizer": lambda: torch.optim.Adam([nn.Parameter(torch.zeros(1))]).state_dict(),
    "a large number": lambda: 10**5000,
    "itself": lambda: _itself(),
    "5 levels": lambda: _nested(5),
    "500 levels": lambda: _nested(500),
    "500 lists": lambda: _nested_list(500),
}


def _itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["model"] = value
    return value


def _nested(levels: int) -> Any:
    value: Any = {"w": torch.zeros(1)}
    for _ in range(levels):
        value = {"model": value}
    return value


def _nested_list(levels: int) -> Any:
    value: Any = torch.zeros(1)
    for _ in range(levels):
        value = [value]
    return value


def odd_tensors(value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A matrix in kinds that few networks have."""
    types = (
        *(torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex32),
        *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
    rows, columns = value.shape
    return {
        **{str(kind): partial(value.to, kind) for kind in types},
        "sparse": value.to_sparse,
        "sparse rows": value.to_sparse_csr,
        "sparse columns": value.to_sparse_csc,
        "sparse blocks": lambda: value[: rows // 2 * 2, : columns // 2 * 2].to_sparse_bsr((2, 2)),
        "complex and sparse": lambda: value.to(torch.complex64).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "quantized by channel": lambda: torch.quantize_per_channel(
            value, torch.ones(rows), torch.zeros(rows), 0, torch.qint8
        ),
        "quantized to 32 bits": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint32),
        "without values": lambda: value.to("meta"),
        "nested": lambda: torch.nested.nested_tensor(list(value)),
        "jagged": lambda: torch.nested.nested_tensor(list(value), layout=torch.jagged),
        "expanded": lambda: torch.zeros(1).expand(10**6, 10**6),
        "expanded to size": lambda: torch.zeros(1).expand(rows, columns),
        "empty": lambda: torch.zeros(0, columns),
        "a scalar": lambda: torch.zeros(()),
        "transposed": lambda: value.T,
        "strided": lambda: value[:, ::2],
        "of many axes": lambda: value.reshape((1,) * 50 + tuple(value.shape)),
        "conjugated": lambda: value.to(torch.complex64).conj(),
        "negated": lambda: value.to(torch.complex64).conj().imag,
        "not a number": lambda: torch.full_like(value, float("nan")),
        "beyond float32": lambda: torch.full_like(value, 1e300, dtype=torch.float64),
        "a parameter": lambda: nn.Parameter(value),
    }


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Checkpoints of a small network; `count` with random damage beside the listed."""
    model = create_model("test_resnet", num_classes=4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, content in contents(state):
        data = saved(content)
        if data is not None:
            yield written(folder, model, name, data)
    for name, data in {**dict(files(state)), **dict(headers())}.items():
        yield written(folder, model, name, data)
    yield from paths(folder, model)
    for name, data in mutations(np.random.default_rng(seed), state, count):
        yield written(folder, model, name, data)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """As many of them, listed and random, through the real command."""
    ground.lay_out(folder)
    path = folder / "odd.pth"
    state = create_model("test_resnet", num_classes=4).state_dict()
    listed = {name: partial(saved, content) for name, content in contents(state)}
    listed |= {name: partial(bytes, data) for name, data in (*files(state), *headers())}
    rng = np.random.default_rng(seed)
    chosen = [str(name) for name in rng.permutation(list(listed))[: count // 2]]
    makers = [(name, listed[name]) for name in chosen]
    makers += [(n, partial(bytes, data)) for n, data in mutations(rng, state, count - len(chosen))]

    def run(make: Callable[[], bytes | None]) -> None:
        data = make()
        path.write_bytes(b"" if data is None else data)
        ground.look_at(folder, ground.LOOKED_AT % (path.name, "folder:images"))

    for name, make in makers:
        yield Attempt(name, partial(run, make))


def mutations(rng: np.random.Generator, state: State, count: int) -> Iterator[tuple[str, bytes]]:
    """Checkpoints with random damage."""
    whole = list(forms(state).values())
    for number in range(count):
        damaged = bytearray(whole[number % len(whole)])
        reach = len(damaged) if number % 2 else min(len(damaged), 4000)
        for place in rng.integers(0, reach, rng.integers(1, 8)):
            damaged[place] = rng.integers(256)
        if number % 10 == 0:
            del damaged[rng.integers(len(damaged)) :]
        yield f"mutation {number}", bytes(damaged)


def contents(state: State) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What `torch.save` was given."""
    matrix = next(name for name, value in state.items() if value.ndim == 2)
    for name, tensor in odd_tensors(state[matrix]).items():
        yield f"{name} tensor", partial(lambda make: {**state, matrix: make()}, tensor)
    for key in KEYS:
        yield f"under {key!r:.20}", partial(lambda key: {key: state, "epoch": 3}, key)
        yield f"under {key!r:.20} twice", partial(lambda key: {key: {key: state}}, key)
    for prefix in PREFIXES:
        yield f"with {prefix}", partial(lambda p: {p + n: v for n, v in state.items()}, prefix)
        yield (
            f"with {prefix} and without",
            partial(lambda p: {**state, **{p + n: v for n, v in state.items()}}, prefix),
        )
    for name, make in VALUES.items():
        yield f"{name} alone", make
        yield f"{name} as state", partial(lambda make: {"state_dict": make()}, make)
        yield f"{name} among the weights", partial(lambda make: {**state, "x": make()}, make)
        yield f"{name} beside them", partial(lambda make: {"model": state, "x": make()}, make)
    for name in (
        "x" * 300,
        "x\x1b[2J",
        "x\ny",
        "x\0",
        "\ud800",
        "",
        " ",
        "<script>",
        "ä",
        "x" * 10**6,
    ):
        yield f"name {name[:20]!r}", partial(lambda n: {**state, n: torch.zeros(1)}, name)
        yield f"only name {name[:20]!r}", partial(lambda n: {n: torch.zeros(1)}, name)
    yield "many names", lambda: {f"x{n}": torch.zeros(1) for n in range(20_000)}
    yield "two networks", lambda: {f"{p}.{n}": v for p in "ab" for n, v in state.items()}


def forms(state: State) -> dict[str, bytes]:
    """One checkpoint in each format."""
    made = {"safetensors": safetensors.torch.save(state, {"metadata": "{}"})}
    for name, modern in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"model": state}, buffer, _use_new_zipfile_serialization=modern)
        made[name] = buffer.getvalue()
    return made


def files(state: State) -> Iterator[tuple[str, bytes]]:
    """Other files that people take for checkpoints."""
    yield (
        "a Git LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    )
    yield "an index", json.dumps({"metadata": {}, "weight_map": {"a": "b"}}).encode()
    yield "nested JSON", b'{"a":' * 100_000
    yield "a web page", b"<!DOCTYPE html><html>404</html>"
    yield "text", b"hello\n"
    yield "compressed", gzip.compress(forms(state)["zip"])
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + bytes(100)
    yield "GGUF", b"GGUF" + bytes(100)
    yield "ONNX", b"\x08\x08\x12\x07pytorch" + bytes(100)
    for protocol in range(6):
        yield f"a pickle of protocol {protocol}", pickle.dumps({"w": [1]}, protocol)
    yield "a deep pickle", b"\x80\x02" + b"(" * 100_000 + b"."
    yield "a pickle of code", b"cos\nsystem\n(S'true'\ntR."
    yield "a pickle of a long name", b"\x80\x02c" + b"a" * 10_000 + b"\nb\n."
    yield "a pickle of a huge text", b"\x80\x02X" + struct.pack("<I", 2**31) + b"."
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    yield "NumPy's archive", buffer.getvalue()
    for entries in ({}, {"data.pkl": b""}, {"x/data.pkl": b"."}, {"../../x/data.pkl": b"N."}):
        yield f"a zip of {list(entries)}", _zipped(entries)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    yield "a tar", buffer.getvalue()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    yield "TorchScript", buffer.getvalue()


def _zipped(entries: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def headers() -> Iterator[tuple[str, bytes]]:
    """Headers of safetensors that lie."""
    whole = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    changes: tuple[Any, ...] = (
        *({}, [], None, {"w": {}}, {"w": None}, {"": whole["w"]}, {"\x1b[2J": whole["w"]}),
        *(
            {"w": {**whole["w"], "dtype": kind}}
            for kind in ("F8_E4M3", "I3", "", None, "C64", "BOOL")
        ),
        *(
            {"w": {**whole["w"], "shape": s}}
            for s in ([-1], [2**63], [2**40] * 3, [0], [], "x", [1.5])
        ),
        *(
            {"w": {**whole["w"], "data_offsets": o}}
            for o in ([4, 0], [0, 2**63], [-4, 0], [0], "x")
        ),
        {**whole, "v": whole["w"]},
        *({**whole, "__metadata__": value} for value in METADATA),
        *(
            {**whole, "__metadata__": {"metadata": text}}
            for text in ("{", "[]", "5", "null", "NaN", '{"a":' * 5000, "[" * 100_000, "9" * 5000)
        ),
    )
    for content in changes:
        text = json.dumps(content).encode()
        yield f"header {text[:60]!r}", struct.pack("<Q", len(text)) + text + bytes(4)
    for length in (0, 1, 2**32, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", struct.pack("<Q", length) + b"{}" + bytes(4)
    yield "deep header", struct.pack("<Q", 100_000) + b'{"a":' * 20_000


def paths(folder: Path, model: nn.Module) -> Iterator[Attempt]:
    """Paths that are no checkpoint."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("none")
    names = (
        "/dev/zero",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "/",
        "a\0b",
        300 * "x",
        "",
        "~/x",
    )
    for path in (*names, folder / "pipe", folder / "loop", folder / "nowhere", 5000 * "x/"):
        yield Attempt(f"path {path!r:.40}", partial(tried, Path(path), model), hostile=True)


def saved(content: Callable[[], Any]) -> bytes | None:
    """What `torch.save` writes of something; None where PyTorch itself does not save it."""
    buffer = io.BytesIO()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # PyTorch writes deeper nesting than it does by default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.save(content(), buffer)
        except Exception:
            return None
        finally:
            sys.setrecursionlimit(limit)
    return buffer.getvalue()


def written(folder: Path, model: nn.Module, name: str, data: bytes) -> Attempt:
    """Load bytes as a checkpoint."""
    path = folder / "odd.pth"

    def run() -> None:
        path.write_bytes(data)
        tried(path, model)

    return Attempt(name, run)


def tried(path: Path, model: nn.Module) -> None:
    """Read what a checkpoint states, and its weights."""
    checkpoint.read_metadata(path)
    checkpoint.load(path, model)
