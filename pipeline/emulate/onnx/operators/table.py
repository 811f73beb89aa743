"""The table of operators, and how to enter one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.onnx.graph import Node

T = TypeVar("T")

DTypes = torch.dtype | tuple[torch.dtype, ...]
"""The type of all outputs, or one for each."""

ResultType = Callable[[Node, Sequence[torch.dtype | None]], DTypes]
"""Tells the types of a node's outputs from the node and the types of its inputs."""


@dataclass(frozen=True, slots=True)
class Call:
    """What an operator's function is told besides its inputs.

    Attributes:
        node: The node.
        dtype: Type of the first result.
        partial: Rounds running sums; None where they stay float32.
    """

    node: Node
    dtype: torch.dtype
    partial: kernels.Rounding | None

    def attribute(self, name: str, default: T) -> T:
        """The node's attribute, or `default` where it does not have it."""
        return self.node.attribute(name, default)


Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Operator:
    """An entry of the table.

    Attributes:
        function: Computes the outputs.
        result: Tells their types.
        exact: The result needs no rounding: it holds values of the inputs, or integers.
        quantizes: The result is on a quantized scale, of which saturation is worth knowing.
        refuses: For attributes of which one value alone is computed: that value, which is the
            default too, and what to do instead.
    """

    function: Function
    result: ResultType
    exact: bool
    quantizes: bool
    refuses: Mapping[str, tuple[object, str]]


OPERATORS: dict[str, Operator] = {}
"""Operators of the standard domain by name."""


def like(index: int) -> Callable[[Node, Sequence[torch.dtype | None]], torch.dtype]:
    """The result has the type of the input `index`."""

    def result(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
        dtype = types[index] if index < len(types) else None
        if dtype is None:
            raise UnsupportedOperatorError(
                f"node {node.name!r}: operator {node.op_type} of the domain 'ai.onnx' lacks its "
                f"input {index}; the graph is not valid, export it again"
            )
        return dtype

    return result


def fixed(dtype: torch.dtype) -> ResultType:
    """The result always has the type `dtype`."""
    return lambda node, types: dtype


def operator(
    *names: str,
    result: ResultType | None = None,
    exact: bool = False,
    quantizes: bool = False,
    refuses: Mapping[str, tuple[object, str]] | None = None,
) -> Callable[[Function], Function]:
    """Enter a function into the table.

    Args:
        names: The operators that it computes.
        result: Tells the types of the outputs; that of the first input by default.
        exact: See `Operator`.
        quantizes: See `Operator`.
        refuses: See `Operator`.
    """

    def register(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = Operator(function, result or like(0), exact, quantizes, refuses or {})
        return function

    return register


def ints(given: Tensor | None, default: Sequence[int]) -> list[int]:
    """The integers of an input, or `default` where it is left out."""
    return list(default) if given is None else [int(n) for n in given.reshape(-1).tolist()]
