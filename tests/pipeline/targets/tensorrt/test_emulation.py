"""The strict executor's word on an engine; needs no TensorRT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import ArtifactError
from pipeline.core.files import file_hash
from pipeline.targets.tensorrt.emulation import EmulatedRunner


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Doubles its input in float16, then once more."""
    shape: list[str | int] = ["batch", 1, 1, 2]
    two = numpy_helper.from_array(np.array(2, np.float16), "two")
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "two"], ["first"], "first"),
        helper.make_node("Mul", ["first", "two"], ["second"], "second"),
        helper.make_node("Cast", ["second"], ["back"], "back", to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["back"], ["logits"], "flatten"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
            [two],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def engine_of(graph: Path) -> Any:
    return SimpleNamespace(facts={"graph_sha256": file_hash(graph)}, folder=Path("trt/fp16"))


@pytest.mark.parametrize(
    ("sides", "divides"), [([3, 64, 64], 8), ([3, 224, 224], 1), ([3, "height", "width"], 1)]
)
def test_small_pictures_are_divided_among_threads(
    tmp_path: Path, make_model: Callable[..., onnx.ModelProto], sides: list[int], divides: int
) -> None:
    nodes = [helper.make_node("Relu", ["image"], ["logits"])]
    onnx.save(make_model(nodes, {}, ["n", *sides], ["n", *sides]), tmp_path / "model.onnx")
    runner = EmulatedRunner(engine_of(tmp_path / "model.onnx"), tmp_path / "model.onnx")
    assert runner.divides == divides


def test_values_and_tensors_that_overflow_are_told_apart(graph: Path) -> None:
    runner = EmulatedRunner(engine_of(graph), graph)
    runner(np.array([[[[40_000.0, 20_000.0]]], [[[40_000.0, 40_000.0]]]], np.float32))
    numerics = runner.numerics()
    assert numerics is not None
    # Of 40,000 already the first product is infinite; of 20,000 the second.
    assert numerics.overflowed_values == 4
    assert [text.split()[-1] for text in numerics.overflowed_tensors][:2] == ["first", "second"]


def test_headroom_is_told_where_nothing_overflows(graph: Path) -> None:
    runner = EmulatedRunner(engine_of(graph), graph)
    runner(np.array([[[[1000.0, 1.0]]]], np.float32))
    numerics = runner.numerics()
    assert numerics is not None
    assert (numerics.overflowed_values, numerics.overflowed_tensors) == (0, ())
    assert numerics.more["headroom"] == pytest.approx(65504 / 4000)
    assert numerics.more["blocks"]


def test_another_graph_is_refused(graph: Path) -> None:
    engine = engine_of(graph)
    engine.facts["graph_sha256"] = "0" * 64
    with pytest.raises(ArtifactError, match="is not the graph that"):
        EmulatedRunner(engine, graph)


@pytest.fixture
def sums(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a graph that adds up 64 values, in a type."""

    def make(dtype: int) -> Path:
        ones = numpy_helper.from_array(np.ones((64, 1), np.float32), "ones")
        nodes = [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Cast", ["flat"], ["half"], to=dtype),
            helper.make_node("Cast", ["ones"], ["weights"], to=dtype),
            helper.make_node("MatMul", ["half", "weights"], ["sum"], "sum"),
            helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.FLOAT),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])],
            [ones],
        )
        opset = [helper.make_opsetid("", 20)]
        path = tmp_path / f"{dtype}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
        return path

    return make


def test_the_second_reading_rounds_sums_on_the_way(sums: Callable[[int], Path]) -> None:
    graph = sums(TensorProto.FLOAT16)
    images = np.zeros((1, 1, 8, 8), np.float32)
    images[0, 0, 0, 0], images[0, 0, 2:] = 2048, 0.5  # half a unit of 2048 in each 2 values
    runner = EmulatedRunner(engine_of(graph), graph)
    second = runner.narrow_sums()
    assert second is not None
    assert runner(images).tolist() == [[2072]]
    assert second(images).tolist() == [[2048 + 3 * 8]]
    images[0, 0, 2:] = 0.03125  # half a unit in 16 values: each step rounds to even
    assert runner(images).tolist() == [[2050]]
    assert second(images).tolist() == [[2048]]
    assert second.numerics() is None
    assert "half precision" in second.device
    assert "half precision" not in runner.device


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_there_is_none_where_nothing_sums_in_half_precision(
    sums: Callable[[int], Path], dtype: int
) -> None:
    graph = sums(dtype)
    assert EmulatedRunner(engine_of(graph), graph).narrow_sums() is None


def test_what_was_recorded_is_taken_up_elsewhere(graph: Path) -> None:
    values = [[40_000.0, 1e-7], [3.0, 0.1], [np.inf, 7.0], [1e-8, -90_000.0]]
    images = np.array(values, np.float32).reshape(4, 1, 1, 2)
    whole, first, second = (EmulatedRunner(engine_of(graph), graph) for _ in range(3))
    for image in images:
        whole(image[None])
    first(images[:1])
    first(images[1:2])
    second.go_on(2, json.loads(json.dumps(first.noted())))
    second(images[2:3])
    second(images[3:])
    assert second.overflow_report() == whole.overflow_report()
    assert second.numerics() == whole.numerics()
    with pytest.raises(TypeError):
        second.go_on(2, [{"tensor": "first"}])
    assert second.numerics() == whole.numerics()


@pytest.mark.parametrize("weight", [2.0, np.inf])
def test_parts_are_recorded_apart_and_joined(graph: Path, weight: float) -> None:
    """What is recorded of constants counts once, however many parts there are."""
    model = onnx.load(graph)
    two = numpy_helper.from_array(np.array([weight], np.float16), "two")
    model.graph.initializer[0].CopyFrom(two)
    onnx.save(model, graph)
    values = [[40_000.0, 1e-7], [3.0, 0.1], [np.inf, 7.0], [1e-8, -90_000.0]]
    images = np.array(values, np.float32).reshape(4, 1, 1, 2)
    whole, joined, part = (EmulatedRunner(engine_of(graph), graph) for _ in range(3))
    for image in images:
        whole(image[None])
    noted: list[Any] = []
    for first in (2, 0):
        part.begin(first)
        for image in images[first:][:2]:
            part(image[None])
        noted.insert(0, json.loads(json.dumps(part.noted())))
    joined.go_on(4, joined.joined(noted))
    assert joined.overflow_report() == whole.overflow_report()
    assert joined.numerics() == whole.numerics()
