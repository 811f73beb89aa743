"""Preparing a graph for execution: an operator and result types for each node, and what ends there.

Everything here is done once, before any image is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import rounding
from pipeline.emulate.kernels import Rounding
from pipeline.emulate.onnx.graph import Graph, Node
from pipeline.emulate.onnx.operators import OPERATORS, Call, Operator

Accumulate = Literal["float32", "output"]
"""Where running sums of products are rounded; see `pipeline.emulate.onnx.executor`."""

ROUNDED = frozenset({torch.float16, torch.bfloat16}) | rounding.FLOAT8
"""Types whose tensors are held as float32 that is rounded to them."""

_INTEGERS = frozenset({torch.int8, torch.uint8, rounding.INT4, rounding.UINT4})

MOVERS = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"})
"""Operators that move values and compute nothing: a kernel may read what they would move."""


@dataclass(frozen=True, slots=True)
class Step:
    """A node, ready to run.

    Attributes:
        node: The node.
        operator: What runs it.
        call: What its function is told besides its inputs.
        dtypes: Types of its outputs.
        dead: Tensors that nothing reads after this step.
    """

    node: Node
    operator: Operator
    call: Call
    dtypes: tuple[torch.dtype, ...]
    dead: tuple[str, ...]

    def without(self, kept: Sequence[str] | frozenset[str]) -> Step:
        """The same step, after which none of `kept` is dropped."""
        return replace(self, dead=tuple(name for name in self.dead if name not in kept))


def plan(graph: Graph, accumulate: Accumulate) -> tuple[list[Step], dict[str, torch.dtype]]:
    """Look up each node's operator, infer the types of its outputs, and note what it uses last.

    Args:
        graph: The graph.
        accumulate: Where running sums are rounded.

    Returns:
        The steps in order, and the type of every tensor.

    Raises:
        UnsupportedOperatorError: An attribute has a value that is not computed, or a node lacks an
            input that tells its type.
    """
    types = {name: constant.dtype for name, constant in graph.constants.items()}
    types |= {port.name: port.dtype for port in graph.inputs}
    quantized: set[str] = set()
    steps = []
    for node, dead in zip(graph.nodes, _last_uses(graph), strict=True):
        operator = OPERATORS[node.op_type]
        _check_attributes(operator, node)
        dtypes = _result_types(operator, node, types)
        types.update(zip(node.outputs, dtypes, strict=False))
        if _holds_integers(node, types, quantized):
            quantized.update(node.outputs)
        narrow: Rounding | None = None
        narrow_sums = accumulate == "output" and dtypes[0] in ROUNDED
        if narrow_sums and not quantized.issuperset(node.inputs[:2]):
            narrow = partial(rounding.round_to, dtype=dtypes[0])
        steps.append(Step(node, operator, Call(node, dtypes[0], narrow), dtypes, dead))
    return steps, types


def _check_attributes(operator: Operator, node: Node) -> None:
    for name, (computed, remedy) in operator.refuses.items():
        value = node.attribute(name, computed)
        if value != computed:
            raise UnsupportedOperatorError(
                f"node {node.name!r}: operator {node.op_type} of the domain 'ai.onnx' with "
                f"{name}={value} is not known to the reference executor; {remedy}"
            )


def _result_types(
    operator: Operator, node: Node, types: dict[str, torch.dtype]
) -> tuple[torch.dtype, ...]:
    """One type for each output that the operator has; a single one is that of all."""
    result = operator.result(node, [types.get(name) for name in node.inputs])
    return result if isinstance(result, tuple) else (result,) * max(1, len(node.outputs))


def _holds_integers(node: Node, types: dict[str, torch.dtype], quantized: set[str]) -> bool:
    """Whether its result is integers of 8 bits or fewer times a scale.

    The product of two such tensors is summed in 32-bit integers: an engine reads the integers.
    """
    if node.op_type == "DequantizeLinear":
        return types.get(node.inputs[0]) in _INTEGERS
    return node.op_type in MOVERS and node.inputs[0] in quantized


def _last_uses(graph: Graph) -> list[tuple[str, ...]]:
    """For each node the tensors that it is the last to use."""
    alive = {port.name for port in graph.outputs} | {""}
    dead: list[tuple[str, ...]] = []
    for node in reversed(graph.nodes):
        last = [n for n in dict.fromkeys((*node.inputs, *node.outputs)) if n not in alive]
        alive.update(last)
        dead.append(tuple(last))
    return dead[::-1]
