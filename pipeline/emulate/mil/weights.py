"""Decompressing the weights of an ML Program: its `constexpr_*` operations, in numpy.

coremltools stores compressed weights as constants and an operation that Core ML evaluates when it
loads the model. There are two generations: iOS 16 and 17 pack indices and masks into bytes and give
the shape beside them; iOS 18 types them (uint4, uint1), allows blocks and vectors, and lets one
operation take another's results, as in a pruned and quantized weight.

Each function takes the operation's parameters by name. Arithmetic is in float32; `decompress`
rounds to the declared type, which for float16 scales and tables is the exact result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.emulate.mil.constants import Array, unpack_bits

Decompressor = Callable[..., Array | tuple[Array, ...]]

DECOMPRESSORS: dict[str, Decompressor] = {}


def decompressor(function: Decompressor) -> Decompressor:
    """Register a function under its own name as an operation's evaluation."""
    DECOMPRESSORS[function.__name__] = function
    return function


@decompressor
def constexpr_affine_dequantize(
    *, quantized_data: Array, zero_point: Array, scale: Array, axis: Array
) -> Array:
    """Compute scale * (quantized_data - zero_point); vectors lie along `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    spread_scale = np.asarray(scale, np.float32).reshape(shape)
    spread_zero = np.asarray(zero_point, np.float32).reshape(shape)
    dense: Array = spread_scale * (quantized_data.astype(np.float32) - spread_zero)
    return dense


@decompressor
def constexpr_blockwise_shift_scale(
    *, data: Array, scale: Array, offset: Array | None = None
) -> Array:
    """Compute scale * (data - offset), where one scale and offset serve a block of `data`."""
    value = data.astype(np.float32)
    if offset is not None:
        value = value - _spread_blocks(offset.astype(np.float32), data.shape)
    dense: Array = value * _spread_blocks(scale.astype(np.float32), data.shape)
    return dense


@decompressor
def constexpr_lut_to_dense(
    *,
    indices: Array,
    lut: Array,
    shape: Array | None = None,
    vector_axis: Array | None = None,
) -> Array:
    """Replace indices by entries of a table.

    Args:
        indices: iOS 16: packed into bytes. iOS 18: one number an element.
        lut: iOS 16: the table, (palettes,). iOS 18: a table for each block of the indices, and
            entries that may be vectors: (*blocks, palettes, vector).
        shape: iOS 16 only: shape of the result.
        vector_axis: The axis along which vectors are laid out.
    """
    if shape is None:
        return _look_up(indices, lut, vector_axis)
    sizes = tuple(int(size) for size in shape)
    count = int(np.prod(sizes))
    bits = (lut.size - 1).bit_length()
    found: Array = lut[unpack_bits(indices, bits, count)].reshape(sizes)
    return found


@decompressor
def constexpr_sparse_to_dense(
    *, nonzero_data: Array, mask: Array, shape: Array | None = None
) -> Array:
    """Put values where the mask is set, zeros elsewhere; a packed mask comes with the shape."""
    if shape is not None:
        sizes = tuple(int(size) for size in shape)
        mask = unpack_bits(mask, 1, int(np.prod(sizes))).reshape(sizes)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


@decompressor
def constexpr_lut_to_sparse(
    *,
    indices_mask: Array,
    indices_nonzero_data: Array,
    lut: Array,
    vector_axis: Array | None = None,
) -> tuple[Array, Array]:
    """Look up the indices of a sparse weight; the results are its mask and its values."""
    indices = constexpr_sparse_to_dense(nonzero_data=indices_nonzero_data, mask=indices_mask)
    assert isinstance(indices, np.ndarray)
    dense = _look_up(indices, lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask != 0]


@decompressor
def constexpr_sparse_blockwise_shift_scale(
    *, data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Dequantize the values of a sparse weight; the results are its mask and its values."""
    data = constexpr_sparse_to_dense(nonzero_data=nonzero_data, mask=data_mask)
    assert isinstance(data, np.ndarray)
    dense = constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)
    assert isinstance(dense, np.ndarray)
    return data_mask, dense[data_mask != 0]


@decompressor
def constexpr_cast(*, source_val: Array, output_dtype: str) -> Array:
    """Convert a constant; fp16 to fp32 is the only conversion that the format has."""
    return source_val.astype({"fp32": np.float32, "fp16": np.float16}[output_dtype])


def _spread_blocks(per_block: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each entry over its block: `shape` is a multiple of the entries on every axis."""
    for axis, size in enumerate(shape):
        repeats = size // per_block.shape[axis]
        # An axis with one entry is left to broadcasting, which copies nothing.
        if repeats > 1 and per_block.shape[axis] > 1:
            per_block = np.repeat(per_block, repeats, axis)
    return per_block


def _look_up(indices: Array, lut: Array, vector_axis: Array | None) -> Array:
    blocks: list[Any] = []
    for axis, size in enumerate(indices.shape):
        table = np.arange(size) // (size // lut.shape[axis])
        blocks.append(table.reshape([-1 if i == axis else 1 for i in range(indices.ndim)]))
    found: Array = lut[(*blocks, indices)]  # (*indices.shape, vector)
    if vector_axis is None or found.shape[-1] == 1:
        return found[..., 0]
    axis = int(vector_axis) % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= found.shape[-1]
    return np.moveaxis(found, -1, axis + 1).reshape(shape)
