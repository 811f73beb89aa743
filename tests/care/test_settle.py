"""Random weights give activations of a usual size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import care.settle as settling
from care.settle import AWAKE, MAGNIFICATION, how_many, magnification, noise, settle, wake


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


class Bottleneck(nn.Module):
    """Convolutions without a residual, whose rectifiers magnify differences."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts: list[nn.Module] = [nn.Conv2d(3, 16, 1)]
        for _ in range(layers):
            parts += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits


@pytest.mark.parametrize("layers", [4, 40])
def test_differences_are_not_magnified(layers: int) -> None:
    module = Bottleneck(layers).eval()
    settle(module, (3, 16, 16))
    assert magnification(module, noise(8, (3, 16, 16), 5)) < 1.5 * MAGNIFICATION
    logits = module(noise(8, (3, 16, 16), 6)).detach()
    assert logits.std(0).norm() > 0.02 * logits.norm(dim=1).mean()  # they depend on the image


def test_float16_holds_a_deep_network() -> None:
    """By a rounding of each module's result, as runtimes do it."""
    module = Bottleneck(40).eval()
    settle(module, (3, 16, 16))
    images = noise(8, (3, 16, 16), 7)
    before = module(images).detach()
    for part in (*module.body, module.head):
        part.register_forward_hook(lambda _, given, values: values.half().float())
    errors = (module(images).detach() - before).norm(dim=1) / before.norm(dim=1)
    assert float(errors.max()) < 2e-2


class Afterwards(nn.Module):
    """Blocks whose BatchNorms come after the activation, as ConvMixer's do."""

    def __init__(self, blocks: int, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.spatial = nn.ModuleList(self.block(width, 5, width) for _ in range(blocks))
        self.channels = nn.ModuleList(self.block(width, 1, 1) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def block(width: int, kernel: int, groups: int) -> nn.Sequential:
        """A convolution, a rectifier and a BatchNorm."""
        layer = nn.Conv2d(width, width, kernel, padding="same", groups=groups)
        return nn.Sequential(layer, nn.ReLU(), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        values = self.stem(images)
        for spatial, channels in zip(self.spatial, self.channels, strict=True):
            values = channels(values + spatial(values))
        logits: Tensor = self.head(values.mean((2, 3)))
        return logits


def test_norms_behind_activations_are_settled_by_what_comes_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (3, 16, 16)
    module = Afterwards(24).eval()
    settle(module, shape)
    assert magnification(module, noise(8, shape, 5)) < 2 * MAGNIFICATION
    logits = module(noise(8, shape, 6)).detach()
    assert logits.isfinite().all()
    assert logits.std(0).norm() > 0.02 * logits.norm(dim=1).mean()
    # Without: none of what is done to BatchNorms alone helps.
    monkeypatch.setattr(settling, "_AFFINES", [a for a in settling._AFFINES if a.lift is None])
    module = Afterwards(24).eval()
    settle(module, shape)
    assert magnification(module, noise(8, shape, 5)) > 4 * MAGNIFICATION


def test_what_is_averaged_over_an_image_keeps_a_mean() -> None:
    """Else logits are small differences of large values, of which half precision leaves little."""
    shape = (3, 16, 16)
    module = Afterwards(64).eval()
    settle(module, shape)
    images = noise(8, shape, 7)
    with torch.no_grad():
        before = module(images)
        after = copy.deepcopy(module).half()(images.half()).float()
        logits = module(noise(8, shape, 6))
    assert float(((after - before).norm(dim=1) / before.norm(dim=1)).max()) < 1e-2
    assert logits.std(0).norm() > 0.02 * logits.norm(dim=1).mean()


def test_only_what_goes_right_into_an_activation_is_lifted() -> None:
    module = Afterwards(2).eval()
    found = settling._ahead(module, noise(1, (3, 16, 16), 0))
    assert set(found) == {block[0] for block in (*module.spatial, *module.channels)}
    plain = Bottleneck(2).eval()
    assert not settling._ahead(plain, noise(1, (3, 16, 16), 0))
    tokens = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2, bias=False), nn.ReLU())
    assert set(settling._ahead(tokens, torch.ones(1, 7, 4))) == {tokens[0]}


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(4, 6, 1), (8, 4, 5, 5)), (nn.Linear(4, 6), (8, 9, 4))]
)
def test_a_lift_is_a_mean_in_deviations(layer: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lifted = settling._lift(3.0, layer, (values,), layer(values))
        after = layer(values)
    torch.testing.assert_close(after, lifted)
    channels = after.movedim(1 if after.ndim == 4 else -1, 0).flatten(1)
    torch.testing.assert_close(channels.mean(1), 3 * channels.std(1))


def test_biases_of_sound_networks_stay() -> None:
    module = Bottleneck(4).eval()
    settle(module, (3, 16, 16))
    assert all(not part.bias.any() for part in module.body if isinstance(part, nn.BatchNorm2d))


def test_magnification_is_that_of_known_networks() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    assert 0.5 < magnification(linear, noise(8, (3, 4, 4), 0)) < 3
    images = torch.ones(8, 3, 4, 4)  # of which a hundredth is left

    class Difference(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return (values - 0.99).flatten(1)

    assert 50 < magnification(Difference(), images) < 200
    assert magnification(Overflow(), images) == math.inf


class Overflow(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return (values * 1e30).square().flatten(1)


def test_what_starts_switched_off_is_switched_on() -> None:
    first, norm, batch, head = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    module = nn.Sequential(first, norm, batch, head)
    for values in (head.weight, norm.weight, first.bias):
        nn.init.zeros_(values)
    scale, tokens = nn.Parameter(torch.full((4,), 1e-6)), nn.Parameter(torch.zeros(4))
    module.register_parameter("gamma", scale)
    module.register_parameter("tokens", tokens)
    assert sorted(wake(module)) == ["1.weight", "3.weight", "gamma"]
    assert torch.equal(norm.weight, torch.full((4,), AWAKE))
    assert torch.equal(scale, torch.full((4,), AWAKE))
    assert 0.1 < float(head.weight.detach().std()) < 1.5
    assert not first.bias.any()
    assert not tokens.any()
    assert torch.equal(batch.weight, torch.ones(4))
    assert wake(module) == []


def test_noise_is_distributed_as_photographs_are() -> None:
    images = noise(32, (3, 64, 64), 0)
    assert images.shape == (32, 3, 64, 64)
    assert float(images.mean().abs()) < 1e-5
    assert float(images.std()) == pytest.approx(1, abs=1e-4)
    neighbours = torch.corrcoef(
        torch.stack([images[..., 1:].flatten(), images[..., :-1].flatten()])
    )
    colours = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert 0.6 < float(neighbours[0, 1]) < 0.99
    assert 0.7 < float(colours[0, 1]) < 0.9
    assert torch.equal(images, noise(32, (3, 64, 64), 0))
    assert not torch.equal(images, noise(32, (3, 64, 64), 1))


def test_small_images_are_more() -> None:
    assert (how_many((3, 32, 32)), how_many((3, 96, 96)), how_many((3, 224, 224))) == (64, 28, 16)


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
    images = noise(how_many((3, 16, 16)), (3, 16, 16), 0)
    torch.testing.assert_close(module[0].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(module[0].running_var, images.transpose(0, 1).flatten(1).var(1))
    torch.testing.assert_close(module[1].running_mean, torch.zeros(3), atol=1e-5, rtol=0)


def test_a_network_without_any() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert settle(module, (3, 8, 8)) == 0
