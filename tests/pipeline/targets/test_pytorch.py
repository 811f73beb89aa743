"""How large the values of a network become in PyTorch, and where."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.targets.pytorch import range_of

IMAGES = np.ones((2, 1, 2, 2), np.float32)


class Scale(nn.Module):
    """Multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def chain(*factors: float) -> nn.Sequential:
    return nn.Sequential(*(Scale(factor) for factor in factors)).eval()


def test_the_largest_value_and_its_layer() -> None:
    found = range_of(chain(3, -10, 0.1), IMAGES)
    assert (found.largest, found.at, found.first_beyond, found.images) == (30, "1", "", 2)
    assert found.words == ""


def test_a_network_that_leaves_float16() -> None:
    found = range_of(chain(3, 65504 / 3, 2, 1000, 1e-9), IMAGES)
    assert (found.at, found.first_beyond) == ("3", "2")
    assert found.words == (
        "the network itself leaves the range of float16: 1.3e+08 at 3, first at 2 (PyTorch in "
        "float32, 2 images)"
    )


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_network_without_finite_values(factor: float) -> None:
    found = range_of(chain(1, factor, 0), IMAGES)
    assert (found.largest, found.at, found.first_beyond) == (math.inf, "1", "1")
    assert "no finite value at 1" in found.words


def test_what_a_network_does_beside_its_layers_shows_in_the_logits() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y * 1e6

    module = Outside().eval()
    assert range_of(module, IMAGES).first_beyond == "the logits"
    assert not module.inner._forward_hooks
