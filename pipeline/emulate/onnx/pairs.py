"""Quantization whose result is dequantized at once, in half as many passes over memory.

Between the two nodes lie whole numbers of 8 bits. As float32 counted from `ORIGIN` they are rounded
by the addition that puts them there, and leave it by the multiplication with their scale, which a
CPU fuses with an addition. What that gives is compared once with the plain form, for every value
in half precision and for every position: where any differs, there is no pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.emulate import rounding
from pipeline.emulate.onnx.plan import Step

ORIGIN = 1.5 * 2**23
"""A number below 2^22 that is added to it has no bits left for a fraction: it is rounded."""

_ORIGIN = torch.tensor(ORIGIN)
_LIMITED = 300.0
"""Positions that are told from each other: farther ones are beyond 8 bits."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A node that quantizes, and the only reader of its result, which dequantizes.

    Attributes:
        quantized: The tensor between them.
        scale: Size of a step.
        inverse: By what values are multiplied for their position; None where that gives another
            position than the division for some value.
        bounds: The smallest and the largest position.
    """

    quantized: str
    scale: float
    inverse: float | None
    bounds: tuple[float, float]

    def positions(self, x: Tensor) -> Tensor:
        """Positions of values in half precision, from `ORIGIN`; wrong beyond 2^21 of them."""
        return _positions(x, self.scale, self.inverse)

    def values(self, positions: Tensor) -> Tensor:
        """What positions from `ORIGIN` stand for, in their memory."""
        return _values(positions, self.scale)


def pairs_of(
    steps: Sequence[Step],
    types: Mapping[str, torch.dtype],
    constants: Mapping[str, Tensor],
    outputs: frozenset[str],
) -> dict[str, Pair]:
    """Pairs whose short form gives what the plain one does.

    Args:
        steps: What runs.
        types: Type of every tensor.
        constants: Values that are known.
        outputs: The graph's outputs.

    Returns:
        By the names of both nodes' outputs.
    """
    found: dict[str, Pair] = {}
    for first, second in _neighbours(steps):
        name, scale = first.node.outputs[0], _scale(first, constants)
        fits = types.get(first.node.inputs[0]) == second.dtypes[0] == torch.float16
        narrow = first.dtypes[0] in (torch.int8, torch.uint8)
        if fits and narrow and name not in outputs and scale == _scale(second, constants) != 0:
            known, inverse = _inverse(scale)
            if known:
                pair = Pair(name, scale, inverse, rounding.bounds(first.dtypes[0]))
                found |= {name: pair, second.node.outputs[0]: pair}
    return found


def _neighbours(steps: Sequence[Step]) -> Iterator[tuple[Step, Step]]:
    """Nodes that quantize, and the one that dequantizes, where nothing else reads the result."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.node.inputs:
            readers.setdefault(name, []).append(step)
    for step in steps:
        if step.node.op_type == "QuantizeLinear":
            read = readers.get(step.node.outputs[0], [])
            if [other.node.op_type for other in read] == ["DequantizeLinear"]:
                yield step, read[0]


def _scale(step: Step, constants: Mapping[str, Tensor]) -> float:
    """The only scale of a node whose zero is at 0; 0 where it is not like that."""
    scale, *zero = (constants.get(name) for name in step.node.inputs[1:3] if name)
    centred = all(point is not None and not point.any() for point in zero)
    if scale is None or scale.numel() != 1 or not centred:
        return 0.0
    return max(0.0, scale.item())


@cache
def _inverse(scale: float) -> tuple[bool, float | None]:
    """Whether the short form is right for a scale, and the factor for which it is."""
    if not _values_are_right(scale) or not _positions_are_right(scale, None):
        return False, None
    nearest = np.float32(1) / np.float32(scale)
    for factor in (nearest, np.nextafter(nearest, np.float32(0))):
        if np.isfinite(factor) and _positions_are_right(scale, float(factor)):
            return True, float(factor)
    return True, None


def _positions(x: Tensor, scale: float, inverse: float | None) -> Tensor:
    if inverse is None:
        return torch.div(x, scale).add_(ORIGIN)
    return torch.add(_ORIGIN, x, alpha=inverse)


def _values(positions: Tensor, scale: float) -> Tensor:
    zero = torch.tensor(-ORIGIN * scale)
    return torch.add(zero, positions, alpha=scale, out=positions)


def _positions_are_right(scale: float, inverse: float | None) -> bool:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = every[every.isfinite()]
    expected = (finite / scale).round_().clamp_(-_LIMITED, _LIMITED)
    return all(
        torch.equal((_positions(x, scale, inverse) - ORIGIN).clamp_(-_LIMITED, _LIMITED), expected)
        for x in _both_ways(finite)
    )


def _values_are_right(scale: float) -> bool:
    positions = torch.arange(-256.0, 256.0)
    expected = (positions * scale).view(torch.int32)
    return all(
        torch.equal(_values(x, scale).contiguous().view(torch.int32), expected)
        for x in _both_ways(positions + ORIGIN)
    )


def _both_ways(values: Tensor) -> Iterator[Tensor]:
    """Values side by side in memory and apart: torch has other code for each."""
    yield values.clone()
    yield torch.stack([values, values], 1)[:, 0]
