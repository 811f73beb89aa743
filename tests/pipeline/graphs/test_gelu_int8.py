"""GELU in 8 bits: how it is fitted, what is inserted, and that ONNX Runtime takes it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from calibration.histogram import Histogram
from calibration.ranges import ACTIVATIONS_UINT8, Range, quantization
from pipeline.graphs.gelu_int8 import (
    GAINS,
    SHIFTS,
    SLOPES,
    GeluFit,
    fit,
    fit_gelus,
    gelu,
    gelus_of,
    input_range,
    input_ranges,
    levels,
    replace_gelus,
    sigmoid_levels,
)
from pipeline.graphs.qdq_ort import activations, candidates_of, insert_pairs

SOURCE = quantization(Range(-3.0, 6.0), ACTIVATIONS_UINT8)
RESULT = quantization(Range(-0.17, 6.0), ACTIVATIONS_UINT8)


def seen(low: float = -6.0, high: float = 6.0) -> Histogram:
    histogram = Histogram()
    values = np.random.default_rng(0).standard_normal(20_000)
    histogram.add(np.clip(1.5 * values, low, high).astype(np.float32))
    return histogram


def test_the_function_is_that_of_erf() -> None:
    x = np.array([-1.0, 0.0, 1.0])
    assert gelu(x) == pytest.approx([-0.15865525, 0.0, 0.84134475])


def test_levels_count_stored_values() -> None:
    counts = levels(seen(), SOURCE)
    assert counts.shape == (256,)
    assert counts.sum() == 20_000
    assert counts[0] > counts[1]  # what lies below the range is clipped into it


def test_a_fit_is_better_than_the_usual_slope() -> None:
    counts = levels(seen(), SOURCE)
    found = fit(counts, SOURCE, RESULT)
    x = (np.arange(256) - int(SOURCE.zero_point)) * float(SOURCE.scale)
    plain = x / (1 + np.exp(-1.702 * x))
    error = np.sqrt((counts * (plain - gelu(x)) ** 2).sum() / counts.sum()) / float(RESULT.scale)
    assert found.error < error + 0.3  # the usual one is not even rounded
    assert 1.5 <= found.slope <= 2.0
    assert found.exact_error < found.error
    assert found.excess == pytest.approx(found.error**2 - found.exact_error**2)


def test_a_fit_is_the_first_of_the_whole_grid_with_the_smallest_error() -> None:
    counts = levels(seen(), SOURCE)
    x = (np.arange(256) - int(SOURCE.zero_point)) * float(SOURCE.scale)
    best: tuple[float, float, float, int] = (np.inf, 0.0, 0.0, 0)
    for slope, shift, gain in itertools.product(SLOPES, SHIFTS, GAINS):
        share = sigmoid_levels(float(slope), shift, SOURCE) / 255
        rounded = RESULT.round_trip(x * gain * share).astype(np.float64)
        steps = (rounded - gelu(x)) / float(RESULT.scale)
        error = float(np.sqrt((counts * steps**2).sum() / counts.sum()))
        if error < best[0] - 1e-9:
            best = (error, float(slope), float(gain), shift)
    found = fit(counts, SOURCE, RESULT)
    assert (found.slope, found.gain, found.shift) == best[1:]
    assert found.error == pytest.approx(best[0])


def test_the_range_of_an_input_is_the_best_of_the_whole_grid() -> None:
    histogram = seen()
    used = np.flatnonzero(histogram.counts)
    x, weights = histogram.centres[used], histogram.counts[used]
    best, smallest = Range(0.0, 0.0), np.inf
    shares = np.linspace(1, 1 / 12, 24)
    for low, high in itertools.product(shares, shares):
        tried = Range(histogram.low * float(low), histogram.high * float(high))
        rounded = quantization(tried, ACTIVATIONS_UINT8).round_trip(x)
        error = float((weights * (gelu(rounded) - gelu(x)) ** 2).sum())
        if error < smallest:
            best, smallest = tried, error
    assert input_range(histogram) == best


def test_the_range_of_an_input_leaves_out_what_gives_nothing() -> None:
    histogram = seen(-6, 6)
    found = input_range(histogram)
    assert -4.0 < found.low < -2.0
    assert found.high > 3.5


def model_of(between: str = "Gelu", **attributes: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], "c1"),
        helper.make_node(between, ["a"], ["g"], "between", **attributes),
        helper.make_node("Conv", ["g", "w2"], ["b"], "c2"),
        helper.make_node("Flatten", ["b"], ["y"], "flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", 1, ("batch", 3, 4, 4))],
        [helper.make_tensor_value_info("y", 1, ("batch", 256))],
        [tensor("w1", 16, 3, 1, 1), tensor("w2", 16, 16, 1, 1)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantized(source: onnx.ModelProto) -> onnx.ModelProto:
    ranges = dict.fromkeys(activations(source), Range(-4.0, 4.0))
    ranges["a"], ranges["g"] = Range(-3.0, 6.0), Range(-0.17, 6.0)
    return insert_pairs(source, ranges, candidates_of(source))


def test_only_tensors_that_a_gelu_alone_reads_get_its_range() -> None:
    model = model_of()
    histograms = {"a": seen(), "g": seen(), "image": seen()}
    assert list(input_ranges(model, histograms)) == ["a"]
    assert not input_ranges(model_of("Relu"), histograms)
    assert not input_ranges(model_of(approximate="tanh"), histograms)
    model.graph.output.append(helper.make_tensor_value_info("a", 1, None))
    assert not input_ranges(model, histograms)


def test_onnx_runtime_takes_tables_and_products(tmp_path: Any) -> None:
    model = quantized(model_of())
    fits = fit_gelus(model, {"a": seen()})
    assert list(fits) == ["g"]
    made = replace_gelus(model, fits)
    onnx.checker.check_model(made, full_check=True)
    assert gelus_of(model) == ["g"]
    assert gelus_of(made) == []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(made.SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearSigmoid") == kinds.count("QLinearMul") == 1
    assert "Gelu" not in kinds
    x = np.random.default_rng(1).standard_normal((4, 3, 4, 4)).astype(np.float32)
    plain = onnxruntime.InferenceSession(model.SerializeToString())
    found, exact = session.run(None, {"image": x})[0], plain.run(None, {"image": x})[0]
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
    assert (found != exact).any()


def test_what_does_not_lie_between_8_bits_stays() -> None:
    model = quantized(model_of())
    assert gelus_of(model_of()) == []
    assert gelus_of(quantized(model_of(approximate="tanh"))) == []
    model.graph.output.append(helper.make_tensor_value_info("g", 1, None))
    assert gelus_of(model) == []
    same = replace_gelus(quantized(model_of()), {"other": GeluFit(1.7, 1.0, 0, 0.0, 0.0)})
    assert [node.op_type for node in same.graph.node].count("Gelu") == 1


def test_a_table_for_large_values_has_no_overflow() -> None:
    """Warnings are errors here."""
    table = sigmoid_levels(1.7, 0, quantization(Range(-3000.0, 3000.0), ACTIVATIONS_UINT8))
    assert (table[0], table[-1]) == (0, 255)
