"""Ranges that the calibrate stage observes, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from calibration.ranges import DType, Method
from pipeline.core.errors import ArtifactError
from pipeline.core.network import Network
from pipeline.stages.names import GRAPH, LABELS, PIXELS, SOURCES
from pipeline.stages.ranges import RANGES, RangesStep, read_ranges
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import Code, versions
from pipeline.steps.step import Context

IMAGES = 8
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


def made(folder: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Any:
    """Stands for the step whose artifact this is."""
    built = artifact.make(
        folder / name, kind="x", name=name, key="k", made_from={}, tools={}, build=build
    )
    return SimpleNamespace(name=name, folder=folder / name, artifact=lambda: built)


@pytest.fixture
def make_step(
    tmp_path: Path, small_graph: Callable[..., onnx.ModelProto]
) -> Callable[[str, str], RangesStep]:
    """Makes the step of a method and a stored type."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)

    def graph(folder: Path) -> dict[str, Any]:
        onnx.save(small_graph(), folder / GRAPH)
        return {}

    def images(folder: Path) -> dict[str, Any]:
        np.save(folder / PIXELS, pixels)
        np.save(folder / LABELS, np.zeros(IMAGES, dtype=np.int64))
        (folder / SOURCES).write_text(json.dumps([[str(i), f"h{i}"] for i in range(IMAGES)]))
        return {"network": NETWORK.to_dict()}

    simplify, calibration = made(tmp_path, "onnx", graph), made(tmp_path, "calibration", images)
    context = Context(
        config=SimpleNamespace(folder=tmp_path, calibration=SimpleNamespace(shard=256)),
        progress=lambda *told: None,
        log=lambda line: None,
        code=Code(Path(artifact.__file__).parents[2]),
    )

    def make(method: str, stored: str) -> RangesStep:
        return RangesStep(cast(Any, context), simplify, calibration, method=method, stored=stored)

    return make


@pytest.mark.parametrize(
    ("stored", "dtype", "symmetric"),
    [("int8", DType.INT8, True), ("uint8", DType.UINT8, False)],
)
def test_every_tensor_has_a_range_by_the_method_and_type(
    stored: str, dtype: DType, symmetric: bool, make_step: Callable[[str, str], RangesStep]
) -> None:
    step = make_step("percentile", stored)
    found = step.run()
    table = read_ranges(found)
    assert (table.method, table.scheme.dtype, table.scheme.symmetric, table.images) == (
        Method.PERCENTILE,
        dtype,
        symmetric,
        IMAGES,
    )
    assert {"image", "x0", "x4"} <= set(table.tensors)
    seen = table.tensors["image"].seen
    assert -1 <= seen.low < -0.9 < 0.9 < seen.high <= 1
    facts = {key: found.facts[key] for key in ("method", "stored", "tensors")}
    assert facts == {"method": "percentile", "stored": stored, "tensors": len(table.tensors)}


def test_the_methods_differ(make_step: Callable[[str, str], RangesStep]) -> None:
    tables = [read_ranges(make_step(method, "int8").run()) for method in ("min-max", "mse")]
    assert tables[0].ranges["x0"] != tables[1].ranges["x0"]
    assert tables[0].tensors["x0"].clipped == 0


def test_what_decides_the_ranges_is_in_their_key(
    make_step: Callable[[str, str], RangesStep],
) -> None:
    step = make_step("mse", "int8")
    assert (step.stage, step.name) == ("calibrate", "ranges/mse-int8")
    assert set(step.made_from()) == {"onnx", "calibration"}
    assert step.inputs() == {"settings of the ranges": {"method": "mse", "stored": "int8"}}
    assert step.tools() == versions("onnxruntime")
    assert {"calibration/observe.py", "calibration/ranges.py"} <= set(step.code())


def spoil(step: RangesStep, text: str) -> Artifact:
    path = step.folder / RANGES
    path.write_text(text)
    return step.artifact()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scheme": 1}', '{"scheme": {"dtype": "x"}}'])
def test_a_damaged_table_says_so(text: str, make_step: Callable[[str, str], RangesStep]) -> None:
    step = make_step("min-max", "int8")
    step.run()
    with pytest.raises(ArtifactError, match=r"ranges\.json is damaged: calibrate again"):
        read_ranges(spoil(step, text))


def test_a_range_that_is_not_finite_is_damage_too(
    make_step: Callable[[str, str], RangesStep],
) -> None:
    step = make_step("min-max", "int8")
    step.run()
    plain = json.loads((step.folder / RANGES).read_text())
    plain["tensors"]["x0"]["chosen"] = [0, float("inf")]
    with pytest.raises(ArtifactError, match="is damaged"):
        read_ranges(spoil(step, json.dumps(plain)))
    (step.folder / RANGES).unlink()
    with pytest.raises(ArtifactError, match="is damaged"):
        read_ranges(step.artifact())
