"""The search for the smallest part that fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.emulate.layers import jump
from pipeline.emulate.onnx.layers import Comparison
from pipeline.graphs import float16
from pipeline.graphs.parts import Part, Recording
from pipeline.graphs.reduce import Reduced, jumps, reduce, refused_alike
from pipeline.targets.refusals import signature

IMAGES = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)


def chain(length: int = 40) -> onnx.ModelProto:
    """Nodes one after the other, of which some also read one far before."""
    nodes, names = [], ["image"]
    for i in range(length):
        kind = "Add" if i % 5 == 4 else "Tanh"
        read = [names[-1], names[-4]] if kind == "Add" else [names[-1]]
        nodes.append(helper.make_node(kind, read, [f"t{i}"], f"n{i}"))
        names.append(f"t{i}")
    shape = [1, 4]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def names(part: Part) -> list[str]:
    return [node.name for node in part.model.graph.node]


def holds(*wanted: str) -> Callable[[Part], bool]:
    return lambda part: set(wanted) <= set(names(part))


def search(fails: Callable[[Part], bool], *, seconds: float = 60, anyhow: bool = False) -> Reduced:
    recorded = Recording(chain(), {"image": IMAGES})
    found = reduce(recorded, fails, seconds=seconds, say=lambda line: None, anyhow=anyhow)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "wanted", [("n0",), ("n39",), ("n17",), ("n3", "n36"), ("n4", "n20", "n21", "n33")]
)
def test_exactly_the_nodes_that_fail_together_are_left(wanted: tuple[str, ...]) -> None:
    found = search(holds(*wanted))
    assert names(found.part) == list(wanted)
    assert found.minimal


def test_a_search_takes_the_same_way_every_time() -> None:
    def noted(seen: list[list[str]]) -> Callable[[Part], bool]:
        def fails(part: Part) -> bool:
            seen.append(names(part))
            return holds("n4", "n33")(part)

        return fails

    first: list[list[str]] = []
    second: list[list[str]] = []
    one, two = search(noted(first)), search(noted(second))
    assert first == second
    assert one.part.model == two.part.model
    assert one.tries == len(first) < 60, "few of the 40 nodes are tried by themselves"


def test_what_does_not_fail_is_not_reduced() -> None:
    recorded = Recording(chain(), {"image": IMAGES})
    say: list[str] = []
    found = reduce(recorded, lambda part: False, seconds=60, say=say.append)
    assert (found, say) == (None, [])


def test_where_time_runs_out_the_smallest_so_far_is_told() -> None:
    found = search(holds("n3"), seconds=-1)
    assert (found.part.nodes, found.tries, found.minimal) == (40, 1, False)


def test_progress_is_told() -> None:
    lines: list[str] = []
    recorded = Recording(chain(), {"image": IMAGES})
    reduce(recorded, holds("n7", "n10"), seconds=60, say=lines.append)
    assert lines[0] == "try 1: 40 nodes with 1 inputs fail"
    assert lines[-1].endswith("2 nodes with 2 inputs fail")


def test_what_lies_between_is_bypassed_only_if_values_do_not_matter() -> None:
    """A builder that dies of an addition whose operand another addition makes."""

    def fails(part: Part) -> bool:
        made = {node.output[0] for node in part.model.graph.node if node.op_type == "Add"}
        maker = {node.output[0]: node for node in part.model.graph.node}

        def depends(name: str) -> bool:
            return name in made or any(depends(n) for n in getattr(maker.get(name), "input", ()))

        return any(node.op_type == "Add" and depends(node.input[0]) for node in maker.values())

    assert [n.op_type for n in search(fails).part.model.graph.node] == ["Add", *4 * ["Tanh"], "Add"]
    found = search(fails, anyhow=True).part
    assert [node.op_type for node in found.model.graph.node] == ["Add", "Add"]
    assert found.size[:2] == (2, 1), "one input is read where others were"


def test_a_refusal_for_another_reason_is_no_smaller_case() -> None:
    def refusal(part: Part) -> str | None:
        if {"n5", "n30"} <= set(names(part)):
            return f"CHECK(0) failed in '{names(part)[0]}' of /tmp/x{part.nodes}.onnx"
        return "node 'n5': not supported" if "n5" in names(part) else None

    first = "CHECK(0) failed in 'n0' of /tmp/x40.onnx"
    found = search(refused_alike(refusal, lambda said: signature(said) == signature(first)))
    assert names(found.part) == ["n5", "n30"]


def test_what_of_a_message_tells_failures_apart() -> None:
    one = signature("TensorRT 1.7 cannot build /a/b.onnx: {ForeignNode[x]}: kqv.cpp:19: CHECK(0)")
    two = signature("TensorRT 1.7 cannot build /c.onnx: {ForeignNode[y.z]}: kqv.cpp:7: CHECK(0)")
    assert one == two
    assert one != signature("TensorRT 1.7 cannot build /a/b.onnx: {ForeignNode[x]}: utils.cpp:19")


def overflowing() -> onnx.ModelProto:
    """The square of a large tensor, in the middle of other products."""
    rng = np.random.default_rng(2)

    def weight(name: str, scale: float = 1.0) -> TensorProto:
        return numpy_helper.from_array((scale * rng.random((4, 4))).astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["image", "w0"], ["a"], "grow"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Mul", ["b", "b"], ["c"], "square"),
        helper.make_node("MatMul", ["c", "w1"], ["d"], "shrink"),
        helper.make_node("Tanh", ["d"], ["logits"], "tanh"),
    ]
    graph = helper.make_graph(
        nodes,
        "overflowing",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [weight("w0", 500.0), weight("w1", 1e-5)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_layer_that_overflows_is_left_alone_with_its_operands() -> None:
    reference = overflowing()
    built, _ = float16.to_half(reference, float16.FLOAT16)
    images = np.abs(IMAGES)
    comparison = Comparison(built, reference)
    first = jump(comparison.errors(images))
    assert first is not None
    assert (first.tensor, first.operation) == ("c", "Mul")
    recorded = Recording(built, {"image": images}, Comparison(built, reference), "c")
    found = reduce(recorded, jumps("c", 0.5), seconds=60, say=lambda line: None)
    assert found is not None
    assert names(found.part) == ["square"]
    assert set(found.part.expected) == {"c"}
    assert np.isfinite(found.part.expected["c"]).all()
    assert found.part.expected["c"].max() > 65504
    assert 0 < found.part.feeds["b"].max() < 65504


def test_what_follows_a_layer_at_fault_reads_the_references_values() -> None:
    reference = overflowing()
    built, _ = float16.to_half(reference, float16.FLOAT16)
    recorded = Recording(built, {"image": np.abs(IMAGES)}, Comparison(built, reference))
    kinds = [node.name for node in built.graph.node]
    part = recorded.part([kinds.index("tanh")])
    assert part is not None
    assert np.isfinite(part.feeds["d"]).all()


def test_no_number_is_a_jump() -> None:
    graph = helper.make_graph(
        [helper.make_node("Sqrt", ["image"], ["root"], "root")],
        "root",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("root", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    right = np.ones((1, 4), np.float32)
    assert jumps("root", 0.5)(Part(model, {"image": -right}, {"root": right}))
    assert not jumps("root", 0.5)(Part(model, {"image": right}, {"root": right}))
    assert not jumps("root", 0.5)(Part(model, {"image": -right}, {}))
