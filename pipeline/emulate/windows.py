"""Where the windows of pooling operations lie, one spatial axis at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows along one axis.

    Attributes:
        size: Length of the axis.
        kernel: Values that a window takes.
        stride: Distance from window to window.
        before: Padding before the axis.
        behind: Padding behind it, as the operation declares it.
        dilation: Distance between the values of a window.
        count: Windows.
    """

    size: int
    kernel: int
    stride: int
    before: int
    behind: int
    dilation: int
    count: int

    @property
    def padding(self) -> tuple[int, int]:
        """Padding with which every window lies inside."""
        end = (self.count - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return self.before, max(0, end - self.size - self.before)

    def values(self, *, count_padding: bool) -> Tensor:
        """Values in each window, with those of the declared padding or without; (count,)."""
        first = torch.arange(self.count)[:, None] * self.stride - self.before
        places = first + torch.arange(self.kernel) * self.dilation
        low, high = 0, self.size
        if count_padding:
            low, high = -self.before, self.size + self.behind
        return ((places >= low) & (places < high)).sum(1)


def lay(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    *,
    ceil: bool = False,
) -> list[Windows]:
    """Lay windows over the spatial axes of an input.

    Args:
        size: Spatial size.
        kernel: Window size.
        strides: Strides.
        pads: Before and behind each axis.
        dilations: Dilations.
        ceil: Keep a last window that reaches beyond the padding. None begins in the padding
            behind: ONNX's rule, and torch's.

    Raises:
        ValueError: A window would hold nothing but padding.
    """
    axes = []
    for n, k, s, (before, behind), d in zip(size, kernel, strides, pads, dilations, strict=True):
        free = n + before + behind - (k - 1) * d - 1
        count = (math.ceil(free / s) if ceil else free // s) + 1
        if ceil and (count - 1) * s >= n + before:
            count -= 1
        if count < 1:
            raise ValueError(f"a window of {(k - 1) * d + 1} does not fit {n} and its padding")
        axes.append(Windows(n, k, s, before, behind, d, count))
    if not all(axis.values(count_padding=False).all() for axis in axes):
        raise ValueError(
            f"a window holds nothing but padding: kernel {list(kernel)}, pads {list(pads)}"
        )
    return axes


def pad_for(axes: Sequence[Windows], x: Tensor, value: float) -> Tensor:
    """Pad (batch, channels, *space) so that every window lies inside."""
    # torch counts from the last axis.
    return F.pad(x, [n for axis in reversed(axes) for n in axis.padding], value=value)


def sums(axes: Sequence[Windows], x: Tensor) -> Tensor:
    """Sum of each window; (batch, channels, *space) -> (batch, channels, *counts)."""
    x = pad_for(axes, x, 0.0)
    for number, axis in enumerate(axes, start=2):
        length = (axis.count - 1) * axis.stride + 1
        taps = [x.narrow(number, tap * axis.dilation, length) for tap in range(axis.kernel)]
        chosen = (*[slice(None)] * number, slice(None, None, axis.stride))
        x = torch.stack([tap[chosen] for tap in taps]).sum(0)
    return x


def counts(axes: Sequence[Windows], *, count_padding: bool) -> Tensor:
    """Values in each window; (*counts), float32."""
    total = torch.ones(())
    for axis in axes:
        total = total[..., None] * axis.values(count_padding=count_padding)
    return total


def places_of_largest(axes: Sequence[Windows], x: Tensor) -> list[Tensor]:
    """The place, along each spatial axis, of the first largest value of each window."""
    padded = pad_for(axes, x.double(), -math.inf)
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(axes)]
    kernel, strides = [axis.kernel for axis in axes], [axis.stride for axis in axes]
    dilations = [axis.dilation for axis in axes]
    _, flat = pool(padded, kernel, strides, 0, dilations, return_indices=True)
    places = torch.unravel_index(flat, padded.shape[2:])
    return [place - axis.before for place, axis in zip(places, axes, strict=True)]
