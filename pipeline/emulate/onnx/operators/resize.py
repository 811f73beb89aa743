"""Resizing images and sampling them at given places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.emulate.onnx.operators.table import Call, ints, operator


@dataclass(frozen=True, slots=True)
class _Axis:
    """How one axis is resized.

    Attributes:
        old: Its length.
        new: Its length afterwards.
        scale: How much longer it becomes; `new` is this times `old`, rounded.
        start: Where the part begins that tf_crop_and_resize shows, as a share of the length.
        end: Where it ends.
    """

    old: int
    new: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def unchanged(self) -> bool:
        return self.old == self.new and self.scale == 1 and (self.start, self.end) == (0, 1)

    def places(self, mode: str) -> Tensor:
        """Where each new position lies on the old axis, float64."""
        at = torch.arange(self.new, dtype=torch.float64)
        width = self.scale * self.old
        if mode == "align_corners":
            return at * ((self.old - 1) / (width - 1) if width != 1 else 0.0)
        if mode == "asymmetric":
            return at / self.scale
        if mode == "tf_crop_and_resize":
            last = self.old - 1
            if width == 1:
                return at * 0 + (self.start + self.end) * last / 2
            return self.start * last + at * (self.end - self.start) * last / (width - 1)
        if mode == "pytorch_half_pixel" and self.new == 1:
            return at * 0
        half_pixel = (at + 0.5) / self.scale - 0.5
        if mode == "half_pixel_symmetric":
            return half_pixel + self.old / 2 * (1 - self.new / width)
        return half_pixel


@operator("Resize")
def _resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    mode = call.attribute("coordinate_transformation_mode", "half_pixel")
    axes = [axis % x.ndim for axis in call.attribute("axes", list(range(x.ndim)))]
    plan = _lengths(call, [x.shape[axis] for axis in axes], scales, sizes)
    if mode == "tf_crop_and_resize" and roi is not None:
        part = roi.reshape(2, -1).T.tolist()
        plan = [
            replace(a, start=start, end=end) for a, (start, end) in zip(plan, part, strict=True)
        ]
    for axis, lengths in zip(axes, plan, strict=True):
        if not lengths.unchanged:
            x = _resize_axis(call, x, axis, lengths, lengths.places(mode))
    return x


def _lengths(
    call: Call, old: Sequence[int], scales: Tensor | None, sizes: Tensor | None
) -> list[_Axis]:
    if sizes is None or not sizes.numel():
        given = scales.tolist() if scales is not None else []
        return [_Axis(n, math.floor(n * s), s) for n, s in zip(old, given, strict=True)]
    wanted = ints(sizes, [])
    factors = [new / n for n, new in zip(old, wanted, strict=True)]
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [_Axis(n, new, s) for n, new, s in zip(old, wanted, factors, strict=True)]
    common = min(factors) if policy == "not_larger" else max(factors)
    return [_Axis(n, math.floor(common * n + 0.5), common) for n in old]


def _resize_axis(call: Call, x: Tensor, axis: int, lengths: _Axis, places: Tensor) -> Tensor:
    if call.attribute("mode", "nearest") == "nearest":
        index = _nearest(call.attribute("nearest_mode", "round_prefer_floor"), places)
        resized = x.index_select(axis, index.clamp(0, lengths.old - 1))
    else:
        weights = _weights(call, lengths, places).to(torch.float64)
        moved = x.movedim(axis, -1).to(torch.float64) @ weights.mT
        resized = moved.movedim(-1, axis).to(torch.float32 if x.is_floating_point() else x.dtype)
    if call.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return resized
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    outside = ((places < 0) | (places > lengths.old - 1)).reshape(shape)
    return resized.masked_fill(outside, call.attribute("extrapolation_value", 0.0))


def _nearest(mode: str, places: Tensor) -> Tensor:
    if mode == "floor":
        return places.floor().long()
    if mode == "ceil":
        return places.ceil().long()
    if mode == "round_prefer_ceil":
        return (places + 0.5).floor().long()
    return (places - 0.5).ceil().long()


def _weights(call: Call, lengths: _Axis, places: Tensor) -> Tensor:
    """The share of each old position in each new one; (new, old)."""
    cubic = call.attribute("mode", "nearest") == "cubic"
    stretch = min(1.0, lengths.scale) if call.attribute("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / stretch) + 1
    taps = places.floor().long()[:, None] + torch.arange(-reach, reach + 1)
    kernel = _cubic(call.attribute("cubic_coeff_a", -0.75)) if cubic else _triangle
    shares = kernel((taps - places[:, None]) * stretch)
    if call.attribute("exclude_outside", 0):
        shares = shares * ((taps >= 0) & (taps < lengths.old))
    shares = shares / shares.sum(1, keepdim=True)
    edge = taps.clamp(0, lengths.old - 1)
    return torch.zeros(lengths.new, lengths.old, dtype=torch.float64).scatter_add(1, edge, shares)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_min(0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    """Keys' kernel with the parameter a."""

    def kernel(distance: Tensor) -> Tensor:
        d = distance.abs()
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))

    return kernel


_SAMPLERS = {"linear": "bilinear", "cubic": "bicubic"}
"""torch's names of the modes; those before opset 20 are the same."""


@operator("GridSample")
def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.attribute("mode", "linear")
    padding = call.attribute("padding_mode", "zeros")
    corners = bool(call.attribute("align_corners", 0))
    sampled: Tensor = F.grid_sample(x, grid, _SAMPLERS.get(mode, mode), padding, corners)
    return sampled
