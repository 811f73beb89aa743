"""Random weights that compute as trained ones do, so that trying a network means something.

A freshly initialized network is none that anybody ships, in three ways:

- A BatchNorm takes for granted that what it gets has mean 0 and variance 1. In a deep network with
  random weights it does not, and values grow from layer to layer, beyond 1e14 in some.
- Whole branches are switched off: by a BatchNorm whose weight starts at zero, by a layer scale of
  1e-6, by a classifier of zeros. What such a branch computes shows nowhere in the logits.
- BatchNorms between random convolutions and rectifiers magnify differences, by up to a fifth in
  each layer (Yang et al., A Mean Field Theory of Batch Normalization, 2019). Thirty layers turn
  float16's rounding into a relative error of several percent. Training would not end with such
  weights: their gradients explode for the same reason.

`settle` mends all three, by images of noise that has the spectrum and the colours of photographs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FEWEST, MOST = 16, 64
PIXELS = 2**18
"""Images of noise: more of small ones, since the last layers of many networks have a single
position for each and see no more values of a channel than there are images."""

MAGNIFICATION = 24.0
"""How much more logits may change than the values on the way do, each relative to their size: the
root of how many there are, about, where nothing magnifies. float16 comes to an error of 0.006."""

AWAKE = 0.25
"""Of scales that start at almost nothing. In trained networks they lie between 0.05 and 1."""

_ASLEEP = 0.05
"""Scales that are smaller in all channels alike count as switched off."""

_STEP = 1e-3
_GRAY = 0.8
"""Share of what the colours of noise have in common: those of photographs correlate by 0.9."""


@dataclass(frozen=True)
class _Affine:
    """What happens to the weights and biases of all BatchNorms, and to biases ahead of activations.

    Attributes:
        scale: Of the weights of BatchNorms.
        shift: Of their biases, in deviations.
        lift: Mean of what comes right from a layer with a bias into an activation, in deviations;
            None where these biases stay.
    """

    scale: float
    shift: float
    lift: float | None = None


_AFFINES = (
    _Affine(1.0, 0.0),
    _Affine(1.0, 0.5),
    _Affine(1.0, 1.0),
    _Affine(0.25, 0.0),
    _Affine(1.0, 0.0, lift=2.0),
    _Affine(1.0, 1.0, lift=2.0),
)
"""In the order in which they are tried. A shift puts most values on the side of an activation where
it is a straight line; small values see little of the bend of a smooth one. Where BatchNorms come
after activations, their shift goes through a layer of random signs first; a lift does not. With a
shift besides, what is averaged over an image at the end has a mean, as behind a rectifier: without,
logits are what little is left of values that cancel over the positions."""

_STRAIGHT: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus),
)
"""Activations that are a straight line, about, for what is above zero."""


def settle(module: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> int:
    """Switch all branches on, and set the statistics of all BatchNorms to those over seeded noise.

    Where the network then magnifies differences more than `MAGNIFICATION` times, weights and biases
    of BatchNorms, and biases ahead of activations, are changed so that it does not, or as little
    as can be.

    Args:
        module: A network in evaluation mode, on the CPU; changed in place.
        shape: (channels, height, width) of an image.
        seed: Of the noise.

    Returns:
        How many BatchNorms there are.
    """
    wake(module, seed)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return 0
    images = noise(how_many(shape), shape, seed)
    own = [_affine_of(norm) for norm in norms]
    biases = {part: bias.detach().clone() for part, bias in _ahead(module, images[:1]).items()}
    found: dict[_Affine, float] = {}

    def make(affine: _Affine) -> None:
        _set_affine(norms, own, affine)
        with torch.no_grad(), ExitStack() as hooks:
            for part, bias in biases.items():
                part.get_parameter("bias").copy_(bias)
                if affine.lift is not None:
                    hook = part.register_forward_hook(partial(_lift, affine.lift))
                    hooks.callback(hook.remove)
            _measure(module, norms, images)

    for affine in (each for each in _AFFINES if each.lift is None or biases):
        make(affine)
        found[affine] = magnification(module, noise(FEWEST, shape, seed + 1))
        if found[affine] <= MAGNIFICATION:
            return len(norms)
    if (best := min(found, key=lambda affine: found[affine])) != affine:
        make(best)
    return len(norms)


def how_many(shape: tuple[int, int, int]) -> int:
    """Images of a shape (channels, height, width) over which statistics are taken."""
    return min(MOST, max(FEWEST, PIXELS // (shape[1] * shape[2])))


def wake(module: nn.Module, seed: int = 0) -> list[str]:
    """Give weights that start at nothing, and so switch off what they belong to, usual sizes.

    Args:
        module: A network; changed in place.
        seed: Of the weights that were zero.

    Returns:
        Names of the parameters that were changed.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for name, parameter in _asleep(module):
        with torch.no_grad():
            if parameter.ndim > 1 and not bool(parameter.any()):
                spread = 1 / math.sqrt(parameter[0].numel())
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(AWAKE)
        changed.append(name)
    return changed


def _asleep(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of zero, and scales that are small and alike in all channels.

    Biases, positions and tokens start at zero, too, and switch nothing off: these are no weights,
    and no constant but zero.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        low, high = (float(each) for each in parameter.detach().aminmax())
        kind = name.rpartition(".")[2]
        if low != high or abs(low) >= _ASLEEP or "bias" in kind:
            continue
        if low != 0 or kind in ("weight", "gain", "skipinit_gain"):
            yield name, parameter


def noise(images: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Seeded noise that is distributed as pixels of photographs are.

    Its amplitude falls as the reciprocal of the frequency (Field, Relations between the statistics
    of natural images, 1987), and most of it is common to all colours.

    Args:
        images: How many.
        shape: (channels, height, width).
        seed: Of the generator.

    Returns:
        (images, channels, height, width), of mean 0 and deviation 1 over all.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    gray = torch.randn(images, 1, height, width, generator=generator)
    own = torch.randn(images, channels, height, width, generator=generator)
    white = math.sqrt(_GRAY) * gray + math.sqrt(1 - _GRAY) * own
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = torch.sqrt(rows**2 + columns**2).clamp_min(1 / max(height, width))
    made = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    pixels: Tensor = (made - made.mean()) / made.std()
    return pixels


def magnification(module: nn.Module, images: Tensor) -> float:
    """How much more logits change than the values on the way do.

    All images and the results of all modules without modules inside change by a thousandth of
    their values, at random.

    Args:
        module: A network in evaluation mode.
        images: (images, channels, height, width).

    Returns:
        The ratio of the relative changes, the mean over the images; infinity where logits are not
        finite.
    """
    generator = torch.Generator().manual_seed(0)

    def changed(values: Tensor) -> Tensor:
        return values * (1 + _STEP * torch.randn(values.shape, generator=generator))

    def change(part: nn.Module, given: Any, values: Any) -> Any:
        is_real = isinstance(values, Tensor) and values.is_floating_point()
        return changed(values) if is_real else None

    leaves = [part for part in module.modules() if next(part.children(), None) is None]
    with torch.no_grad():
        before = module(images)
        hooks = [leaf.register_forward_hook(change) for leaf in leaves]
        try:
            after = module(changed(images))
        finally:
            for hook in hooks:
                hook.remove()
    norms = before.norm(dim=1).clamp_min(1e-30)
    found = float(((after - before).norm(dim=1) / norms).mean() / _STEP)
    return found if math.isfinite(found) else math.inf


def _measure(module: nn.Module, norms: Sequence[_BatchNorm], images: Tensor) -> None:
    """Set the statistics of BatchNorms.

    Every BatchNorm normalizes by the batch meanwhile, so that one pass settles all of them.
    """
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches, of which there is one
            norm.train()
        with torch.no_grad():
            module(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _ahead(module: nn.Module, images: Tensor) -> Mapping[nn.Module, nn.Parameter]:
    """Biases of the layers whose results go right into an activation, by layer.

    Args:
        module: A network in evaluation mode.
        images: To follow through it.
    """
    came: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[nn.Module, nn.Parameter] = {}

    def leaves(part: nn.Module, given: Any, values: Tensor) -> None:
        came[id(values)] = part, values  # kept, so that no other tensor gets its identity

    def enters(part: nn.Module, given: Any) -> None:
        if given and id(given[0]) in came:
            layer, _ = came[id(given[0])]
            found[layer] = layer.get_parameter("bias")

    with torch.no_grad(), ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
                hooks.callback(part.register_forward_hook(leaves).remove)
            elif isinstance(part, _STRAIGHT):
                hooks.callback(part.register_forward_pre_hook(enters).remove)
        module(images)
    return found


def _lift(lift: float, part: nn.Module, given: Any, values: Tensor) -> Tensor:
    """Change a layer's bias, and its results, so that the mean of each channel is a lift."""
    channels = 1 if isinstance(part, nn.Conv2d) else values.ndim - 1
    others = [axis for axis in range(values.ndim) if axis != channels]
    change = lift * values.std(others) - values.mean(others)
    part.get_parameter("bias").add_(change)
    return values + change.reshape([-1 if axis == channels else 1 for axis in range(values.ndim)])


def _affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """Copies of a BatchNorm's weight and bias; None where it has none."""
    if not norm.affine:
        return None
    return norm.weight.detach().clone(), norm.bias.detach().clone()


def _set_affine(
    norms: Sequence[_BatchNorm], own: Sequence[tuple[Tensor, Tensor] | None], affine: _Affine
) -> None:
    """Scale the weights that BatchNorms had at first, and shift biases by as many deviations."""
    for norm, had in zip(norms, own, strict=True):
        if had is not None:
            with torch.no_grad():
                norm.weight.copy_(had[0] * affine.scale)
                norm.bias.copy_(had[1] + had[0] * affine.shift)
