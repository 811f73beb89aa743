"""Sums, splits and joins that float nodes surround stay in float32, and no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from pipeline.graphs.islands import CARRIERS, islands


def node(operator: str, reads: str, writes: str) -> NodeProto:
    return helper.make_node(operator, reads.split(), writes.split(), name=writes.split()[0])


def graph_of(nodes: Sequence[NodeProto], outputs: str = "end") -> GraphProto:
    def told(name: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    constant = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    return helper.make_graph(
        nodes, "g", [told("x")], [told(name) for name in outputs.split()], [constant]
    )


def found(nodes: Sequence[NodeProto], outputs: str = "end") -> set[str]:
    """Names of the islands, where convolutions are in 8 bits."""
    layers = [i for i, each in enumerate(nodes) if each.op_type == "Conv"]
    sums = [i for i, each in enumerate(nodes) if each.op_type in ("Add", "Split", "Concat")]
    return {nodes[index].name for index in islands(graph_of(nodes, outputs), layers, sums)}


ELU = (
    node("Conv", "x w", "q"),
    node("Relu", "q", "above"),
    node("Clip", "q w w", "below"),
    node("Exp", "below", "curve"),
    node("Add", "above curve", "sum"),
    node("Reshape", "sum shape", "shaped"),
    node("Split", "shaped", "k v"),
)


def test_the_sum_of_an_elu_before_products_in_float_is_an_island() -> None:
    assert found([*ELU, node("MatMul", "k v", "end")]) == {"sum", "k"}


def test_the_same_sum_before_layers_is_none() -> None:
    layers = [node("Conv", "k w", "a"), node("Conv", "v w", "b"), node("Mul", "a b", "end")]
    assert found([*ELU, *layers]) == set()


def test_a_shortcut_is_none() -> None:
    nodes = [node("Conv", "x w", "a"), node("Conv", "a w", "b"), node("Add", "a b", "sum")]
    assert found([*nodes, node("Conv", "sum w", "end")]) == set()
    # The last of a network, too: one conversion behind the sum, two before it.
    assert found([*nodes, node("Softmax", "sum", "end")]) == set()
    assert found([*nodes, node("Softmax", "sum", "end")], "end sum") == set()


@pytest.mark.parametrize("carrier", sorted(CARRIERS))
def test_carriers_are_looked_through_before_and_behind(carrier: str) -> None:
    nodes = [
        node("Conv", "x w", "a"),
        node("Conv", "a w", "b"),
        node(carrier, "a", "before"),
        node(carrier, "before", "carried"),
        node("Exp", "a", "curve"),
        node("Add", "carried curve", "sum"),
        node(carrier, "sum", "once"),
        node(carrier, "once", "twice"),
    ]
    # The curve is converted in 8 bits, the sum in float.
    assert found([*nodes, node("Conv", "twice w", "end")]) == set()
    assert found([*nodes, node("Exp", "twice", "end")]) == {"sum"}
    # Behind an operator in float the same needs a conversion for each term.
    curves = [node("Exp", "a", "carried"), node("Exp", "b", "c"), node("Add", "carried c", "sum")]
    assert found([*nodes[:2], *curves, node("Exp", "sum", "end")]) == {"sum"}


def test_a_term_that_float_reads_anyway_is_no_conversion_more() -> None:
    """In float the sum reads what was converted for `Exp`; in 8 bits its result is converted."""
    nodes = [node("Conv", "x w", "a"), node("Exp", "a", "c"), node("Add", "a c", "sum")]
    assert found([*nodes, node("Softmax", "sum", "end")]) == {"sum"}
    # One conversion in either: 8 bits stay.
    assert found([*nodes, node("Conv", "sum w", "end")]) == set()
    # Without the other reader in float, one each.
    others = [node("Conv", "x w", "a"), node("Conv", "x w", "b"), node("Add", "a b", "sum")]
    assert found([*others, node("Softmax", "sum", "end")]) == set()


def test_sums_that_read_one_another_are_counted_together() -> None:
    """Each shortcut of a transformer is read by a norm in float and by the next shortcut."""
    nodes = [node("Conv", "x w", "t0")]
    for i in range(3):
        nodes += [node("LayerNormalization", f"t{i} w", f"n{i}"), node("Conv", f"n{i} w", f"f{i}"),
                  node("Add", f"t{i} f{i}", f"t{i + 1}")]  # fmt: skip
    # Each result is converted for a norm: three in 8 bits; each term is converted: three in float.
    last = node("LayerNormalization", "t3 w", "end")
    assert found([*nodes, last]) == set()
    # One more reader in float of what a layer wrote, and float needs one fewer.
    assert found([*nodes, node("Exp", "f0", "e"), node("Mul", "e t3", "end")]) == {"t1", "t2", "t3"}


def test_an_input_and_an_output_of_the_graph_are_in_float() -> None:
    assert found([node("Concat", "x x", "end")]) == {"end"}
    assert found([node("Concat", "x w", "c"), node("Conv", "c w", "end")]) == set()
    nodes = [node("Conv", "x w", "a"), node("Split", "a", "b c")]
    assert found([*nodes, node("Conv", "b w", "end")], "end c") == set()
    assert found(nodes, "b c") == {"b"}, "two are converted where one would do"
