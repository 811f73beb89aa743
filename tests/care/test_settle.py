"""Random weights give activations of a usual size."""

from __future__ import annotations

import torch
from torch import nn

from care.settle import settle


def deep() -> nn.Sequential:
    """Layers of which each makes values ten times as large."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layer = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.constant_(layer.weight, 4)
        layers += [layer, nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def test_activations_stay_of_one_size() -> None:
    module, images = deep(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    before = float(module(images).detach().abs().max())
    assert settle(module, (3, 8, 8)) == 8
    after = float(module(images).detach().abs().max())
    assert before > 1e6
    assert 0.5 < after < 20


def test_it_is_repeatable_and_leaves_all_else() -> None:
    first, second = deep(), deep()
    norm = first[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.3
    settle(first, (3, 8, 8))
    settle(second, (3, 8, 8))
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert norm.momentum == 0.3
    assert not any(part.training for part in first.modules())
    settle(second, (3, 8, 8), seed=1)
    key = "1.running_mean"
    assert not torch.equal(first.state_dict()[key], second.state_dict()[key])


def test_statistics_are_those_of_the_noise_that_each_one_gets() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    settle(module, (3, 16, 16))
    settle(module, (3, 16, 16))  # what was there before does not count
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module[0].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(module[0].running_var, images.transpose(0, 1).flatten(1).var(1))
    torch.testing.assert_close(module[1].running_mean, torch.zeros(3), atol=1e-5, rtol=0)


def test_a_network_without_any() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert settle(module, (3, 8, 8)) == 0
