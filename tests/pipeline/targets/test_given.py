"""The user's own graph as the reference: its runner, and the range of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pipeline.core.errors import ArtifactError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.targets.given import exact_runner, fast_runner, range_of_graph

SmallGraph = Callable[..., onnx.ModelProto]


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """The graph with larger weights in its first convolution."""
    for tensor in model.graph.initializer:
        if tensor.name.startswith("stem"):
            larger = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(larger, tensor.name))
    return model


@pytest.mark.parametrize("fast", [False, True])
def test_the_reference_gives_the_graphs_logits(
    small_graph: SmallGraph, pictures: np.ndarray, tmp_path: Path, fast: bool
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(small_graph(), path)
    expected = OnnxExecutor(path).run(pictures)
    with fast_runner(path, 1) if fast else exact_runner(path) as runner:
        found = runner(pictures)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_graph_that_the_runtime_does_not_accept_is_an_error(
    small_graph: SmallGraph, tmp_path: Path
) -> None:
    model = small_graph()
    model.graph.node[3].op_type = "NoSuchOperator"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="onnxruntime does not accept"):
        exact_runner(path)


def test_the_range_names_the_largest_and_the_first_beyond_float16(
    small_graph: SmallGraph, pictures: np.ndarray
) -> None:
    found = range_of_graph(small_graph(), pictures)
    assert found is not None
    assert (found.first_beyond, found.images) == ("", 32)
    beyond = range_of_graph(scaled(small_graph(), 1e5), pictures)
    assert beyond is not None
    assert (beyond.first_beyond, beyond.largest > 65504) == ("stem", True)


def test_values_that_are_not_finite_are_the_largest(
    small_graph: SmallGraph, pictures: np.ndarray
) -> None:
    found = range_of_graph(scaled(small_graph(), 1e38), pictures)
    assert found is not None
    assert found.largest == math.inf


def test_a_graph_with_an_operator_that_is_not_known_has_no_range(
    small_graph: SmallGraph, pictures: np.ndarray
) -> None:
    model = small_graph()
    model.graph.node.append(helper.make_node("Bernoulli", ["x6"], ["more"], "random"))
    assert range_of_graph(model, pictures) is None
