"""Batch norms are folded before weights become float16, and only where nothing else is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.targets.coreai.norms import fold
from pipeline.targets.coreai.package import BYTECODE, MODEL
from pipeline.targets.coreai.program import read

from .conftest import LABELS, images, job, made, needs_coreai


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With statistics and factors that training could have left."""
    with torch.no_grad():
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 3)
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    return norm


class Normed(nn.Module):
    """Two convolutions with norms, of which the second has a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.first_norm = trained(nn.BatchNorm2d(8))
        self.second = nn.Conv2d(8, len(LABELS), 1)
        self.second_norm = trained(nn.BatchNorm2d(len(LABELS), eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        y: Tensor = self.second_norm(self.second(x)).mean((2, 3))
        return y


class UsedTwice(Normed):
    """What enters the norm enters something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.first_norm(y) + y).mean((2, 3))  # type: ignore[no-any-return]


class Shared(Normed):
    """One norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first_norm(self.first(x)) + self.first_norm(self.second(x))
        return y.mean((2, 3))


class Called(Normed):
    """One convolution on two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first_norm(self.first(x)) + torch.relu(self.first(-x))
        return y.mean((2, 3))


class OfTheBatch(Normed):
    """A norm by the statistics of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first_norm(self.first(x)).mean((2, 3))
        return y


class Plain(Normed):
    """A norm without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm = trained(nn.BatchNorm2d(8, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first_norm(self.first(x)).mean((2, 3))
        return y


class Alone(Normed):
    """A norm after something else than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first_norm(torch.relu(self.first(x))).mean((2, 3))
        return y


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (Normed, 2),
        (UsedTwice, 0),
        (Shared, 0),
        (Called, 0),
        (OfTheBatch, 0),
        (Plain, 0),
        (Alone, 0),
    ],
)
def test_the_module_computes_the_same(make: Callable[[], nn.Module], folded: int) -> None:
    module = make().eval().requires_grad_(False)
    changed = copy.deepcopy(module)
    assert fold(changed, torch.zeros(1, 3, 16, 16)) == folded
    pictures = torch.from_numpy(images(4))
    torch.testing.assert_close(changed(pictures), module(pictures), rtol=1e-5, atol=1e-5)


def test_a_network_without_norms_is_not_exported() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("nothing has to be looked at")

    module = nn.Conv2d(3, 5, 1)
    module.forward = never  # type: ignore[method-assign, assignment]
    assert fold(module, torch.zeros(1, 3, 16, 16)) == 0


@needs_coreai
def test_weights_are_rounded_once(tmp_path: Path) -> None:
    asset = made(tmp_path / "x", job(module=Normed))
    module = Normed().eval()
    norm = module.first_norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # type: ignore[union-attr]
    exact = module.first.weight.double() * scale.reshape(-1, 1, 1, 1)
    wanted = exact.float().half().detach().numpy()
    constants = [op.constant for op in read(asset.folder / MODEL / BYTECODE).main.operations]
    (stored,) = [c for c in constants if c is not None and c.shape == wanted.shape]
    np.testing.assert_array_equal(stored, wanted)
