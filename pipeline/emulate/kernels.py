"""What the operators of inference graphs compute, as pure functions on torch tensors.

Nothing here knows of a graph format, so that every executor shares it. Floating-point arguments are
float32 tensors whose values are representable in the graph's own type; results are float32 and
not yet rounded: that is the executor's step. Products and sums accumulate in float32.

Layouts are those of ONNX and Core ML: (batch, channels, *space) for what has channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.emulate import beside, rounding, windows

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
        partial: Round the running sum every `ACCUMULATION_STEP` products: those of one position of
            the kernel after the other, all channels of a group at each, which is how tensor cores
            read images with channels last.

    Returns:
        (batch, channels out, *space').
    """
    if partial is not None and weight[0].numel() > ACCUMULATION_STEP:
        x = pad(x, [(0, 0), (0, 0), *pads])
        total = _conv_in_steps(x, weight, strides, dilations, groups, partial)
        return total if bias is None else total + bias.reshape(-1, *[1] * (x.ndim - 2))
    way = _way(x.shape[1:], weight.shape, tuple(strides), tuple(pads), tuple(dilations), groups)
    if way.pads_before:
        x = pad(x, [(0, 0), (0, 0), *pads])
    if way.moves_by_one and x.dtype == torch.float32:
        if way.general and _has_the_same_bits(
            tuple(x.shape[1:]), tuple(weight.shape[2:]), way.padding
        ):
            return _by_pixels(x, weight, bias, way.padding)
        if beside.is_beside() and _depends_on_threads(x, weight, groups):
            return torch.mkldnn_convolution(
                x, weight, bias, way.padding, way.strides, way.dilations, groups
            )
    settings = (way.strides, way.padding, way.dilations, groups)
    return _CONVOLVE[x.ndim](x, weight, bias, *settings)


@dataclass(frozen=True, slots=True)
class _Way:
    """How convolutions of one shape are carried out.

    Attributes:
        strides: As torch takes them.
        padding: What torch's operation pads on both ends of each spatial axis.
        dilations: As torch takes them.
        pads_before: The padding is not symmetric, and has to be done before.
        moves_by_one: Over images, by one value at a time.
        general: A depthwise one that is wide, or of which much lies beyond the image at every
            place. oneDNN computes these by a general form, in up to twenty times the time, unless a
            pixel's channels lie side by side.
    """

    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_before: bool
    moves_by_one: bool
    general: bool


_WIDE = 10
"""Columns of a depthwise kernel from which oneDNN's kernels for a channel after the other (AVX2) do
not take it."""


@lru_cache(maxsize=4096)
def _way(
    image: tuple[int, ...],
    weight: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilations: tuple[int, ...],
    groups: int,
) -> _Way:
    """Told once a shape: small layers take less time than this does."""
    symmetric = all(before == behind for before, behind in pads)
    depthwise = groups == image[0] == weight[0]
    beyond = all(before > size for (before, _), size in zip(pads, image[1:], strict=True))
    return _Way(
        strides,
        tuple(before if symmetric else 0 for before, _ in pads),
        dilations,
        pads_before=not symmetric,
        moves_by_one=len(image) == 3 and {*strides, *dilations} == {1},
        general=symmetric and depthwise and (beyond or weight[-1] >= _WIDE),
    )


_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By the rank of the input."""


@cache
def _has_the_same_bits(
    image: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, ...]
) -> bool:
    """Whether a depthwise convolution has them pixel by pixel: tried on noise.

    It has those of the general form, which adds the bias last, and not those of others.
    """
    draw = np.random.default_rng(0)  # torch's own refuses to draw where `torch.vmap` runs
    x, weight, bias = (
        torch.from_numpy(draw.standard_normal(shape, np.float32))
        for shape in ((4, *image), (image[0], 1, *kernel), image[:1])
    )
    whole = F.conv2d(x, weight, bias, 1, padding, 1, image[0])
    return torch.equal(_by_pixels(x, weight, bias, padding), whole)


def _by_pixels(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """Convolve depthwise with the channels of a pixel side by side."""
    # Not by `memory_format`, which `torch.vmap` does not know.
    pixels = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight, bias, 1, padding, 1, len(weight)).contiguous()


_FEW_VALUES = 20480
"""Of one image, up to which torch does not take oneDNN for a small kernel."""


def _depends_on_threads(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether torch takes oneDNN's convolution where it has several threads, and may not with one.

    So it does for kernels of a single value that move by one (`use_mkldnn` in ATen's
    Convolution.cpp). The kernels' sums differ in the last bits, and part of a batch that has a
    thread of its own is to have those of the whole batch.
    """
    return (
        set(weight.shape[2:]) == {1}
        and (len(x) > 1 or groups > 1 or x.numel() > _FEW_VALUES)
        and torch.backends.mkldnn.is_available()
    )


def _conv_in_steps(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    partial: Rounding,
) -> Tensor:
    """Convolve a padded input, rounding the running sum after each step of products."""
    ordered = weight.movedim(1, -1)  # channels last, as the products are counted
    products = ordered[0].numel()
    grouped = x.unflatten(1, (groups, weight.shape[1]))
    total: Tensor | None = None
    for start in range(0, products, ACCUMULATION_STEP):
        # The box alone is masked: all of a classifier of VGG at each of 1,568 steps takes hours.
        step = torch.zeros(products)
        step[start : start + ACCUMULATION_STEP] = 1
        step = step.reshape(ordered.shape[1:])
        box = _bounding_box(step)
        part = (ordered[(slice(None), *box)] * step[tuple(box)]).movedim(-1, 1)
        seen = grouped[
            (slice(None), slice(None), box[-1], *_reach(x, weight, box, strides, dilations))
        ]
        seen = seen.flatten(1, 2)
        term = _CONVOLVE[x.ndim](seen, part, None, tuple(strides), 0, tuple(dilations), groups)
        total = partial(term if total is None else total + term)
    assert total is not None
    return total


def _bounding_box(mask: Tensor) -> list[slice]:
    """The smallest box around what is not zero."""
    found = mask.nonzero()
    low, high = found.amin(0).tolist(), found.amax(0).tolist()
    return [slice(first, last + 1) for first, last in zip(low, high, strict=True)]


def _reach(
    x: Tensor,
    weight: Tensor,
    box: Sequence[slice],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[slice]:
    """What a part of the kernel reads of each spatial axis."""
    reach = []
    for size, kernel, part, s, d in zip(
        x.shape[2:], weight.shape[2:], box, strides, dilations, strict=False
    ):
        positions = (size - (kernel - 1) * d - 1) // s + 1
        reach.append(slice(part.start * d, (positions - 1) * s + (part.stop - 1) * d + 1))
    return reach


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    *,
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
    partial: Rounding | None = None,
) -> Tensor:
    """Transposed convolution, before anything is cut off.

    Args:
        x: (batch, channels, *space).
        weight: (channels, channels out / groups, *kernel).
        strides: One a spatial axis.
        dilations: One a spatial axis.
        groups: Groups of channels that do not mix.
        partial: Round the running sum every `ACCUMULATION_STEP` products, those with the zeros
            between the strides among them.

    Returns:
        (batch, channels out, *space'), space' = (space - 1) stride + (kernel - 1) dilation + 1.
    """
    if partial is None:
        convolve = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.ndim]
        whole: Tensor = convolve(x, weight, None, tuple(strides), 0, 0, groups, tuple(dilations))
        return whole
    length = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *length)
    every = [slice(None), slice(None), *(slice(None, None, s) for s in strides)]
    spread[tuple(every)] = x
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    turned = turned.flip(list(range(2, x.ndim)))
    edges = [(k - 1) * d for k, d in zip(weight.shape[2:], dilations, strict=True)]
    return conv(
        spread,
        turned,
        strides=[1] * len(edges),
        pads=[(edge, edge) for edge in edges],
        dilations=dilations,
        groups=groups,
        partial=partial,
    )


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


def einsum(equation: str, inputs: Sequence[Tensor], *, partial: Rounding | None = None) -> Tensor:
    """Sum of products as Einstein wrote it.

    Args:
        equation: As ONNX and torch write it.
        inputs: The operands.
        partial: Round the running sum every `ACCUMULATION_STEP` products; of two operands whose
            axes all have names. Other sums are rounded by the executor alone.
    """
    equation = equation.replace(" ", "")
    terms, arrow, result = equation.partition("->")
    names = terms.split(",")
    plain = arrow and "." not in equation and all(len(set(n)) == len(n) for n in names)
    if partial is None or len(names) != 2 or not plain:
        return torch.einsum(equation, *inputs)
    return _einsum_of_two(names, result, inputs, partial)


def _einsum_of_two(
    names: Sequence[str], result: str, inputs: Sequence[Tensor], partial: Rounding
) -> Tensor:
    """As a matrix product, of which partial sums can be rounded."""
    a, b = names
    shared = "".join(n for n in a if n in b and n in result)
    summed = "".join(n for n in a if n in b and n not in result)
    left = "".join(n for n in a if n in result and n not in b)
    right = "".join(n for n in b if n in result and n not in a)
    sizes = {
        n: size
        for name, x in zip(names, inputs, strict=True)
        for n, size in zip(name, x.shape, strict=True)
    }

    def matrix(name: str, x: Tensor, rows: str, columns: str) -> Tensor:
        ordered = torch.einsum(f"{name}->{shared}{rows}{columns}", x)
        groups = (shared, rows, columns)
        return ordered.reshape([math.prod(sizes[n] for n in group) for group in groups])

    first, second = matrix(a, inputs[0], left, summed), matrix(b, inputs[1], summed, right)
    product = matmul(first, second, partial=partial)
    order = shared + left + right
    return torch.einsum(f"{order}->{result}", product.reshape([sizes[n] for n in order]))


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int],
    ceil: bool = False,
) -> Tensor:
    """Largest value of each window; (batch, channels, *space) -> (batch, channels, *space').

    Args:
        x: (batch, channels, *space), floating-point or integers.
        kernel: Window size.
        strides: Strides.
        pads: Before and behind each spatial axis; what is there is never the largest.
        dilations: Dilations.
        ceil: Keep a last, incomplete window that begins before the padding behind.
    """
    if not x.is_floating_point():  # torch pools few kinds of integers; float64 holds 53 bits
        settings = {"strides": strides, "pads": pads, "dilations": dilations, "ceil": ceil}
        return max_pool(x.double(), kernel, **settings).to(x.dtype)  # type: ignore[arg-type]
    axes = windows.lay(x.shape[2:], kernel, strides, pads, dilations, ceil=ceil)
    padding = (0,) * len(kernel)
    if ceil:
        x = windows.pad_for(axes, x, -math.inf)
    else:
        x, padding = _symmetric_padding(x, pads, -math.inf, limit=[k // 2 for k in kernel])
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[x.ndim - 2]
    pooled: Tensor = pool(x, tuple(kernel), tuple(strides), padding, tuple(dilations))
    return pooled


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    *,
    strides: Sequence[int],
    pads: Pads,
    dilations: Sequence[int] | None = None,
    ceil: bool = False,
    count_padding: bool = False,
) -> Tensor:
    """Mean of each window.

    Args:
        x: (batch, channels, *space).
        kernel: Window size.
        strides: Strides.
        pads: Zeros before and behind each spatial axis.
        dilations: Dilations; 1 by default.
        ceil: Keep a last, incomplete window that begins before the padding behind.
        count_padding: Padding counts in the divisor.

    Returns:
        (batch, channels, *space').
    """
    dilations = [1] * len(kernel) if dilations is None else dilations
    padded, padding = _symmetric_padding(x, pads, 0.0, limit=[k // 2 for k in kernel])
    fits = all(k <= n for k, n in zip(kernel, x.shape[2:], strict=True))  # or torch may refuse
    if padded is x and fits and not ceil and set(dilations) <= {1}:
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
        return pool(x, tuple(kernel), tuple(strides), padding, False, count_padding)
    axes = windows.lay(x.shape[2:], kernel, strides, pads, dilations, ceil=ceil)
    return windows.sums(axes, x) / windows.counts(axes, count_padding=count_padding).to(x.dtype)


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
    # F.instance_norm refuses to normalize a single value, which gives beta.
    return torch.group_norm(x, x.shape[1], gamma, beta, epsilon)


def group_norm(x: Tensor, groups: int, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Normalize each group of channels of each sample; gamma and beta are (channels,)."""
    return torch.group_norm(x, groups, gamma, beta, epsilon)


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Multiply x by the normal distribution function of x, exact by erf or approximated by tanh."""
    result = F.gelu(x, approximate=approximate)
    # torch's vectorized kernel makes NaN of +inf, which stays what it is; -inf times 0 is NaN.
    # Whether there is one is not asked: torch.vmap could not answer that for many images at once.
    # So every NaN becomes +inf, and what is added makes NaN of those that -inf and NaN had given:
    # 0 times a negative number is -0, which changes nothing. torch.where takes four times as long.
    result = result.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return result.add_(x.clamp(max=-1.0), alpha=0.0)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays NaN, of which torch.sign makes 0."""
    if not x.is_floating_point():
        return torch.sign(x)
    return torch.where(x.isnan(), x, torch.sign(x))


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
    "prod": lambda x, dims, keep: _product(x, dims, keep),
    "l1": lambda x, dims, keep: x.abs().sum(dims, keep),
    "l2": lambda x, dims, keep: x.square().sum(dims, keep).sqrt(),
    "sum_square": lambda x, dims, keep: x.square().sum(dims, keep),
    "log_sum": lambda x, dims, keep: x.sum(dims, keep).log(),
    "log_sum_exp": lambda x, dims, keep: x.logsumexp(dims, keep),
}

_FRACTIONS = frozenset({"mean", "l2", "log_sum", "log_sum_exp"})
"""Reductions whose result is no integer even where their input is."""


def reduce(kind: str, x: Tensor, axes: Sequence[int], *, keep: bool) -> Tensor:
    """Reduce `axes` of x.

    Args:
        kind: mean, sum, max, min, prod, l1, l2, sum_square, log_sum or log_sum_exp.
        x: Any shape. Integers give integers: what is no integer is cut off towards zero.
        axes: The axes; none reduces nothing, but squares or takes magnitudes all the same. An empty
            axis gives what an operation begins with: the smallest value for max.
        keep: Keep the reduced axes with length 1.
    """
    if x.ndim == 0 or not axes:
        # torch would reduce every axis: give it an axis of length 1.
        return reduce(kind, x.unsqueeze(-1), [-1], keep=False)
    if kind in ("max", "min") and any(x.shape[axis] == 0 for axis in axes):
        return _extreme_of_nothing(kind, x, axes, keep)
    if kind in _FRACTIONS and not x.is_floating_point():
        return _REDUCTIONS[kind](x.double(), list(axes), keep).trunc().to(x.dtype)
    return _REDUCTIONS[kind](x, list(axes), keep)


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in dims), reverse=True):
        x = x.prod(axis, keep)
    return x


def _extreme_of_nothing(kind: str, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        fill: float = math.inf
        low, high = -fill, fill
    else:
        low, high = rounding.bounds(x.dtype)
    shape = x.sum(list(axes), keep).shape
    return torch.full(shape, low if kind == "max" else high, dtype=x.dtype)


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
    """Slice each of `axes` from start to end, negative ones counted from the axis's end.

    What is out of range is limited as ONNX says. Going backwards that is not Python's rule: a start
    before the first value becomes the first value, of which Python takes none.
    """
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        positions = _positions(start, end, step, x.shape[axis])
        if step > 0:
            keys: list[slice] = [slice(None)] * x.ndim
            keys[axis] = slice(positions.start, positions.stop, step)
            x = x[tuple(keys)]
        else:
            x = x.index_select(axis, torch.tensor(positions, dtype=torch.long))
    return x


def _positions(start: int, end: int, step: int, size: int) -> range:
    lowest, highest = (0, size) if step > 0 else (-1, size - 1)
    start, end = (n + size if n < 0 else n for n in (start, end))
    first = min(max(start, 0), highest)
    return range(first, min(max(end, lowest), highest), step)


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
        position += _spread(zero_point, x, axis, block)
    return position


def dequantize(
    position: Tensor, scale: Tensor, zero_point: Tensor | None, *, axis: int, block: int
) -> Tensor:
    """The inverse of `quantize`: (position - zero point) * scale, in float32."""
    # A copy, so that the rest needs no further memory: allocating costs more than computing.
    value = position.to(torch.float32, copy=True)
    if zero_point is not None:
        value -= _spread(zero_point, position, axis, block)
    return value.mul_(_spread(scale, position, axis, block))


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
