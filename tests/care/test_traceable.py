"""Patches are added up by a transposed convolution as torch adds them up, also once exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from care.traceable import FOR_ALL_TARGETS, Replaced, fold


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 8), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((7, 9), {"kernel_size": (2, 3), "padding": (0, 1), "stride": (2, 3)}),
        ((8, 8), {"kernel_size": 2, "stride": 2}),
        ((9, 8), {"kernel_size": 3, "dilation": (2, 1), "padding": 2, "stride": 1}),
        (6, {"kernel_size": 3}),
    ],
)
def test_it_is_torchs_fold(size: Any, options: dict[str, Any]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    patches = F.unfold(torch.randn(2, 3, height, width, generator=generator), **options)
    expected = F.fold(patches, size, **options)
    torch.testing.assert_close(fold(patches, size, **options), expected)
    torch.testing.assert_close(fold(patches[0], size, **options), expected[0])


class Folded(nn.Module):
    """Attention over patches that overlap, as VOLO has it, without the attention."""

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 3, padding=1, stride=2)
        return F.fold(patches * 2, (8, 8), 3, padding=1, stride=2).mean((2, 3))


def test_a_trace_holds_a_convolution() -> None:
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with Replaced(FOR_ALL_TARGETS):
        program = torch.export.export(Folded(), (images,))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("conv_transpose2d" in name for name in names)
    assert not any("col2im" in name for name in names)
    torch.testing.assert_close(program.module()(images), Folded()(images))


def test_torchs_own_function_is_back() -> None:
    patches = torch.zeros(1, 9, 36)
    with Replaced(FOR_ALL_TARGETS):
        assert F.fold(patches, 8, 3).shape == (1, 1, 8, 8)
    assert "col2im" in str(torch.export.export(Plain(), (patches,)).graph)


class Plain(nn.Module):
    """Patches that are added up."""

    def forward(self, patches: Tensor) -> Tensor:
        """(batch, 1, 8, 8)."""
        return F.fold(patches, 8, 3)
