"""Any nodes of a graph run alone, and compute what they computed in it."""

from __future__ import annotations

import io
import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.graphs import float16
from pipeline.graphs.parts import Part, Recording, simpler, times_batch

IMAGES = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)


def model() -> onnx.ModelProto:
    """A product of a tensor and its transpose, flattened by a shape that nodes compute."""
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["image", "weight"], ["product"], "product"),
        helper.make_node("Transpose", ["product"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["product", "turned"], ["square"], "square"),
        helper.make_node("Shape", ["image"], ["batch"], "shape", end=1),
        helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(np.array([16]))),
        helper.make_node("Concat", ["batch", "rest"], ["flat"], "flat", axis=0),
        helper.make_node("Reshape", ["square", "flat"], ["row"], "row"),
        helper.make_node("Relu", ["row"], ["logits"], "relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "square",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(part: Part) -> dict[str, np.ndarray]:
    return GraphExecutor(part.model).evaluate(part.feeds)


def test_every_part_computes_what_its_nodes_compute() -> None:
    recorded = Recording(model(), {"image": IMAGES})
    assert len(recorded) == 7, "the constant is no node any more"
    whole = {
        name: value
        for node, written in GraphExecutor(model()).trace({"image": IMAGES})
        for name, value in written.items()
    }
    tried = 0
    for size in range(1, 8):
        for nodes in itertools.combinations(range(7), size):
            part = recorded.part(nodes)
            if part is None:
                continue
            tried += 1
            onnx.checker.check_model(part.model, full_check=True)
            assert part.nodes == size
            for name, value in run(part).items():
                np.testing.assert_array_equal(value, whole[name])
    assert tried > 100


def test_shapes_that_nodes_compute_become_constants() -> None:
    part = Recording(model(), {"image": IMAGES}).part([5])
    assert part is not None
    assert [value.name for value in part.model.graph.input] == ["square"]
    assert [tensor.name for tensor in part.model.graph.initializer] == ["flat"]
    assert run(part)["row"].shape == (2, 16)


def test_nodes_that_read_constants_alone_are_no_part() -> None:
    assert Recording(model(), {"image": IMAGES}).part([4]) is None
    assert Recording(model(), {"image": IMAGES}).part([]) is None


def test_a_tensor_that_is_read_inside_is_an_output_only_of_the_whole_graph() -> None:
    both = model()
    both.graph.output.append(helper.make_tensor_value_info("square", TensorProto.FLOAT, None))
    part = Recording(both, {"image": IMAGES}).part([1, 2, 5])
    assert part is not None
    assert [value.name for value in part.model.graph.output] == ["square", "row"]


@pytest.mark.parametrize("kind", [float16.FLOAT16, float16.BFLOAT16])
def test_parts_of_sixteen_bits(kind: float16.HalfType) -> None:
    half, _ = float16.to_half(model(), kind)
    recorded = Recording(half, {"image": IMAGES})
    names = [node.name for node in half.graph.node if node.op_type != "Constant"]
    part = recorded.part([names.index("square")])
    assert part is not None
    assert {value.type.tensor_type.elem_type for value in part.model.graph.input} == {kind.onnx}
    with np.load(io.BytesIO(part.arrays())) as arrays:
        assert set(arrays) == {"product", "turned"}
        given = {name: arrays[name] for name in arrays}
    assert all(value.dtype == np.float32 for value in given.values())
    found = GraphExecutor(part.model).evaluate(given)["square"]
    np.testing.assert_array_equal(found, run(part)["square"])


def test_names_of_tensors_are_no_keywords() -> None:
    feeds = {"file": np.ones(2, np.float32), "/a/b.c": np.zeros(3, np.float32)}
    part = Part(model(), feeds, {"file": np.full(1, 3.0, np.float32)})
    with np.load(io.BytesIO(part.arrays())) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {
            "file": [1, 1],
            "/a/b.c": [0, 0, 0],
            "expected/file": [3],
        }
    assert part.arrays() == part.arrays()


def test_a_graph_without_inputs_gets_one_in_the_place_of_a_constant() -> None:
    part = Recording(model(), {"image": IMAGES}).part([0])
    assert part is not None
    assert (("MatMul",), ("weight",)) in ways(part)


def ways(part: Part) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Operators and inputs of all simpler graphs."""
    return {
        (tuple(n.op_type for n in m.graph.node), tuple(v.name for v in m.graph.input))
        for m, _ in simpler(part)
    }


def test_simpler_graphs() -> None:
    part = Recording(model(), {"image": IMAGES}).part([1, 2])
    assert part is not None
    found = ways(part)
    assert (("MatMul",), ("product",)) in found, "turned as a constant, or bypassed"
    assert (("Transpose",), ("product",)) in found, "the product is bypassed"
    whole = Recording(model(), {"image": IMAGES}).part([2])
    assert whole is not None
    assert whole.size == (1, 2, 0)
    assert (("MatMul",), ("product",)) in ways(whole), "one input in the place of the other"
    assert (("MatMul",), ("turned",)) in ways(whole)


def test_a_node_of_many_inputs_takes_one_less() -> None:
    graph = helper.make_graph(
        [helper.make_node("Concat", ["a", "b", "b"], ["c"], "join", axis=0)],
        "join",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [6])],
    )
    joined = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    part = Recording(joined, {name: np.ones(2, np.float32) for name in "ab"}).part([0])
    assert part is not None
    read = [tuple(n.input) for m, _ in simpler(part) for n in m.graph.node]
    assert {("b", "b"), ("a", "b")} <= set(read)


def test_parts_with_an_open_batch_compute_shapes_that_grow_with_it() -> None:
    more = np.concatenate([IMAGES, IMAGES[:1]])
    recorded = Recording(model(), {"image": IMAGES}, other={"image": more})
    part = recorded.part([5])  # the Reshape
    assert part is not None
    assert [node.op_type for node in part.model.graph.node] == ["Shape", "Concat", "Reshape"]
    sides = {
        port.name: [side.dim_param or side.dim_value for side in port.type.tensor_type.shape.dim]
        for port in part.model.graph.input
    }
    assert sides == {"image": ["batch", 4, 4], "square": ["batch", 4, 4]}
    assert run(part)["row"].shape == (2, 16)
    square = np.ones((7, 4, 4), np.float32)
    wider = {"image": np.ones((7, 4, 4), np.float32), "square": square}
    assert GraphExecutor(part.model).evaluate(wider)["row"].shape == (7, 16)


def test_axes_that_are_several_times_the_batch() -> None:
    merged = model()
    merged.graph.node[4].attribute[0].t.CopyFrom(numpy_helper.from_array(np.array([-1, 4])))
    merged.graph.node[5].input[:] = ["rest"]
    del merged.graph.node[3]
    more = np.concatenate([IMAGES, IMAGES[:1]])
    recorded = Recording(merged, {"image": IMAGES}, other={"image": more})
    part = recorded.part([len(recorded) - 1])  # the Relu
    assert part is not None
    (port,) = part.model.graph.input
    assert [s.dim_param or s.dim_value for s in port.type.tensor_type.shape.dim] == ["4*batch", 4]
    sides = ("batch", "4*batch", "n", "", "n*batch")
    assert [times_batch(side) for side in sides] == [1, 4, 0, 0, 0]
