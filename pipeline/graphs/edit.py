"""Small helpers over `onnx_ir` that the passes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

INTERNAL = "pipeline.internal"
"""Domain of operators that exist only between two passes."""

RANK_2D = 4
"""Rank of (batch, channels, height, width)."""


class Editor:
    """Inserts nodes and constants before one node of a graph, with names that are free.

    Args:
        node: Where to insert.
        prefix: Of the names; the node's first output names the rest.
    """

    def __init__(self, node: ir.Node, prefix: str) -> None:
        assert node.graph is not None
        assert isinstance(node.graph, ir.Graph)
        self.graph = node.graph
        self.place = node
        self.stem = f"{node.outputs[0].name}/{prefix}"
        self._count = 0

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        like: ir.Value | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Insert a node and return its first output.

        Args:
            operator: Its operator.
            inputs: Its inputs; None for one that is left out.
            attributes: Its attributes.
            domain: The operator's domain.
            like: A value of the same type and shape as the first output, if there is one.
            outputs: How many outputs it has.
        """
        node = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs)
        for output in node.outputs:
            output.name = self._name(operator)
        if like is not None:
            node.outputs[0].shape = like.shape.copy() if like.shape is not None else None
            node.outputs[0].type = like.type
        node.name = node.outputs[0].name
        self.place.prepend(node)
        return node.outputs[0]

    def constant(self, array: Array, source: ir.Value | None = None) -> ir.Value:
        """Add an initializer.

        Args:
            array: Its content.
            source: The weight that it was made from, if there is one: its name says to which part
                of the network the new one belongs.
        """
        name = self._name("constant")
        if source is not None:
            name = f"{source.name}/{name}"
        value = ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        value.shape = ir.Shape(array.shape)
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def _name(self, operator: str) -> str:
        self._count += 1
        return f"{self.stem}/{operator}{self._count}"


def constant(value: ir.Value | None) -> Array | None:
    """The content of a constant, or None if the value is none."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_scalar(value: ir.Value | None, number: float | None = None) -> bool:
    """The value is a constant of one element: `number`, if that is given."""
    array = constant(value)
    if array is None or array.size != 1:
        return False
    return number is None or bool(array.reshape(()) == np.asarray(number, array.dtype))


def only_use(value: ir.Value) -> bool:
    """The value goes to one node alone, and is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def producer(value: ir.Value | None, operator: str, domain: str = "") -> ir.Node | None:
    """The node that makes the value, if it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_identifier() == (domain, operator, "") else None


def sides(value: ir.Value | None) -> list[int | None] | None:
    """The value's shape, with None for a side that is not fixed; None without a known rank."""
    if value is None or value.shape is None:
        return None
    return [side if isinstance(side, int) else None for side in value.shape]


def integers(node: ir.Node, attribute: str, default: Sequence[int]) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    found = node.attributes.get(attribute)
    return tuple(default) if found is None else tuple(found.as_ints())


def integer(node: ir.Node, attribute: str, default: int) -> int:
    """An attribute that is an integer."""
    found = node.attributes.get(attribute)
    return default if found is None else found.as_int()


def is_depthwise(conv: ir.Node) -> bool:
    """The convolution has constant weights and one filter for every channel."""
    weight = constant(conv.inputs[1])
    return (
        weight is not None
        and weight.ndim == RANK_2D
        and weight.shape[1] == 1
        and integer(conv, "group", 1) == weight.shape[0]
    )


def replace(node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place of the node's only output, and remove the node."""
    old = node.outputs[0]
    value.shape = value.shape if value.shape is not None else old.shape
    value.type = value.type if value.type is not None else old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
