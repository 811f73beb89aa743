"""The operations of ML Programs that change the size of images: the last two axes of a tensor.

See `table` for the conventions. The size of the result is floor(size * factor); where its pixels
lie in the image follows from both sizes, not from the factor, which converters round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate.mil.operators.table import operator


@operator("upsample_nearest_neighbor", selects=True)
def upsample_nearest_neighbor(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
) -> Tensor:
    """Repeat rows and columns."""
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size, target = x.shape[axis], _target(x.shape[axis], factor)
        x = x.index_select(axis, torch.arange(target) * size // max(1, target))
    return x


@operator("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | bool | None = None,
) -> Tensor:
    """Interpolate between rows and between columns.

    Pixels are counted from the middle of the first to that of the last (`align_corners`), from the
    image's border (`half_pixel_centers`, by default unless corners are aligned), or from the middle
    of the first.
    """
    centers = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    if align_corners and centers:
        raise UnsupportedOperatorError("align_corners and half_pixel_centers at once")
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size, target = x.shape[axis], _target(x.shape[axis], factor)
        pixels = torch.arange(target, dtype=torch.float64)
        if align_corners:
            positions = pixels * ((size - 1) / max(1, target - 1))
        else:
            shift = 0.5 if centers else 0.0
            positions = (pixels + shift) * (size / max(1, target)) - shift
        x = _interpolate(x, axis, positions.clamp(0, size - 1))
    return x


def _target(size: int, factor: Tensor | float) -> int:
    """The size of the result; computed as the format does, in the type of the factor."""
    return math.floor(torch.as_tensor(factor) * size)


def _interpolate(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Linear interpolation at positions between 0 and the size - 1 of an axis."""
    before = positions.floor().long()
    behind = (before + 1).clamp(max=x.shape[axis] - 1)
    share = (positions - before).to(x.dtype)
    share = share if axis == -1 else share[:, None]
    return torch.lerp(x.index_select(axis, before), x.index_select(axis, behind), share)
