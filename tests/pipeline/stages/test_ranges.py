"""Ranges that the calibrate stage observes, for people to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from calibration.ranges import DType, Method
from pipeline.core.errors import ArtifactError
from pipeline.stages.ranges import RANGES, RangesStep, read_ranges
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import versions
from tests.pipeline.stages.observing_toys import step_of, write

IMAGES = 8


@pytest.fixture
def make_step(
    tmp_path: Path, small_graph: Callable[..., onnx.ModelProto]
) -> Callable[[str, str], RangesStep]:
    """Makes the step of a method and a stored type."""
    write(tmp_path, small_graph(), IMAGES)
    return lambda method, stored: step_of(tmp_path, 256, method=method, stored=stored)


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
