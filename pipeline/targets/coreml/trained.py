"""Weights in fewer bits that learn: what a package will store, with gradients.

Each weight tensor becomes what coremltools makes of it, by the same function that the search judges
with. Tables and masks follow the weights, step by step. Gradients pass as they come, but none for
a value that is pruned: what is left out stays small, and so stays out.

Depthwise convolutions that a package merges are stored apart here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.core.errors import ConfigError
from pipeline.targets.coreml.build import RECIPES
from pipeline.targets.coreml.compress import Scheme, simulate
from pipeline.targets.coreml.options import CoreMLOptions

PREFIX = "coreml/"


def schemes_of(precision: str) -> tuple[Scheme, ...]:
    """How a precision stores weights.

    Args:
        precision: Its name, such as "coreml/palette4".

    Raises:
        ConfigError: It is none that only stores weights in fewer bits.
    """
    recipe = RECIPES.get(precision.removeprefix(PREFIX))
    if recipe is None or len(recipe.schemes) != 1 or recipe.calibrated:
        raise ConfigError(f"no network is fine-tuned in {precision!r}")
    return recipe.schemes


def compressed(
    weights: Mapping[str, Tensor], schemes: Sequence[Scheme], threshold: int | None = None
) -> dict[str, Tensor]:
    """Weights as a package stores them, with gradients to what they are made of.

    Args:
        weights: By name, float32.
        schemes: See `schemes_of`.
        threshold: Tensors with at most so many values stay as they are; None for the target's own.
    """
    most = CoreMLOptions().weight_threshold if threshold is None else threshold
    made = dict(weights)
    for name, weight in weights.items():
        if weight.ndim > 1 and weight.numel() > most:
            made[name] = _stored(weight, schemes)
    return made


def _stored(weight: Tensor, schemes: Sequence[Scheme]) -> Tensor:
    values = weight.detach().cpu().numpy().astype(np.float16)  # the type that is compressed
    for scheme in schemes:
        values = simulate(values, scheme)
    stored = torch.from_numpy(values.astype(np.float32)).to(weight.device)
    passes = stored != 0 if schemes[0].kind == "pruned" else torch.ones_like(stored).bool()
    result: Tensor = _Stored.apply(weight, stored, passes)
    return result


class _Stored(torch.autograd.Function):
    """Stored values in the place of weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stored: Tensor, passes: Tensor) -> Tensor:
        """The stored values."""
        ctx.save_for_backward(passes)
        return stored.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Of the weight, where it passes."""
        (passes,) = ctx.saved_tensors
        return gradient * passes, None, None
