from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import BuildError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.ranges import first_failure
from pipeline.graphs import float16
from pipeline.targets.floats import Float16, Float32
from pipeline.targets.forms import Form, FormJob
from pipeline.targets.tensorrt.quantize import Int8Trt

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]
Small = Callable[..., onnx.ModelProto]


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    return types | {i.name: i.data_type for i in graph.initializer}


def model_of(
    nodes: list[onnx.NodeProto], initializers: dict[str, Any], opset: int = 20
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in initializers.items()]
    shape: list[str | int] = ["batch", 2, 4, 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(
    ("form", "expected", "tolerance"),
    [("float16", TensorProto.FLOAT16, 2e-3), ("bfloat16", TensorProto.BFLOAT16, 2e-2)],
)
def test_everything_between_float32_ends_is_half(
    convert: Convert,
    small_graph: Small,
    pictures: np.ndarray,
    form: str,
    expected: int,
    tolerance: float,
) -> None:
    model, facts = convert(small_graph(), form)
    types = types_of(model)
    assert types.pop("logits") == TensorProto.FLOAT
    assert {t for t in types.values() if t != TensorProto.INT64} == {expected}
    assert facts["casts"] == 2
    assert not facts["float32_nodes"]
    onnx.checker.check_model(model, full_check=True)
    exact = OnnxExecutor(small_graph()).run(pictures)
    executor = OnnxExecutor(model, record=True)
    rounded = executor.run(pictures)
    assert rounded.dtype == np.float32
    assert first_failure(executor.overflow_report()) is None
    assert np.abs(rounded - exact).max() < tolerance * np.abs(exact).max()


def test_inputs_and_outputs_keep_names_and_metadata(convert: Convert, small_graph: Small) -> None:
    source = small_graph()
    helper.set_model_props(source, {"labels": "[1]"})
    model, _ = convert(source, "float16")
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert model.metadata_props[0].value == "[1]"


def test_the_smallest_normal_clamp_stays_exact(convert: Convert, small_graph: Small) -> None:
    model, facts = convert(small_graph(), "float16")
    clamp = next(n for n in model.graph.node if n.name == "clamp")
    bound = next(i for i in model.graph.initializer if i.name == clamp.input[1])
    # A clamp with one bound: TensorRT would put float32's largest value in place of the other.
    assert clamp.op_type == "Max"
    assert float(numpy_helper.to_array(bound)) == 2.0**-14
    assert facts["small_constants"] == []


def test_an_epsilon_that_hardware_may_lose_is_named(convert: Convert) -> None:
    nodes = [helper.make_node("Add", ["image", "eps"], ["logits"], "add")]
    _, facts = convert(model_of(nodes, {"eps": np.float32(1e-6)}), "float16")
    assert facts["small_constants"] == ["eps"]


def test_a_constant_beyond_the_range_is_named(convert: Convert) -> None:
    nodes = [helper.make_node("Mul", ["image", "huge"], ["logits"], "mul")]
    with pytest.raises(BuildError, match="'huge' holds 100000, beyond float16"):
        convert(model_of(nodes, {"huge": np.float32(1e5)}), "float16")
    model, _ = convert(model_of(nodes, {"huge": np.float32(1e5)}), "bfloat16")
    assert types_of(model)["logits"] == TensorProto.FLOAT


def test_infinite_constants_stay(convert: Convert) -> None:
    nodes = [helper.make_node("Max", ["image", "never"], ["logits"], "max")]
    model, _ = convert(model_of(nodes, {"never": np.float32(-np.inf)}), "float16")
    assert np.isneginf(numpy_helper.to_array(model.graph.initializer[0]))


def test_what_the_standard_declares_float32_stays(convert: Convert) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    nodes = [
        helper.make_node("Resize", ["image", "", "scales"], ["x"], "resize", mode="nearest"),
        helper.make_node("Elu", ["x"], ["logits"], "elu"),
    ]
    model, _ = convert(model_of(nodes, {"scales": scales}), "float16")
    assert {i.name: i.data_type for i in model.graph.initializer} == {"scales": TensorProto.FLOAT}


def test_an_operator_without_the_type_computes_in_float32(convert: Convert) -> None:
    nodes = [
        helper.make_node("Elu", ["image"], ["x"], "elu"),
        helper.make_node("Einsum", ["x"], ["y"], "einsum", equation="bchw->bcwh"),
        helper.make_node("Einsum", ["y"], ["z"], "again", equation="bcwh->bchw"),
        helper.make_node("Elu", ["z"], ["logits"], "elu2"),
    ]
    model, facts = convert(model_of(nodes, {}), "bfloat16")
    assert facts["float32_nodes"] == ["einsum", "again"]
    assert facts["casts"] == 4  # none between the two
    assert types_of(model)["x"] == TensorProto.BFLOAT16


def test_attributes_take_the_type(convert: Convert) -> None:
    constant = numpy_helper.from_array(np.array(0.5, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["half"], value=constant),
        helper.make_node("Constant", [], ["quarter"], value_float=0.25),
        helper.make_node("Mul", ["image", "half"], ["x"], "mul"),
        helper.make_node("Cast", ["x"], ["y"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["y", "quarter"], ["logits"], "mul2"),
    ]
    model, _ = convert(model_of(nodes, {}), "float16")
    assert set(types_of(model).values()) == {TensorProto.FLOAT16, TensorProto.FLOAT}
    assert types_of(model)["y"] == TensorProto.FLOAT16


def test_kept_nodes_share_one_cast(small_graph: Small) -> None:
    model, facts = float16.to_half(
        small_graph(), float16.FLOAT16, lambda node: node.name in ("elu", "clamp")
    )
    types = types_of(model)
    assert facts.float32_nodes == ["clamp", "elu"]
    assert facts.casts == 6  # image, x0, x1, x2, x3 and the logits: each once
    assert types["x1"] == types["x3"] == TensorProto.FLOAT
    assert types["x2"] == TensorProto.FLOAT16


def test_an_output_that_is_also_read_keeps_its_name(convert: Convert) -> None:
    nodes = [
        helper.make_node("Elu", ["image"], ["logits"], "elu"),
        helper.make_node("Elu", ["logits"], ["unused"], "elu2"),
    ]
    model, _ = convert(model_of(nodes, {}), "float16")
    assert types_of(model)["logits"] == TensorProto.FLOAT
    assert types_of(model)["unused"] == TensorProto.FLOAT16


def test_subgraphs_are_refused(convert: Convert) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["logits"], "if", then_branch=branch, else_branch=branch)
    ]
    with pytest.raises(BuildError, match="'if' \\(If\\) holds a subgraph"):
        convert(model_of(nodes, {"yes": np.array(True)}), "float16")


def test_float32_is_the_source_byte_for_byte(
    convert: Convert, small_graph: Small, tmp_path: Path
) -> None:
    convert(small_graph(), "float32")
    assert (tmp_path / "result.onnx").read_bytes() == (tmp_path / "source.onnx").read_bytes()


@pytest.mark.parametrize("form", [Float32(), Float16(), Int8Trt()], ids=lambda form: form.name)
def test_a_missing_source_is_named(form: Form, tmp_path: Path) -> None:
    from pipeline.core.network import Network

    def never() -> Any:
        raise AssertionError

    job = FormJob(tmp_path / "no.onnx", Network("n", (), (1, 1, 1), {}), {}, never, print)
    with pytest.raises(BuildError, match=r"no\.onnx"):
        form.convert(job, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_conversion_is_deterministic(convert: Convert, small_graph: Small, tmp_path: Path) -> None:
    convert(small_graph(), "float16")
    first = (tmp_path / "result.onnx").read_bytes()
    convert(small_graph(), "float16")
    assert (tmp_path / "result.onnx").read_bytes() == first


def test_three_types_in_one_graph_have_one_cast_between_two() -> None:
    nodes = [
        helper.make_node("Elu", ["image"], ["a"], "half"),
        helper.make_node("Mul", ["a", "k"], ["b"], "brain"),
        helper.make_node("Add", ["a", "k"], ["c"], "brain2"),
        helper.make_node("Sub", ["b", "c"], ["d"], "full"),
        helper.make_node("Mul", ["d", "k"], ["logits"], "half2"),
    ]
    model = model_of(nodes, {"k": np.float32(0.1)})
    chosen = {"brain": float16.BFLOAT16, "brain2": float16.BFLOAT16, "full": None}
    mixed, facts = float16.to_types(
        model,
        lambda node: chosen.get(node.name, float16.FLOAT16),
        (float16.FLOAT16, float16.BFLOAT16),
    )
    types = types_of(mixed)
    assert (types["a"], types["b"], types["c"]) == (
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.BFLOAT16,
    )
    assert types["d"] == types["logits"] == TensorProto.FLOAT
    assert types["k_bfloat16"] == TensorProto.BFLOAT16
    assert types["k_float16"] == TensorProto.FLOAT16
    assert facts.casts == 6  # image, a, b, c, d and the logits
    assert facts.float32_nodes == ["full"]
    images = np.random.default_rng(0).standard_normal((2, 2, 4, 4)).astype(np.float32)
    exact, rounded = OnnxExecutor(model).run(images), OnnxExecutor(mixed).run(images)
    assert np.abs(rounded - exact).max() < 2e-2 * np.abs(exact).max()
