from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from pipeline.graphs.modules import Parts, with_initializers

Make = Callable[..., ModelProto]


@pytest.fixture
def model(make_model: Make) -> ModelProto:
    """A block with a layer inside of it, and a node of which no module is known."""
    nodes = [
        helper.make_node("Relu", ["image"], ["a"], "start"),
        helper.make_node("Conv", ["a", "w"], ["b"], "/stages/stages.0/blocks/blocks.1/fc/Conv"),
        helper.make_node("Add", ["a", "b"], ["c"], "/stages/stages.0/blocks/blocks.1/Add"),
        helper.make_node("Conv", ["c", "v"], ["logits"], "/head/Conv"),
    ]
    constants = {"w": np.ones((3, 3, 1, 1), np.float32), "v": np.ones((1, 3, 1, 1), np.float32)}
    return make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", 1, 8, 8])


def test_a_modules_own_nodes_are_a_part_apart_from_those_inside_of_it(model: ModelProto) -> None:
    parts = Parts(model)
    assert list(parts.all) == ["start", "stages.0.blocks.1.fc", "stages.0.blocks.1", "head"]
    assert parts.blocks == ["start", "stages.0.blocks.1", "head"]
    assert parts.of_block("stages.0.blocks.1") == ["stages.0.blocks.1.fc", "stages.0.blocks.1"]
    assert parts.total == 64 * 9 + 64 * 3
    assert parts.share(["head", "head", "start"]) == pytest.approx(0.25)
    assert parts.in_order({"head", "start"}) == ["start", "head"]


def test_who_writes_and_reads_a_tensor(model: ModelProto) -> None:
    parts = Parts(model)
    assert parts.of("image") == ""
    assert parts.of("b") == "stages.0.blocks.1.fc"
    assert parts.around("a") == {"start", "stages.0.blocks.1.fc", "stages.0.blocks.1"}
    assert parts.reading("a") == {"stages.0.blocks.1.fc", "stages.0.blocks.1"}
    assert parts.before("c", ()) == {"start", "stages.0.blocks.1.fc"}
    assert parts.before("logits", ("stages.0.blocks.1", "stages.0.blocks.1.fc")) == {"start"}
    assert parts.before("a", ()) == set()


def test_a_graph_without_products_has_no_shares(make_model: Make) -> None:
    node = helper.make_node("Relu", ["image"], ["logits"], "relu")
    parts = Parts(make_model([node], {}, ["batch", 3, 8, 8]))
    assert parts.share(["relu"]) == 0.0


def test_constants_of_nodes_become_initializers_but_for_integers(make_model: Make) -> None:
    half = numpy_helper.from_array(np.array(0.5, np.float32), "")
    shape = numpy_helper.from_array(np.array([-1, 3, 8, 8], np.int64), "")
    nodes = [
        helper.make_node("Constant", [], ["half"], value=half),
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Mul", ["image", "half"], ["x"], "mul"),
        helper.make_node("Reshape", ["x", "shape"], ["logits"], "reshape"),
    ]
    model = make_model(nodes, {}, ["batch", 3, 8, 8])
    changed = with_initializers(model)
    assert [node.op_type for node in changed.graph.node] == ["Constant", "Mul", "Reshape"]
    assert [tensor.name for tensor in changed.graph.initializer] == ["half"]
    assert len(model.graph.initializer) == 0
