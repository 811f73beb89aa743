"""Tensors of more than five axes are written with five, and hold the same values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.targets.coreml.axes import MOST, _merged, _together, fold_axes

SHAPE = (2, 3, 4, 2, 3, 2)
"""Six axes, none of them of size 1."""


def random(*shape: int) -> Tensor:
    """The same values each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


class Given(nn.Module):
    """A function as a module; its image has one axis, so that all others are made within."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Any:
        """What the function makes of the image."""
        return self.function(image)


def exported(module: nn.Module) -> ExportedProgram:
    """The program of a module that takes as many values as `SHAPE` has."""
    example = torch.zeros(int(np.prod(SHAPE)))
    program: ExportedProgram = torch.export.export(module.eval(), (example,))
    return program.run_decompositions({})  # type: ignore[no-any-return]


def most_axes(program: ExportedProgram) -> int:
    """Of a tensor in a program."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return max(len(getattr(each, "shape", ())) for each in itertools.chain(*lists))


def folded(function: Callable[[Tensor], Any]) -> ExportedProgram:
    """A program with few axes, that gives what the function gives."""
    module = Given(function)
    image = random(int(np.prod(SHAPE)))
    expected = module(image)
    program = exported(module)
    assert most_axes(program) > MOST
    assert fold_axes(program) > 0
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    assert most_axes(program) <= MOST
    torch.testing.assert_close(program.module()(image), expected)
    return program


def weighted(parts: Sequence[Tensor]) -> Tensor:
    """A sum that tells parts apart."""
    total = torch.zeros(())
    for number, part in enumerate(parts, 1):
        total = total + number * part
    return total


KNOWN: dict[str, Callable[[Tensor], Any]] = {
    "permuted, then an element-wise operation": lambda x: (
        x.reshape(SHAPE).permute(0, 2, 4, 1, 3, 5).neg().flatten()
    ),
    "reversed": lambda x: x.reshape(SHAPE).permute(5, 4, 3, 2, 1, 0).exp().reshape(9, 32),
    "transposed twice": lambda x: (
        x.reshape(SHAPE).transpose(1, -1).sigmoid().transpose(0, 3).flatten(1)
    ),
    "axes of size 1": lambda x: x.reshape(1, 6, 8, 1, 3, 2).permute(4, 0, 3, 2, 1, 5)[1].tanh(),
    "queries, keys and values": lambda x: weighted(
        x.reshape(1, 6, 4, 3, 2, 2).permute(3, 0, 4, 2, 1, 5).unbind(0)
    ),
    "unbound in the middle, seven axes": lambda x: weighted(
        [part.relu() for part in x.reshape(2, 3, 2, 2, 2, 3, 2).unbind(2)]
    ).flatten(),
    "taken in the middle": lambda x: x.reshape(SHAPE).permute(1, 0, 2, 5, 4, 3).select(3, 1) * 2,
    "sums with rows and columns": lambda x: (
        x.reshape(1, 1, 6, 4, 6, 2)
        + random(1, 1, 6, 4, 6)[..., None]
        + random(1, 1, 6, 4, 2)[..., None, :]
    ).reshape(24, 12),
    "a number and a smaller tensor": lambda x: (
        1 - x.reshape(SHAPE) * random(3, 2) / random(4, 1, 1, 1)
    ).flatten(2, 3),
    "one value": lambda x: (x.reshape(*SHAPE[:3], 1, 1, 12).softmax(-1) / 3).reshape(24, 12),
    "softmax in the middle": lambda x: x.reshape(SHAPE).softmax(2).reshape(-1),
    "the largest of neighbours": lambda x: x.reshape(SHAPE).amax((1, 2)).tanh(),
    "sums and means along an axis, kept": lambda x: (
        x.reshape(SHAPE).sum(-1, keepdim=True) * x.reshape(SHAPE).mean(0, keepdim=True)
    ).flatten(),
    "gelu and silu": lambda x: F.silu(F.gelu(x.reshape(SHAPE))).flatten(),
    "the larger and the smaller": lambda x: torch.minimum(
        torch.maximum(x.reshape(SHAPE), random(3, 2)), random(2, 1, 1)
    ).flatten(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_few_axes_hold_the_same_values(name: str) -> None:
    folded(KNOWN[name])


def test_a_linear_layer_sees_its_channels() -> None:
    program = folded(
        lambda x: F.linear(x.reshape(SHAPE).transpose(1, 2), random(5, 2), random(5)).flatten(0, 3)
    )
    kinds = [getattr(node.target, "overloadpacket", None) for node in program.graph.nodes]
    assert torch.ops.aten.linear in kinds


def permuted(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Values with axes in another order, and something done to each."""
    return x.reshape(*sizes).permute(*order).neg().flatten()


@pytest.mark.parametrize("count", [6, 7, 8])
def test_any_permutation_is_made_of_exchanges(count: int) -> None:
    rng = np.random.default_rng(count)
    sizes = {6: SHAPE, 7: (2, 3, 2, 2, 1, 3, 4), 8: (2, 3, 2, 2, 1, 3, 2, 2)}[count]
    for _ in range(4):
        order = [int(axis) for axis in rng.permutation(count)]
        folded(partial(permuted, sizes=sizes, order=order))


def test_what_coremltools_writes_itself_stays() -> None:
    program = exported(Given(lambda x: x.reshape(SHAPE).permute(0, 2, 4, 1, 3, 5).reshape(9, 32)))
    before = str(program.graph)
    assert fold_axes(program) == 0
    assert str(program.graph) == before


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(SHAPE).cumsum(2).flatten(),
        lambda x: x.reshape(SHAPE).neg().sum((1, 3)),
        lambda x: x.reshape(SHAPE).neg().mean() + x,
        lambda x: x.reshape(SHAPE).neg().split(2, 2)[1].flatten(),
        lambda x: (x.reshape(SHAPE) + random(2, 1, 4, 1, 3, 1)).flatten(),
    ],
    ids=["cumsum", "sum", "mean of all", "split", "axes that take turns"],
)
def test_what_is_not_known_stays(function: Callable[[Tensor], Any]) -> None:
    program = exported(Given(function))
    before = str(program.graph)
    assert fold_axes(program) == 0
    assert str(program.graph) == before


def test_parts_are_folded_one_by_one() -> None:
    def function(x: Tensor) -> Tensor:
        known = x.reshape(SHAPE).neg().flatten()
        return known.mul(2).reshape(SHAPE).cumsum(1).flatten()

    program = exported(Given(function))
    assert fold_axes(program) == 2
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    image = random(int(np.prod(SHAPE)))
    torch.testing.assert_close(program.module()(image), function(image))


def test_neighbours_that_move_together_are_one_axis() -> None:
    assert _together((2, 3, 4, 5), [2, 3, 0, 1]) == ((6, 20), [1, 0])
    assert _together((2, 1, 4, 5), [3, 1, 0, 2]) == ((8, 5), [1, 0])
    assert _together((1, 1), [1, 0]) == ((), [])


def test_neighbours_that_broadcast_alike_are_one_axis() -> None:
    whole = (1, 2, 3, 4, 5, 6)
    assert _merged(whole, [whole, (4, 5, 1)]) == [(6, (6, 1)), (20, (20, 20)), (6, (6, 1))]
    assert _merged(whole, [whole, ()]) == [(720, (720, 1))]
    assert _merged((1, 1), [(1, 1), (1,)]) == [(1, (1, 1))]
