"""The module that a node comes from outlives the tools that rewrite graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.emulate.onnx.graph import load_graph
from pipeline.graphs import float16
from pipeline.graphs.metadata import carry_metadata
from pipeline.stages.export import KEPT_METADATA
from pipeline.stages.simplify import simplify_apart


def attention() -> onnx.ModelProto:
    """A product without weights in a block, behind a convolution of another module."""
    nodes = [
        helper.make_node("Conv", ["image", "stages.0.downsample.weight"], ["x"], "conv"),
        helper.make_node("MatMul", ["x", "x"], ["y"], "product"),
        helper.make_node("Identity", ["y"], ["z"], "nothing"),
        helper.make_node("GlobalAveragePool", ["z"], ["logits"], "pool"),
    ]
    nodes[1].metadata_props.add(
        key=KEPT_METADATA, value="['', 'stages.0', 'stages.0.blocks.0', 'matmul']"
    )
    shape: list[str | int] = ["batch", 3, 4, 4]
    weight = np.ones((3, 3, 1, 1), np.float32)
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 1, 1])],
        [numpy_helper.from_array(weight, "stages.0.downsample.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def block_of_the_product(model: onnx.ModelProto | Path) -> str:
    return next(node.block for node in load_graph(model).nodes if node.op_type == "MatMul")


def test_simplification_keeps_the_blocks(tmp_path: Path) -> None:
    source, result = tmp_path / "source.onnx", tmp_path / "result.onnx"
    onnx.save(attention(), source)
    assert simplify_apart(source, result, 60) is None
    assert len(onnx.load(result).graph.node) == 3  # something was done
    assert block_of_the_product(result) == "stages.0.blocks.0"


def test_a_newer_opset_keeps_the_blocks() -> None:
    raised = float16.raise_opset(attention(), 22)
    assert block_of_the_product(raised) == "stages.0.blocks.0"


def test_metadata_that_is_there_stays() -> None:
    source, result = attention(), attention()
    result.graph.node[1].metadata_props[0].value = "['', 'stages.9', 'matmul']"
    carry_metadata(source, result)
    assert [p.value for p in result.graph.node[1].metadata_props] == ["['', 'stages.9', 'matmul']"]
    assert not result.graph.node[0].metadata_props
