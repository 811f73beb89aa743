"""Headers of safetensors: what a file says about its tensors and about its network, by anybody."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from attacks import ground
from attacks.attempt import Attempt
from care.evaluate import read_trained
from care.factory import create_model
from pipeline.core.checkpoints import METADATA_KEY

NETWORK = "test_resnet"

STATED: Mapping[str, Any] = {
    "model": NETWORK,
    "num_classes": 4,
    "model_kwargs": {"in_chans": 3, "drop_rate": 0.0},
    "labels": ["ant", "bee", "cat", "dog"],
    "preprocess": {
        "size": 32,
        "crop": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "channels": "rgb",
    },
}
"""What a checkpoint of ours says about itself."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "x", "x" * 10_000, "\x1b[2J", "a\nb", "\0", "\ud800"),
    *("../../etc/passwd", "http://x/y", "hf-hub:x/y", "[red]x[/nope]", "{}", "__proto__"),
    *([], [[]], [None], ["x"] * 5, list(range(1000)), {}, {"a": 1}, {"": {}}, [{}, {}, {}, {}]),
)

RAW = (
    *(
        b"",
        b"{",
        b"}",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{} ",
        b"{}x",
    ),
    *(b"9" * 5000, b'{"a":' * 100, b"[" * 100_000, b'{"a":' * 65 + b"1" + b"}" * 65),
    *(b'{"model":"a","model":"b"}', b'{"model":NaN}', b'{"model":1e999}', b'{"\\ud800":1}'),
    b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(20_000)) + b"}",
)
"""Text in the place of JSON."""


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Files with every odd value in every place of the metadata, and `count` random ones."""
    state = create_model(NETWORK, num_classes=4).state_dict()
    whole = safetensors.torch.save({name: value.clone() for name, value in state.items()})
    for name, make in inputs(state, whole, seed, count):
        yield given(folder, whole, name, make)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """As many of them, listed and random, through the real command."""
    ground.lay_out(folder)
    path = folder / "odd.safetensors"
    state = create_model(NETWORK, num_classes=4).state_dict()
    whole = safetensors.torch.save({name: value.clone() for name, value in state.items()})
    every = list(inputs(state, whole, seed, count))
    chosen = random.Random(seed).sample(every[:-count], count // 2) + every[-(count - count // 2) :]

    def run(make: Callable[[], bytes]) -> None:
        path.write_bytes(make())
        ground.look_at(folder, ground.LOOKED_AT % (path.name, "folder:images"))

    for name, make in chosen:
        yield Attempt(name, partial(run, make))


def inputs(
    state: Mapping[str, Tensor], whole: bytes, seed: int, count: int
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Makers of files: of all that are listed, then of `count` random ones."""
    for name, change in listed():
        yield f"metadata {name}", partial(with_metadata, state, changed(change))
    for text in RAW:
        yield f"text {text[:20]!r}", partial(with_text, whole, text)
        yield f"header {text[:20]!r}", partial(with_header, whole, text)
    chosen = random.Random(seed)
    for number in range(count):
        if number % 2:
            content = changed(partial(at_random, chosen))
            yield f"metadata {number}", partial(with_metadata, state, content)
        else:
            yield f"bytes {number}", partial(bytes, with_bytes(whole, chosen))


def listed() -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    """Every odd value in the place of each value."""
    for path in paths(STATED):
        for value in ODD:
            yield f"{'.'.join(map(str, path))} {value!r:.20}", partial(put, path=path, value=value)


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in nested values."""
    if above:
        yield above
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield from paths(inner, (*above, key))


def put(content: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set what lies at a place."""
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What is stated, after a change."""
    content = copy.deepcopy(dict(STATED))
    change(content)
    return content


def at_random(chosen: random.Random, content: dict[str, Any]) -> None:
    """Put some odd values somewhere, and take some away or add some."""
    for _ in range(chosen.randint(1, 4)):
        path = chosen.choice(list(paths(content)))
        what = chosen.random()
        if what < 0.6:
            put(content, path, copy.deepcopy(chosen.choice(ODD)))
        elif what < 0.8 and len(path) == 1 and len(content) > 1:
            del content[path[0]]
        else:
            content[chosen.choice(("depth", "x", "pretrained", "checkpoint_path"))] = chosen.choice(
                ODD
            )


def with_metadata(state: Mapping[str, Tensor], content: Any) -> bytes:
    """A file that states this."""
    text = json.dumps(content)
    return safetensors.torch.save(
        {name: value.clone() for name, value in state.items()}, {METADATA_KEY: text}
    )


def with_text(whole: bytes, text: bytes) -> bytes:
    """A file whose metadata is this text, which need not be JSON."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    stated = text.decode("utf-8", "surrogateescape")
    header["__metadata__"] = {METADATA_KEY: stated}
    return with_header(whole, json.dumps(header).encode())


def with_header(whole: bytes, header: bytes) -> bytes:
    """A file with this header before its tensors."""
    length = struct.unpack("<Q", whole[:8])[0]
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def with_bytes(whole: bytes, chosen: random.Random) -> bytes:
    """A file with other bytes in its header."""
    length = struct.unpack("<Q", whole[:8])[0]
    data = bytearray(whole)
    for _ in range(chosen.randint(1, 6)):
        data[chosen.randrange(8 + length)] = chosen.choice((chosen.randrange(256), *b'"{}[]:,0-\\'))
    return bytes(data)


def given(folder: Path, whole: bytes, name: str, make: Callable[[], bytes]) -> Attempt:
    """Read a file as `care.evaluate` does; what loads has the weights that were written."""
    path = folder / "odd.safetensors"

    def run() -> None:
        path.write_bytes(make())
        trained = read_trained(path)
        expected = safetensors.torch.load(whole)
        for key, value in trained.network.state_dict().items():
            if not value.equal(expected[key]):
                raise AssertionError(f"{key} was changed in silence")

    return Attempt(name, run)
