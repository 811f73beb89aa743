"""What the operators of inference graphs compute, as pure functions on torch tensors.

Nothing here knows of a graph format, so that every executor shares it. Floating-point arguments are
float32 tensors whose values are representable in the graph's own type; results are float32 and
not yet rounded: that is the executor's step. Products and sums accumulate in float32.

Layouts are those of ONNX and Core ML: (batch, channels, *space) for what has channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""Rounds a partial sum to the type of a narrow accumulator."""

Pads = Sequence[tuple[int, int]]
"""For each spatial axis the padding before and behind it."""

ACCUMULATION_STEP = 16
"""Products that a tensor core (m16n8k16) sums before it rounds into a narrow accumulator."""


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    groups: int = 1,
    partial: Rounding | None = None,
) -> Tensor:
    """Convolve over one, two or three spatial axes.

    Args:
        x: (batch, channels, *space).
        weight: (channels out, channels / groups, *kernel).
        bias: (channels out,).
        strides: One a spatial axis.
        pads: Zeros before and behind each spatial axis.
        dilations: One a spatial axis.
        groups: Groups of channels that do not mix.
        partial: Round the running sum every `ACCUMULATION_STEP` input channels of a group.

    Returns:
        (batch, channels out, *space').
    """
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2]
    x, padding = _symmetric_padding(x, pads, 0.0)
    settings = (tuple(strides), padding, tuple(dilations), groups)
    depth = weight.shape[1]
    if partial is None or depth <= ACCUMULATION_STEP:
        return convolve(x, weight, bias, *settings)
    grouped = x.reshape(x.shape[0], groups, depth, *x.shape[2:])
    total: Tensor | None = None
    for start in range(0, depth, ACCUMULATION_STEP):
        piece = slice(start, start + ACCUMULATION_STEP)
        term = convolve(grouped[:, :, piece].flatten(1, 2), weight[:, piece], None, *settings)
        total = partial(term if total is None else total + term)
    assert total is not None
    return total if bias is None else total + bias.reshape(-1, *[1] * (x.ndim - 2))


def same_pads(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    *,
    extra_behind: bool = True,
) -> list[tuple[int, int]]:
    """The padding with which an operation gives ceil(size / stride) positions on each axis.

    Args:
        size: Spatial size of the input.
        kernel: Kernel size.
        strides: Strides.
        dilations: Dilations.
        extra_behind: Where an odd one goes: behind (ONNX's SAME_UPPER, Core ML's "same") or before.
    """
    pads = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        half = total // 2
        pads.append((half, total - half) if extra_behind else (total - half, half))
    return pads


def matmul(a: Tensor, b: Tensor, *, partial: Rounding | None = None) -> Tensor:
    """Matrix product with numpy's broadcasting.

    Args:
        a: (..., m, k).
        b: (..., k, n).
        partial: Round the running sum every `ACCUMULATION_STEP` products.

    Returns:
        (..., m, n).
    """
    if partial is None or a.shape[-1] <= ACCUMULATION_STEP:
        return a @ b
    column = b if b.ndim > 1 else b[:, None]
    total: Tensor | None = None
    for start in range(0, a.shape[-1], ACCUMULATION_STEP):
        piece = slice(start, start + ACCUMULATION_STEP)
        term = a[..., piece] @ column[..., piece, :]
        total = partial(term if total is None else total + term)
    assert total is not None
    return total if b.ndim > 1 else total[..., 0]


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool = False,
) -> Tensor:
    """Largest value of each window; (batch, channels, *space) -> (batch, channels, *space')."""
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[x.ndim - 2]
    x, padding = _symmetric_padding(x, pads, -math.inf, limit=[k // 2 for k in kernel])
    pooled: Tensor = pool(x, tuple(kernel), tuple(strides), padding, tuple(dilations), ceil)
    return pooled


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    ceil: bool = False,
    count_padding: bool = False,
) -> Tensor:
    """Mean of each window.

    Args:
        x: (batch, channels, *space).
        kernel: Window size.
        strides: Strides.
        pads: Zeros before and behind each spatial axis.
        ceil: Keep a last, incomplete window.
        count_padding: Padding counts in the divisor.

    Returns:
        (batch, channels, *space').
    """
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
    padded, padding = _symmetric_padding(x, pads, 0.0, limit=[k // 2 for k in kernel])
    if padded is x or count_padding:
        return pool(padded, tuple(kernel), tuple(strides), padding, ceil, count_padding)
    # torch averages over the padding that is already in the tensor: divide by the share of it.
    inside, _ = _symmetric_padding(torch.ones_like(x[:1, :1]), pads, 0.0, limit=[0] * len(pads))
    total = pool(padded, tuple(kernel), tuple(strides), 0, ceil)
    return total / pool(inside, tuple(kernel), tuple(strides), 0, ceil)


def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    """Normalize by given statistics; x is (batch, channels, ...), the others (channels,)."""
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


def layer_norm(
    x: Tensor, axes: Sequence[int], gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> Tensor:
    """Normalize over `axes`; `gamma` and `beta` are broadcast to the normalized axes."""
    dims = sorted(axis % x.ndim for axis in axes)
    trailing = dims == list(range(x.ndim - len(dims), x.ndim))
    if trailing:
        shape = x.shape[dims[0] :]
        scale, shift = (t.expand(shape) if t is not None else None for t in (gamma, beta))
        return F.layer_norm(x, shape, scale, shift, epsilon)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normalized = (x - mean) / torch.sqrt(variance + epsilon)
    shape = torch.Size(n if axis in dims else 1 for axis, n in enumerate(x.shape))
    if gamma is not None:
        normalized = normalized * gamma.reshape(shape)
    return normalized if beta is None else normalized + beta.reshape(shape)


def instance_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Normalize each channel of each sample over its space; gamma and beta are (channels,)."""
    return F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def group_norm(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Normalize each group of channels of each sample; gamma and beta are (channels,)."""
    return F.group_norm(x, groups, gamma, beta, epsilon)


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Multiply x by the normal distribution function of x, exact by erf or approximated by tanh."""
    return F.gelu(x, approximate=approximate)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Limit alpha x + beta to between 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


def hard_swish(x: Tensor) -> Tensor:
    """Multiply x by the hard sigmoid with alpha 1/6 and beta 1/2."""
    return F.hardswish(x)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """Keep x where positive, alpha (exp(x) - 1) elsewhere."""
    return F.elu(x, alpha)


def leaky_relu(x: Tensor, slope: float | Tensor) -> Tensor:
    """Keep x where positive, slope times x elsewhere; a tensor of slopes is broadcast to x."""
    return torch.where(x < 0, x * slope, x)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "mean": lambda x, dims, keep: x.mean(dims, keep),
    "sum": lambda x, dims, keep: x.sum(dims, keep),
    "max": lambda x, dims, keep: x.amax(dims, keep),
    "min": lambda x, dims, keep: x.amin(dims, keep),
    "l1": lambda x, dims, keep: x.abs().sum(dims, keep),
    "l2": lambda x, dims, keep: x.square().sum(dims, keep).sqrt(),
    "sum_square": lambda x, dims, keep: x.square().sum(dims, keep),
    "log_sum_exp": lambda x, dims, keep: x.logsumexp(dims, keep),
}


def reduce(kind: str, x: Tensor, axes: Sequence[int], *, keep: bool) -> Tensor:
    """Reduce `axes` of x.

    Args:
        kind: mean, sum, max, min, l1, l2, sum_square or log_sum_exp.
        x: Any shape.
        axes: The axes; none reduces nothing, but squares or takes magnitudes all the same.
        keep: Keep the reduced axes with length 1.
    """
    if x.ndim == 0 or not axes:
        # torch would reduce every axis: give it an axis of length 1.
        return _REDUCTIONS[kind](x.unsqueeze(-1), [-1], False)
    return _REDUCTIONS[kind](x, list(axes), keep)


def pad(x: Tensor, pads: Pads, mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad every axis of x; a negative count crops.

    Args:
        x: Any shape.
        pads: Before and behind each axis.
        mode: constant, edge, reflect (without repeating the edge) or wrap.
        value: The constant.
    """
    if mode == "constant":
        # torch counts from the last axis.
        return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)
    for axis, (before, behind) in enumerate(pads):
        size = x.shape[axis]
        index = torch.arange(-before, size + behind)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            period = max(1, 2 * (size - 1))
            index = (index % period).where(index % period < size, period - index % period)
        x = x.index_select(axis, index)
    return x


def slice_axes(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int],
    steps: Sequence[int],
) -> Tensor:
    """Slice each of `axes` from start to end; Python's rules, negative steps included."""
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        positions = range(*slice(start, end, step).indices(size))
        if step > 0:
            keys: list[slice] = [slice(None)] * x.ndim
            keys[axis] = slice(positions.start, positions.stop, step)
            x = x[tuple(keys)]
        else:
            x = x.index_select(axis, torch.tensor(positions, dtype=torch.long))
    return x


def gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Take entries of `axis`, which the shape of `index` replaces; negative ones from the end."""
    axis = axis % x.ndim
    flat = index.reshape(-1).long()
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    taken = x.index_select(axis, flat)
    return taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, axis: int, block: int, integer: bool
) -> Tensor:
    """Positions on a quantized scale, not yet limited to the range of a type.

    Args:
        x: Any shape.
        scale: One step's size: a scalar, one for each entry of `axis`, or one for each block of it.
        zero_point: The position of zero, shaped like `scale`.
        axis: The axis of `scale`.
        block: Entries of `axis` that share a scale; 0 for no blocks.
        integer: Round half to even, before the zero point is added.

    Returns:
        Float32 positions, shaped like x.
    """
    position = x / _spread(scale, x, axis, block)
    if integer:
        position = position.round_()
    if zero_point is not None:
        position = position + _spread(zero_point, x, axis, block)
    return position


def dequantize(
    position: Tensor, scale: Tensor, zero_point: Tensor | None, *, axis: int, block: int
) -> Tensor:
    """The inverse of `quantize`: (position - zero point) * scale, in float32."""
    value = position.to(torch.float32)
    if zero_point is not None:
        value = value - _spread(zero_point, position, axis, block)
    return value * _spread(scale, position, axis, block)


def _spread(per_axis: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Shape a scale or zero point so that it broadcasts against x; float32."""
    per_axis = per_axis.to(torch.float32)
    if per_axis.numel() == 1:
        return per_axis.reshape(())
    if block:
        spread = per_axis.repeat_interleave(block, dim=axis)
        return spread.narrow(axis, 0, x.shape[axis])
    shape = [1] * x.ndim
    shape[axis] = -1
    return per_axis.reshape(shape)


def _symmetric_padding(
    x: Tensor, pads: Pads, value: float, limit: Sequence[int] | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """Split padding into what is done here and what torch's operation does itself, which is faster.

    Args:
        x: (batch, channels, *space).
        pads: Before and behind each spatial axis.
        value: What to pad with here.
        limit: The most that torch's operation accepts on each axis; None for no limit.

    Returns:
        The tensor, padded if the padding is not symmetric or beyond the limit, and the padding that
        is left to do.
    """
    within = all(
        before == behind and (limit is None or before <= limit[axis])
        for axis, (before, behind) in enumerate(pads)
    )
    if within:
        return x, tuple(before for before, _ in pads)
    return pad(x, [(0, 0), (0, 0), *pads], value=value), (0,) * len(pads)
