"""A calibration that other processes can take part in: everything lies in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx

from pipeline.core.network import Network
from pipeline.stages.names import GRAPH, LABELS, PIXELS, SOURCES
from pipeline.stages.ranges import RangesStep
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import Code
from pipeline.steps.step import Context

IMAGES = 40
NETWORK = Network(
    "small",
    ("a", "b", "c", "d"),
    (3, 8, 8),
    {
        "size": 8,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "channels": "rgb",
    },
)


def write(folder: Path, graph: onnx.ModelProto, images: int = IMAGES) -> None:
    """Write what a calibration is made from: a graph, and so many images."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)

    def write_graph(place: Path) -> dict[str, Any]:
        onnx.save(graph, place / GRAPH)
        return {}

    def write_images(place: Path) -> dict[str, Any]:
        np.save(place / PIXELS, pixels)
        np.save(place / LABELS, np.zeros(images, dtype=np.int64))
        (place / SOURCES).write_text(json.dumps([[str(i), f"h{i}"] for i in range(images)]))
        return {"network": NETWORK.to_dict()}

    _made(folder, "onnx", write_graph)
    _made(folder, "calibration", write_images)


def _made(folder: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> None:
    artifact.make(folder / name, kind="x", name=name, key="k", made_from={}, tools={}, build=build)


def step_of(folder: Path, shard: int, *, method: str = "mse", stored: str = "int8") -> RangesStep:
    """The calibration in a folder, in shards of so many images."""

    def there(name: str) -> Any:
        place = folder / name
        return SimpleNamespace(name=name, folder=place, artifact=lambda: Artifact.read(place))

    config = SimpleNamespace(folder=folder, calibration=SimpleNamespace(shard=shard))
    context = Context(
        config=config,
        progress=lambda *told: None,
        log=lambda line: None,
        code=Code(Path(artifact.__file__).parents[2]),
    )
    simplify, calibration = there("onnx"), there("calibration")
    return RangesStep(cast(Any, context), simplify, calibration, method=method, stored=stored)


def run_shard(folder: str, shard: int, number: int) -> str:
    """Look at one shard; called in another process. Returns the digest of what it saw."""
    return step_of(Path(folder), shard).shards()[number].run().digest
