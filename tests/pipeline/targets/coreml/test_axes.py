"""Values of six axes are converted with five, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.targets.coreml.axes import drop_first_axes

SHAPE = (1, 4, 8, 6)
MATRIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))


def relative_positions(x: Tensor) -> Tensor:
    """As MViTv2 adds what depends on rows and on columns."""
    scores = x.view(1, 4, 4, 2, 3, 2)
    rows, columns = x[:, :, :4, :6].view(1, 4, 4, 2, 3), x[:, :, 4:, :4].reshape(1, 4, 4, 2, 2)
    return (scores + rows[..., None] - 2 * columns[:, :, :, :, None, :]).view(1, 4, 8, 6)


def blockwise(x: Tensor) -> Tensor:
    """As a transform of blocks of pixels has it."""
    blocks = x.view(1, 4, 4, 2, 2, 3).permute(0, 2, 4, 1, 3, 5)
    turned = nn.functional.linear(blocks, MATRIX).transpose(-1, -2)
    return turned.reshape(16, 12).contiguous()


def windows(x: Tensor) -> Tensor:
    """Windows of an image as a batch, and back, with a shift between."""
    parts = x.view(1, 4, 4, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).contiguous().view(12, 16)
    moved = parts.roll(1, 0).view(1, 4, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return moved.reshape(1, 4, 8, 6)


def queries(x: Tensor) -> Tensor:
    """Queries, keys and values of windows, of which queries are pooled, as in Hiera and NesT."""
    parts = x.reshape(1, 4, 4, 3, 2, 2).permute(3, 0, 4, 2, 1, 5)
    query, key, value = parts.unbind(0)
    query = query.view(1, 2, 4, 2, 2, 2).amax(3)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 3)


def one_of_them(x: Tensor) -> Tensor:
    """The place of the first axis changes three times, and one slice of another remains."""
    moved = x.view(1, 4, 4, 2, 3, 2).permute(4, 3, 0, 1, 2, 5).transpose(-4, 1) * 2
    return moved.select(0, -1) + moved.select(5, 1).sum()


SIX_AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "relative positions": relative_positions,
    "blockwise": blockwise,
    "windows": windows,
    "queries": queries,
    "one of them": one_of_them,
}

UNTOUCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "the first axis is selected": lambda x: (x.view(1, 4, 4, 2, 3, 2) * 2).select(0, 0),
    "it is the first of two": lambda x: (x.view(1, 4, 4, 2, 3, 2) * 2).transpose(0, 1).amax((0, 1)),
    "the first axis is summed": lambda x: (x.view(1, 4, 4, 2, 3, 2) * 2).sum((0, 1)),
    "seven axes": lambda x: (x.view(1, 2, 2, 4, 2, 3, 2) + 1).view(SHAPE),
    "no first axis of 1": lambda x: (x.view(2, 2, 4, 2, 3, 2) + 1).view(SHAPE),
    "five axes": lambda x: (x.view(1, 4, 8, 3, 2) + 1).view(SHAPE),
}


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + 0)


def exported(function: Callable[[Tensor], Tensor]) -> ExportedProgram:
    program: ExportedProgram = torch.export.export(Function(function).eval(), (torch.zeros(SHAPE),))
    return program.run_decompositions({})  # type: ignore[no-any-return]


def most_axes(program: ExportedProgram) -> int:
    values = [node.meta.get("val") for node in program.graph.nodes]
    return max(value.ndim for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("name", SIX_AXES)
def test_six_axes_become_five_and_numbers_stay(name: str, tmp_path: Path) -> None:
    from tests.pipeline.targets.coreml.test_rewrites import convert

    images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    program = exported(SIX_AXES[name])
    assert most_axes(program) == 6
    drop_first_axes(program)
    program.graph_module.recompile()
    assert most_axes(program) == 5
    expected = SIX_AXES[name](images)
    assert torch.equal(program.module()(images), expected)
    (answer,) = convert(program, tmp_path / "model.mlpackage").predict(images.numpy()).values()
    np.testing.assert_allclose(answer, expected.numpy(), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_needs_its_first_axis_stays(name: str) -> None:
    program = exported(UNTOUCHED[name])
    before = str(program.graph)
    drop_first_axes(program)
    assert str(program.graph) == before


def test_one_that_stays_leaves_others_alone() -> None:
    def both(x: Tensor) -> Tensor:
        return relative_positions(x).sum() + UNTOUCHED["the first axis is summed"](x)

    program = exported(both)
    drop_first_axes(program)
    program.graph_module.recompile()
    assert sum(len(getattr(n.meta.get("val"), "shape", ())) > 5 for n in program.graph.nodes) == 2
    images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(images), both(images))
