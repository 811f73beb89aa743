"""The operations of ML Programs that mix elements: convolutions, products, norms, reductions.

See `table` for the conventions. Functions with a parameter `partial` sum products or values and
can do so in a narrow accumulator; the others sum in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.kernels import ACCUMULATION_STEP, Rounding
from pipeline.emulate.mil.operators.table import Whole, ints, operator


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Whole | None = None,
    pad_type: str = "valid",
    pad: Whole | None = None,
    dilations: Whole | None = None,
    groups: Tensor | int = 1,
    partial: Rounding | None = None,
) -> Tensor:
    """Convolve over one, two or three spatial axes."""
    axes = x.ndim - 2
    stride = [1] * axes if strides is None else ints(strides)
    dilation = [1] * axes if dilations is None else ints(dilations)
    pads = _pads(pad_type, pad, x.shape[2:], weight.shape[2:], stride, dilation)
    return kernels.conv(
        x,
        weight,
        bias,
        strides=stride,
        pads=pads,
        dilations=dilation,
        groups=int(groups),
        partial=partial,
    )


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Whole | None = None,
    output_shape: Whole | None = None,
    pad_type: str = "valid",
    strides: Whole | None = None,
    dilations: Whole | None = None,
    groups: Tensor | int = 1,
    partial: Rounding | None = None,
) -> Tensor:
    """Transposed convolution: the full result, of which padding crops the border.

    `output_shape`, which coremltools adds to every program of fixed sizes, has to say what follows
    from the padding: what a device makes of other sizes is not documented.
    """
    axes = x.ndim - 2
    if pad_type not in ("valid", "custom"):
        raise UnsupportedOperatorError(f"conv_transpose with pad_type '{pad_type}'")
    stride = [1] * axes if strides is None else ints(strides)
    dilation = [1] * axes if dilations is None else ints(dilations)
    full = kernels.conv_transpose(
        x, weight, strides=stride, dilations=dilation, groups=int(groups), partial=partial
    )
    if bias is not None:
        full = full + bias.reshape(-1, *[1] * axes)
    pads = _pads(pad_type, pad, x.shape[2:], weight.shape[2:], stride, dilation)
    crops = [(-before, -behind) for before, behind in pads]
    result = kernels.pad(full, [(0, 0), (0, 0), *crops])
    if output_shape is not None and ints(output_shape) != list(result.shape):
        raise UnsupportedOperatorError(
            f"conv_transpose with output_shape {ints(output_shape)} where its padding gives "
            f"{list(result.shape)}"
        )
    return result


@operator("linear")
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, partial: Rounding | None = None
) -> Tensor:
    """Multiply by the transpose of a weight of shape (out, in), and add the bias."""
    if partial is None:
        return F.linear(x, weight, bias)
    product = kernels.matmul(x, weight.mT, partial=partial)
    return product if bias is None else product + bias


@operator("matmul")
def matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: Tensor | bool = False,
    transpose_y: Tensor | bool = False,
    partial: Rounding | None = None,
) -> Tensor:
    """Matrix product with numpy's broadcasting; transposing does nothing to a vector."""
    common = torch.promote_types(x.dtype, y.dtype)  # one of them may hold integers
    a = x.mT if transpose_x and x.ndim > 1 else x
    b = y.mT if transpose_y and y.ndim > 1 else y
    return kernels.matmul(a.to(common), b.to(common), partial=partial)


@operator("einsum")
def einsum(values: tuple[Tensor, ...], equation: str, partial: Rounding | None = None) -> Tensor:
    """Products and sums as Einstein's notation names them."""
    return kernels.einsum(equation, values, partial=partial)


@operator("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    partial: Rounding | None = None,
) -> Tensor:
    """softmax(query keyᵀ / √depth + mask) value; a boolean mask tells which keys take part."""
    scores = kernels.matmul(query, key.mT, partial=partial) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return kernels.matmul(torch.softmax(scores, -1), value, partial=partial)


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Whole,
    strides: Whole | None = None,
    pad_type: str = "valid",
    pad: Whole | None = None,
    exclude_padding_from_average: Tensor | bool = False,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Mean of each window; padding counts unless it is excluded."""
    kernel = ints(kernel_sizes)
    stride = [1] * len(kernel) if strides is None else ints(strides)
    return kernels.average_pool(
        x,
        kernel,
        strides=stride,
        pads=_pads(pad_type, pad, x.shape[2:], kernel, stride, [1] * len(kernel)),
        ceil=bool(ceil_mode),
        count_padding=not exclude_padding_from_average,
    )


@operator("max_pool", selects=True)
def max_pool(
    x: Tensor,
    kernel_sizes: Whole,
    strides: Whole | None = None,
    pad_type: str = "valid",
    pad: Whole | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Largest value of each window."""
    kernel = ints(kernel_sizes)
    stride = [1] * len(kernel) if strides is None else ints(strides)
    ones = [1] * len(kernel)
    return kernels.max_pool(
        x,
        kernel,
        strides=stride,
        pads=_pads(pad_type, pad, x.shape[2:], kernel, stride, ones),
        dilations=ones,
        ceil=bool(ceil_mode),
    )


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Normalize each channel by given statistics."""
    scale = torch.ones_like(mean) if gamma is None else gamma
    shift = torch.zeros_like(mean) if beta is None else beta
    return kernels.batch_norm(x, scale, shift, mean, variance, float(epsilon))


@operator("instance_norm")
def instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Normalize each channel of each sample over its space."""
    scale = x.new_ones(x.shape[1]) if gamma is None else gamma
    shift = x.new_zeros(x.shape[1]) if beta is None else beta
    return kernels.instance_norm(x, scale, shift, float(epsilon))


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    """Divide by the root of epsilon plus the squares' sum over the last three axes."""
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Whole | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Normalize over `axes`, by default over all."""
    dims = list(range(x.ndim)) if axes is None else ints(axes)
    return kernels.layer_norm(x, dims, gamma, beta, float(epsilon))


def _summing(mean: bool) -> Callable[..., Tensor]:
    def evaluate(
        x: Tensor,
        axes: Whole | None = None,
        keep_dims: Tensor | bool = False,
        partial: Rounding | None = None,
    ) -> Tensor:
        dims = _dims(x, axes)
        if partial is None:
            return kernels.reduce("mean" if mean else "sum", x, dims, keep=bool(keep_dims))
        total = _narrow_sum(x, dims, partial)
        if mean:
            total = total / math.prod(x.shape[dim] for dim in dims)
        return total if keep_dims else total.squeeze(dims)

    return evaluate


def _reducing(kind: str) -> Callable[..., Tensor]:
    def evaluate(x: Tensor, axes: Whole | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        return kernels.reduce(kind, x, _dims(x, axes), keep=bool(keep_dims))

    return evaluate


operator("reduce_mean")(_summing(mean=True))
operator("reduce_sum")(_summing(mean=False))
operator("reduce_max", selects=True)(_reducing("max"))
operator("reduce_min", selects=True)(_reducing("min"))
operator("reduce_l1_norm")(_reducing("l1"))
operator("reduce_l2_norm")(_reducing("l2"))
operator("reduce_sum_square")(_reducing("sum_square"))
operator("reduce_log_sum_exp")(_reducing("log_sum_exp"))


@operator("reduce_argmax")
def reduce_argmax(
    x: Tensor,
    axis: Tensor | int = -1,
    keep_dims: Tensor | bool = False,
    output_dtype: str = "int32",
) -> Tensor:
    """Position of the largest value along an axis."""
    del output_dtype  # the declared type says the same
    return x.argmax(int(axis), bool(keep_dims))


@operator("cumsum")
def cumsum(
    x: Tensor,
    axis: Tensor | int = 0,
    exclusive: Tensor | bool = False,
    reverse: Tensor | bool = False,
) -> Tensor:
    """Running sum along an axis; `exclusive` leaves each element out of its own sum."""
    dim = int(axis)
    terms = x.flip(dim) if reverse else x
    if exclusive:
        # Shifted rather than subtracted afterwards: that would lose small sums beside large terms.
        first = torch.zeros_like(terms.narrow(dim, 0, min(1, terms.shape[dim])))
        terms = torch.cat([first, terms.narrow(dim, 0, max(0, terms.shape[dim] - 1))], dim)
    total = terms.cumsum(dim)
    return total.flip(dim) if reverse else total


@operator("quantize")
def quantize(
    input: Tensor,  # the format's name
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | int = 0,
) -> Tensor:
    """Round input / scale half to even, add the zero point, limit to the range of the type."""
    position = kernels.quantize(input, scale, zero_point, axis=int(axis), block=0, integer=True)
    limits = torch.iinfo({"int8": torch.int8, "uint8": torch.uint8}[output_dtype])
    return position.clamp(limits.min, limits.max)


@operator("dequantize")
def dequantize(
    input: Tensor,  # the format's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: Tensor | int = 0,
) -> Tensor:
    """(input - zero point) * scale."""
    return kernels.dequantize(input, scale, zero_point, axis=int(axis), block=0)


def _dims(x: Tensor, axes: Whole | None) -> list[int]:
    """Non-negative reduced axes; all of them where none are named."""
    return list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in ints(axes)]


def _narrow_sum(x: Tensor, dims: list[int], partial: Rounding) -> Tensor:
    """Sum with an accumulator that `partial` rounds every `ACCUMULATION_STEP` terms."""
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    terms = x.permute(*kept, *dims).flatten(len(kept))
    terms = F.pad(terms, (0, -terms.shape[-1] % ACCUMULATION_STEP))
    blocks = terms.unflatten(-1, (-1, ACCUMULATION_STEP)).sum(-1)
    total = partial(blocks[..., 0])
    for block in blocks.unbind(-1)[1:]:
        total = partial(total + block)
    return total.reshape([1 if dim in dims else size for dim, size in enumerate(x.shape)])


def _pads(
    pad_type: str,
    pad: Whole | None,
    size: torch.Size,
    kernel: torch.Size | list[int],
    strides: list[int],
    dilations: list[int],
) -> list[tuple[int, int]]:
    """The padding before and behind each spatial axis."""
    if pad_type in ("same", "same_lower"):
        behind = pad_type == "same"
        return kernels.same_pads(size, kernel, strides, dilations, extra_behind=behind)
    if pad_type == "valid" or pad is None:
        return [(0, 0)] * len(size)
    if pad_type != "custom":
        raise UnsupportedOperatorError(f"padding of type '{pad_type}'")
    flat = ints(pad)
    return list(zip(flat[0::2], flat[1::2], strict=True))
