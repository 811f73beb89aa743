"""The operations of ML Programs that move, select or make values, one small function each.

See `table` for the conventions. What these functions return they found among the values of
their inputs, so nothing is rounded afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.mil.operators.table import Whole, ints, operator


@operator("identity", selects=True)
def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


@operator("reshape", selects=True)
def reshape(x: Tensor, shape: Whole) -> Tensor:
    """Give x a new shape; 0 keeps a size, -1 takes what is left."""
    sizes = ints(shape)
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


@operator("expand_dims", selects=True)
def expand_dims(x: Tensor, axes: Whole) -> Tensor:
    """Insert axes of length 1 at these positions of the result."""
    places = ints(axes)
    rank = x.ndim + len(places)
    for axis in sorted(axis % rank for axis in places):
        x = x.unsqueeze(axis)
    return x


@operator("squeeze", selects=True)
def squeeze(x: Tensor, axes: Whole | None = None) -> Tensor:
    """Remove axes of length 1; longer ones stay."""
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


@operator("transpose", selects=True)
def transpose(x: Tensor, perm: Whole) -> Tensor:
    """Permute the axes."""
    return x.permute(ints(perm))


@operator("flatten2d", selects=True)
def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    """Flatten the axes before `axis` into one, and the others into another."""
    split_at = int(axis) if axis >= 0 else int(axis) + x.ndim
    return x.reshape(x.shape[:split_at].numel(), x.shape[split_at:].numel())


@operator("concat", selects=True)
def concat(values: tuple[Tensor, ...], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    """Join along an axis, one after the other or by turns; scalars become a vector."""
    if values[0].ndim == 0:
        return torch.stack(values)
    dim = int(axis) % values[0].ndim
    if interleave:
        return torch.stack(values, dim + 1).flatten(dim, dim + 1)
    return torch.cat(values, dim)


@operator("stack", selects=True)
def stack(values: tuple[Tensor, ...], axis: Tensor) -> Tensor:
    """Join along a new axis."""
    return torch.stack(values, int(axis))


@operator("split", selects=True)
def split(
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Whole | None = None,
) -> tuple[Tensor, ...]:
    """Cut an axis into equal parts, or into parts of the sizes given."""
    dim = int(axis)
    if split_sizes is not None:
        return torch.split_with_sizes(x, ints(split_sizes), dim)
    if num_splits is None:
        raise UnsupportedOperatorError("split without num_splits and split_sizes")
    return torch.tensor_split(x, int(num_splits), dim)


@operator("slice_by_index", selects=True)
def slice_by_index(
    x: Tensor,
    begin: Whole,
    end: Whole,
    stride: Whole | None = None,
    begin_mask: Whole | None = None,
    end_mask: Whole | None = None,
    squeeze_mask: Whole | None = None,
) -> Tensor:
    """Slice every axis by numpy's rules.

    Where `begin_mask` or `end_mask` is set, the axis is taken from its beginning or to its end;
    where `squeeze_mask` is, the one entry at `begin`, without the axis.
    """
    rank = x.ndim
    steps = [1] * rank if stride is None else ints(stride)
    open_start, open_stop, single = (
        [0] * rank if mask is None else ints(mask) for mask in (begin_mask, end_mask, squeeze_mask)
    )
    for axis, (first, last) in enumerate(zip(ints(begin), ints(end), strict=True)):
        if single[axis]:
            x = x.narrow(axis, _position(first, x.shape[axis]), 1)
            continue
        start = None if open_start[axis] else first
        stop = None if open_stop[axis] else last
        positions = range(*slice(start, stop, steps[axis]).indices(x.shape[axis]))
        if positions != range(x.shape[axis]):
            x = x.index_select(axis, torch.tensor(positions, dtype=torch.long))
    return x.squeeze([axis for axis in range(rank) if single[axis]])


@operator("slice_by_size", selects=True)
def slice_by_size(x: Tensor, begin: Whole, size: Whole) -> Tensor:
    """Take `size` entries of each axis from `begin`; -1 takes all that follow."""
    for axis, (first, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = _position(first, x.shape[axis])
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@operator("gather", selects=True)
def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    """Take entries of `axis`, which the shape of `indices` replaces."""
    del validate_indices  # torch checks always
    if int(batch_dims):
        raise UnsupportedOperatorError(f"gather with batch_dims {int(batch_dims)}")
    return kernels.gather(x, indices, int(axis))


@operator("gather_along_axis", selects=True)
def gather_along_axis(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    """For each position the entry of `axis` that `indices` names there."""
    del validate_indices
    dim = int(axis)
    wrapped = torch.where(indices < 0, indices + x.shape[dim], indices)
    return x.gather(dim, wrapped.long())


@operator("reverse", selects=True)
def reverse(x: Tensor, axes: Whole | None = None) -> Tensor:
    """Turn axes around, by default all."""
    return x.flip(list(range(x.ndim)) if axes is None else ints(axes))


@operator("tile", selects=True)
def tile(x: Tensor, reps: Whole) -> Tensor:
    """Repeat x along each axis."""
    return x.repeat(ints(reps))


@operator("pad", selects=True)
def pad(
    x: Tensor,
    pad: Whole,
    mode: str = "constant",
    constant_val: Tensor | float = 0.0,
) -> Tensor:
    """Pad the last axes: `pad` holds before and behind for each of them."""
    flat = ints(pad)
    pairs = list(zip(flat[0::2], flat[1::2], strict=True))
    pads = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise UnsupportedOperatorError(f"pad with mode '{mode}'")
    return kernels.pad(x, pads, names[mode], float(constant_val))


@operator("select", selects=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Take a where the condition holds, else b."""
    return torch.where(cond, a, b)


@operator("fill", selects=True)
def fill(shape: Whole, value: Tensor | float = 0.0) -> Tensor:
    """Make a tensor of one value."""
    return torch.as_tensor(value).expand(ints(shape))


@operator("fill_like", selects=True)
def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """Make a tensor of one value with the shape of another."""
    return torch.as_tensor(value).expand(ref_tensor.shape)


@operator("shape")
def shape(x: Tensor) -> Tensor:
    """The sizes of x."""
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """Numbers from start to before end."""
    return torch.arange(start.item(), end.item(), step.item())


@operator("topk", selects=True)
def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,
    return_indices: Tensor | bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The largest (ascending: smallest) entries of an axis and where they are."""
    del sort, output_indices_dtype
    values, indices = x.topk(int(k), int(axis), largest=not ascending)
    return (values, indices) if return_indices else (values,)


@operator("depth_to_space", selects=True)
def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """Move blocks of channels into space: the block is the outer part of the channel index."""
    block = int(block_size)
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, block, block, channels // block**2, height, width)
    spread = blocks.permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(batch, channels // block**2, height * block, width * block)


@operator("space_to_depth", selects=True)
def space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    """The inverse of `depth_to_space`."""
    block = int(block_size)
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // block, block, width // block, block)
    gathered = blocks.permute(0, 3, 5, 1, 2, 4)
    return gathered.reshape(batch, channels * block**2, height // block, width // block)


@operator("pixel_shuffle", selects=True)
def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    """Move channels into space as torch does: the block is the inner part of the channel index."""
    return F.pixel_shuffle(x, int(upscale_factor))


@operator("pixel_unshuffle", selects=True)
def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    """The inverse of `pixel_shuffle`."""
    return F.pixel_unshuffle(x, int(downscale_factor))


@operator("band_part", selects=True)
def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Keep so many diagonals below and above the main one, all if negative; zeros elsewhere."""
    rows, columns = x.shape[-2:]
    if lower >= 0:
        x = x.triu(-int(lower)) if rows else x
    if upper >= 0:
        x = x.tril(int(upper)) if columns else x
    return x


@operator("argsort", selects=True)
def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    """Where the sorted values of an axis are, the largest first; equal ones in their order."""
    return torch.argsort(x, dim=int(axis), descending=not ascending, stable=True)


@operator("crop", selects=True)
def crop(x: Tensor, crop_height: Whole, crop_width: Whole) -> Tensor:
    """Cut so many rows and columns off, before and behind, of (batch, channels, height, width)."""
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _position(index: int, size: int) -> int:
    """An index that may count from the end, from the beginning."""
    return index if index >= 0 else index + size
