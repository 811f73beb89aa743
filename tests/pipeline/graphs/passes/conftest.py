"""Small graphs in ONNX's text form, and running them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from pipeline.graphs.passes import optimize

Array = npt.NDArray[np.float32]

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def parse(text: str, weights: Mapping[str, Sequence[int] | npt.NDArray[np.generic]]) -> ir.Model:
    """A model from text; weights are arrays, or shapes to fill with seeded noise."""
    rng = np.random.default_rng(11)
    model = onnx.parser.parse_model(HEADER + text)
    for name, content in weights.items():
        array = (
            content
            if isinstance(content, np.ndarray)
            else rng.standard_normal(content).astype(np.float32)
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    return ir.from_proto(model)


def run_model(model: ir.Model, images: Array) -> Array:
    """The first output, by ONNX Runtime with no optimization of its own."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(None, {session.get_inputs()[0].name: images})[0]
    return result


def operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the model has; other domains than ONNX's with a prefix."""
    return Counter(f"{n.domain}:{n.op_type}" if n.domain else n.op_type for n in model.graph)


@pytest.fixture
def graph() -> Callable[..., ir.Model]:
    """Makes a model: (text, weights)."""
    return parse


@pytest.fixture
def run() -> Callable[[ir.Model, Array], Array]:
    """Runs a model: (model, images) -> output."""
    return run_model


@pytest.fixture
def count() -> Callable[[ir.Model], Counter[str]]:
    """Counts a model's operators."""
    return operators


@pytest.fixture
def noise() -> Callable[..., Array]:
    """Makes seeded noise of a shape."""
    return lambda *shape: np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.fixture
def same() -> Callable[..., None]:
    """Applies passes and compares outputs: (model, passes, images, tolerance)."""

    def check(
        model: ir.Model,
        passes: Sequence[ir.passes.PassBase],
        images: Array,
        tolerance: float = 2e-6,
    ) -> None:
        expected = run_model(model, images)
        optimize(model, passes)
        found = run_model(model, images)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()

    return check
