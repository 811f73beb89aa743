from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate import rounding
from pipeline.emulate.onnx.graph import block_of, load_graph, to_constant

MakeModel = Callable[..., onnx.ModelProto]
WEIGHT = np.ones((2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("elem_type", "dtype"),
    [
        (TensorProto.FLOAT, torch.float32),
        (TensorProto.DOUBLE, torch.float64),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.BFLOAT16, torch.bfloat16),
        (TensorProto.FLOAT8E4M3FN, torch.float8_e4m3fn),
        (TensorProto.FLOAT8E5M2, torch.float8_e5m2),
        (TensorProto.INT4, rounding.INT4),
        (TensorProto.UINT4, rounding.UINT4),
        (TensorProto.INT8, torch.int8),
        (TensorProto.UINT16, torch.uint16),
        (TensorProto.INT64, torch.int64),
        (TensorProto.BOOL, torch.bool),
    ],
)
def test_constants_of_every_type(elem_type: int, dtype: torch.dtype) -> None:
    constant = to_constant(helper.make_tensor("t", elem_type, [3], [0, 1, 1]))
    assert constant.dtype == dtype
    assert constant.value.dtype == rounding.storage(dtype)
    assert constant.value.tolist() == [0, 1, 1]


def test_scalar_constants_stay_scalars() -> None:
    assert to_constant(helper.make_tensor("t", TensorProto.INT64, [], [5])).value.shape == ()


def test_strings_are_refused() -> None:
    tensor = onnx.TensorProto(name="t", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    with pytest.raises(ArtifactError, match="'t' has the type STRING"):
        to_constant(tensor)


def test_nodes_are_put_in_order(make_model: MakeModel) -> None:
    model = make_model("a = Relu(x) b = Exp(a) y = Neg(b)", (2, 2))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    assert [node.op_type for node in load_graph(model).nodes] == ["Relu", "Exp", "Neg"]


def test_ports_and_attributes(make_model: MakeModel) -> None:
    graph = load_graph(make_model('y = Gelu<approximate="tanh">(x)', ("N", 3)))
    assert graph.inputs[0].shape == (None, 3)
    assert graph.inputs[0].dtype == torch.float32
    assert graph.nodes[0].attribute("approximate", "none") == "tanh"
    assert graph.nodes[0].attribute("absent", 7) == 7
    assert graph.nodes[0].name == "y"  # named by its output


def test_local_functions_are_inlined(make_model: MakeModel) -> None:
    function = '<domain: "local", opset_import: ["" : 20]> Twice (a) => (b) { b = Add(a, a) }'
    model = make_model("t = local.Twice(x) y = Relu(t)", (2, 2), functions=function)
    assert [node.op_type for node in load_graph(model).nodes] == ["Add", "Relu"]


def test_module_from_the_exporters_metadata(make_model: MakeModel) -> None:
    model = make_model("y = MatMul(x, w)", (2, 2), {"w": WEIGHT})
    scopes = "['', 'stages', 'stages.2.blocks.1', 'stages.2.blocks.1.attn', 'matmul_4']"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    node = load_graph(model).nodes[0]
    assert node.module == "stages.2.blocks.1.attn"
    assert node.block == "stages.2.blocks.1"


def test_operations_outside_of_modules_have_no_module(make_model: MakeModel) -> None:
    model = make_model("y = Relu(x)", (2, 2))
    scopes = "['', '_empty_nn_module_stack_from_metadata_hook', 'relu']"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    node = load_graph(model).nodes[0]
    assert (node.module, node.block) == ("", "")


@pytest.mark.parametrize("scopes", ["['a'", "7", "[" * 500 + "]" * 500, "a.b()"])
def test_names_of_modules_that_somebody_else_wrote_say_nothing(
    make_model: MakeModel, scopes: str
) -> None:
    model = make_model("y = Relu(x)", (1,))
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert load_graph(model).nodes[0].module == ""


def test_module_from_a_traced_name(make_model: MakeModel) -> None:
    model = make_model("y = Relu(x)", (2, 2))
    model.graph.node[0].name = "/stages/stages.2/blocks/blocks.0/act/Relu"
    assert load_graph(model).nodes[0].module == "stages.2.blocks.0.act"


def test_module_from_weights_and_from_the_predecessor(make_model: MakeModel) -> None:
    model = make_model("a = MatMul(x, w) y = Relu(a)", (2, 2), {"w": WEIGHT})
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "stages.0.blocks.3.fc.weight"
    nodes = load_graph(model).nodes
    assert [node.module for node in nodes] == ["stages.0.blocks.3.fc"] * 2


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("stages.2.blocks.0.token_mixer.qk", "stages.2.blocks.0"),
        ("stages.1.downsample.0", "stages.1.downsample"),
        ("layers.1.blocks.2.mlp", "layers.1.blocks.2"),
        ("blocks.2.0.pw_exp.bn.act", "blocks.2.0"),
        ("layer1.1.act2", "layer1.1"),
        ("stem.1", "stem.1"),
        ("head.fc", "head"),
        ("", ""),
    ],
)
def test_block_of(module: str, block: str) -> None:
    assert block_of(module) == block


def test_foreign_domain(make_model: MakeModel) -> None:
    model = make_model("y = Relu(x)", (2, 2))
    model.graph.node[0].domain = "com.microsoft"
    model.graph.node[0].op_type = "FusedConv"
    with pytest.raises(UnsupportedOperatorError, match=r"'y'.*FusedConv.*'com\.microsoft'"):
        load_graph(model)


def test_control_flow(make_model: MakeModel) -> None:
    branch = helper.make_graph([], "empty", [], [])
    model = make_model("y = Relu(x)", (2, 2))
    model.graph.node[0].op_type = "If"
    model.graph.node[0].attribute.append(helper.make_attribute("then_branch", branch))
    with pytest.raises(UnsupportedOperatorError, match=r"'y'.*If.*subgraph"):
        load_graph(model)


def test_a_tensor_that_nothing_writes(make_model: MakeModel) -> None:
    model = make_model("y = Add(x, b)", (2, 2))
    with pytest.raises(ArtifactError, match="'y' reads the tensor 'b'"):
        load_graph(model)


def test_sparse_constants(make_model: MakeModel) -> None:
    model = make_model("c = Constant<value_float=1.0>() y = Add(x, c)", (2, 2))
    model.graph.node[0].attribute[0].name = "value_string"
    with pytest.raises(UnsupportedOperatorError, match=r"'c'.*'value_string'"):
        load_graph(model)


def test_old_opset(make_model: MakeModel) -> None:
    with pytest.raises(ArtifactError, match=r"opset 11.*needs opset 13"):
        load_graph(make_model("y = Softmax(x)", (2, 2), opset=11))


def test_files_that_are_no_models(tmp_path: Path, make_model: MakeModel) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ArtifactError, match=r"cannot read .*No such file"):
        load_graph(path)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="holds no graph"):
        load_graph(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="damaged"):
        load_graph(path)
    whole = make_model("y = MatMul(x, w)", (2, 2), {"w": WEIGHT}).SerializeToString()
    path.write_bytes(whole[:-20])
    with pytest.raises(ArtifactError, match="damaged"):
        load_graph(path)
    path.write_bytes(whole)
    assert len(load_graph(path).nodes) == 1
