from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from pipeline.core.errors import BuildError, ConfigError, DataError, UnsupportedOperatorError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.onnx.operators import OPERATORS

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]
Small = Callable[..., onnx.ModelProto]

STORED = {"int8-trt": TensorProto.INT8, "fp8-trt": TensorProto.FLOAT8E4M3FN}
QUANTIZED = {"int8-trt": ["stem", "depthwise", "pointwise", "head"], "fp8-trt": ["pointwise"]}


@pytest.mark.parametrize("form", STORED)
def test_weights_are_stored_in_8_bits_and_the_rest_in_float16(
    convert: Convert, small_graph: Small, form: str
) -> None:
    model, facts = convert(small_graph(), form, max_top1_drop=1.0)
    stored = {i.name: i for i in model.graph.initializer}
    assert facts["quantized_layers"] == len(QUANTIZED[form])
    assert facts["sensitivity"]["excluded"] == []
    quantized = [n for n, i in stored.items() if i.data_type == STORED[form] and len(i.dims) > 1]
    assert len(quantized) == len(QUANTIZED[form])
    assert not any(i.data_type == TensorProto.FLOAT for i in model.graph.initializer)
    scales = numpy_helper.to_array(stored["stages.0.blocks.1.conv.weight_scale_float16"])
    assert scales.shape == (16,)
    assert scales.dtype == np.float16


@pytest.mark.parametrize("form", STORED)
def test_everything_is_symmetric(convert: Convert, small_graph: Small, form: str) -> None:
    model, _ = convert(small_graph(), form, max_top1_drop=1.0)
    zeros = [i for i in model.graph.initializer if i.name.endswith("_zero_point")]
    assert len(zeros) == 2 * len(QUANTIZED[form])
    assert all(not numpy_helper.to_array(z).astype(np.float32).any() for z in zeros)


@pytest.mark.parametrize(("form", "tolerance"), [("int8-trt", 0.05), ("fp8-trt", 0.15)])
def test_the_strict_executor_stays_near_float32(
    convert: Convert, small_graph: Small, pictures: np.ndarray, form: str, tolerance: float
) -> None:
    model, facts = convert(small_graph(), form, max_top1_drop=1.0)
    exact = OnnxExecutor(small_graph()).run(pictures)
    rounded = OnnxExecutor(model).run(pictures)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert error < tolerance
    assert facts["sensitivity"]["outcome"]["logit_error"] == pytest.approx(error, rel=1e-3)


def test_float8_leaves_layers_without_kernels_in_float16(
    convert: Convert, small_graph: Small
) -> None:
    model, facts = convert(small_graph(), "fp8-trt", max_top1_drop=1.0)
    left = ["stem", "depthwise", "head"]  # few input channels, groups, few output channels
    assert facts["layers_without_kernels"] == left
    types = {i.name: i.data_type for i in model.graph.initializer}
    weights = {n.name: n.input[1] for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    assert [types.get(weights[name]) for name in left] == [TensorProto.FLOAT16] * 3
    assert weights["pointwise"] not in types  # it is dequantized
    _, facts = convert(small_graph(), "int8-trt", max_top1_drop=1.0)
    assert facts["layers_without_kernels"] == []


def test_an_activation_read_twice_is_quantized_once(convert: Convert, small_graph: Small) -> None:
    model = small_graph()
    twin = onnx.NodeProto()
    twin.CopyFrom(next(n for n in model.graph.node if n.name == "pointwise"))
    twin.name, twin.output[0] = "twin", "x4_twin"
    add = onnx.helper.make_node("Add", ["x4", "x4_twin"], ["sum"], "add")
    model.graph.node.insert(5, twin)
    model.graph.node.insert(6, add)
    next(n for n in model.graph.node if n.name == "pool").input[0] = "sum"
    result, _ = convert(model, "int8-trt", max_top1_drop=1.0)
    kinds = [n.op_type for n in result.graph.node]
    assert kinds.count("QuantizeLinear") == 4
    assert kinds.count("DequantizeLinear") == 8


def test_blocks_that_lose_too_much_stay_in_float16(
    convert: Convert, small_graph: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration import judge
    from calibration.sensitivity import Outcome

    culprit = "stages.0.blocks.0"

    def verdict(self: judge.Judge, model: onnx.ModelProto) -> Outcome:
        bad = any(i.name == f"{culprit}.conv.weight_int8" for i in model.graph.initializer)
        return Outcome(0.5 if bad else 1.0, 1.0, 0.5 if bad else 0.01)

    monkeypatch.setattr(judge.Judge, "__call__", verdict)
    monkeypatch.setattr(judge.Judge, "baseline", Outcome(1.0, 1.0, 0.0), raising=False)
    monkeypatch.setattr(judge.Judge, "__init__", lambda self, *a, **k: setattr(self, "count", 1000))
    model, facts = convert(small_graph(), "int8-trt", max_top1_drop=0.003)
    assert facts["sensitivity"]["excluded"] == [culprit]
    assert facts["float16_layers"] == ["depthwise"]
    weights = {i.name for i in model.graph.initializer}
    assert f"{culprit}.conv.weight_float16" in weights
    assert "stem.weight_int8" in weights


@pytest.mark.parametrize("form", STORED)
def test_a_gap_of_the_executor_leaves_blocks_unjudged(
    convert: Convert, small_graph: Small, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    unknown = "GlobalAveragePool"
    assert unknown in [node.op_type for node in small_graph().graph.node]
    monkeypatch.delitem(OPERATORS, unknown)
    model, facts = convert(small_graph(), form)
    assert facts["quantized_layers"] == len(QUANTIZED[form])
    assert facts["sensitivity"] == {"excluded": []}
    assert facts["why_not"].startswith("which blocks lose too much was not measured: node ")
    assert f"operator {unknown}" in facts["why_not"]
    with pytest.raises(UnsupportedOperatorError):
        OnnxExecutor(model)


def test_older_opsets_are_raised(convert: Convert, small_graph: Small) -> None:
    model, _ = convert(small_graph(18), "int8-trt", max_top1_drop=1.0)
    assert model.opset_import[0].version >= 19
    onnx.checker.check_model(model, full_check=True)


def test_tiny_channels_get_a_scale_that_float16_holds(convert: Convert, small_graph: Small) -> None:
    model = small_graph()
    weight = next(i for i in model.graph.initializer if i.name == "stem.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0] *= 1e-4
    weight.CopyFrom(numpy_helper.from_array(values, "stem.weight"))
    result, facts = convert(model, "int8-trt", max_top1_drop=1.0)
    scale = next(i for i in result.graph.initializer if i.name == "stem.weight_scale_float16")
    assert numpy_helper.to_array(scale).min() == 2.0**-14
    assert facts["coarse_channels"] == 1


def test_a_network_that_overflows_is_refused(convert: Convert, small_graph: Small) -> None:
    model = small_graph()
    for name in ("stem.weight", "stages.0.blocks.0.conv.weight"):
        weight = next(i for i in model.graph.initializer if i.name == name)
        values = numpy_helper.to_array(weight) * np.float32(1e30)
        weight.CopyFrom(numpy_helper.from_array(values, name))
    with pytest.raises(DataError):
        convert(model, "int8-trt")


def test_an_unknown_method_is_refused(convert: Convert, small_graph: Small) -> None:
    with pytest.raises(ConfigError, match="unknown calibration method 'guess'; there are min-max"):
        convert(small_graph(), "int8-trt", method="guess")


def test_a_graph_without_layers_is_refused(convert: Convert) -> None:
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Elu", ["image"], ["logits"], "elu")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 8, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(BuildError, match="no convolution or linear layer"):
        convert(model, "int8-trt")
