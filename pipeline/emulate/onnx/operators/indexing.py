"""Operators that read or write at given positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.emulate import kernels, rounding, windows
from pipeline.emulate.onnx.graph import Node, to_dtype
from pipeline.emulate.onnx.operators.pooling import pairs
from pipeline.emulate.onnx.operators.table import Call, ints, like, operator

_SCATTERED = {"mul": "prod", "max": "amax", "min": "amin"}
"""torch's names of the ways to join values that meet."""


@operator("GatherElements", exact=True)
def _gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.attribute("axis", 0)
    return x.gather(axis, _from_the_start(index, x.shape[axis]))


@operator("GatherND", exact=True)
def _gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    shared = call.attribute("batch_dims", 0)
    depth = index.shape[-1]
    batch = math.prod(x.shape[:shared])
    rows = x.reshape(batch, *x.shape[shared:])
    places = index.reshape(batch, -1, depth)
    number = torch.arange(batch)[:, None]
    taken = rows[(number, *_columns(places, rows.shape[1:]))]
    return taken.reshape(*index.shape[:-1], *x.shape[shared + depth :])


@operator("ScatterElements")
def _scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, kind = call.attribute("axis", 0), call.attribute("reduction", "none")
    places = _from_the_start(index, x.shape[axis])
    if kind == "none":
        return x.scatter(axis, places, updates)
    if kind == "add":
        return x.scatter_add(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _SCATTERED[kind])


@operator("ScatterND")
def _scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    kind = call.attribute("reduction", "none")
    depth = index.shape[-1]
    head = x.shape[:depth]
    place = torch.zeros(index.shape[:-1], dtype=torch.int64)
    for size, column in zip(head, _columns(index, head), strict=True):
        place = place * size + column
    flat = x.reshape(math.prod(head), -1)
    place, updates = place.reshape(-1), updates.reshape(-1, flat.shape[1])
    if kind == "none":
        result = flat.index_copy(0, place, updates)
    elif kind == "add":
        result = flat.index_add(0, place, updates)
    else:
        places = place[:, None].expand_as(updates)
        result = flat.scatter_reduce(0, places, updates, _SCATTERED[kind])
    return result.reshape(x.shape)


@operator("OneHot", result=like(2), exact=True)
def _one_hot(call: Call, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int(depth)
    axis = call.attribute("axis", -1) % (index.ndim + 1)
    # An index outside of the range, counted from the end too, is nowhere.
    place = index.long().unsqueeze(axis)
    place = torch.where(place < 0, place + count, place)
    shape = [1] * (index.ndim + 1)
    shape[axis] = count
    return torch.where(place == torch.arange(count).reshape(shape), values[1], values[0])


@operator("Trilu", exact=True)
def _triangle(call: Call, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    k = 0 if diagonal is None else int(diagonal)
    return x.triu(k) if call.attribute("upper", 1) else x.tril(k)


def _eye_type(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
    wanted = node.attribute("dtype", 0)
    return to_dtype(wanted, f"node {node.name!r}") if wanted else like(0)(node, types)


@operator("EyeLike", result=_eye_type, exact=True)
def _eye_like(call: Call, x: Tensor) -> Tensor:
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
    return (columns - rows == call.attribute("k", 0)).to(rounding.storage(call.dtype))


@operator("DepthToSpace", exact=True)
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    side = call.node.attributes["blocksize"]
    n, channels, height, width = x.shape
    inner = channels // side**2
    if call.attribute("mode", "DCR") == "DCR":
        blocks = x.reshape(n, side, side, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, inner, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, inner, height * side, width * side)


@operator("SpaceToDepth", exact=True)
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    side = call.node.attributes["blocksize"]
    n, channels, height, width = x.shape
    blocks = x.reshape(n, channels, height // side, side, width // side, side)
    if call.attribute("mode", "DCR") == "DCR":
        blocks = blocks.permute(0, 3, 5, 1, 2, 4)
    else:
        blocks = blocks.permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(n, channels * side**2, height // side, width // side)


@operator("Col2Im")
def _columns_to_image(call: Call, x: Tensor, image_shape: Tensor, block_shape: Tensor) -> Tensor:
    size, block = ints(image_shape, []), ints(block_shape, [])
    ones = [1] * len(size)
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    pads = pairs(call.attribute("pads", [0] * (2 * len(size))))
    counts = [axis.count for axis in windows.lay(size, block, strides, pads, dilations)]
    padded = [n + before + behind for n, (before, behind) in zip(size, pads, strict=True)]
    parts = x.reshape(x.shape[0], -1, math.prod(block), *counts)
    image = x.new_zeros(x.shape[0], parts.shape[1], *padded)
    for number, taps in enumerate(itertools.product(*(range(k) for k in block))):
        where = [slice(None), slice(None)]
        for tap, s, d, count in zip(taps, strides, dilations, counts, strict=True):
            where.append(slice(tap * d, tap * d + (count - 1) * s + 1, s))
        image[tuple(where)] += parts[:, :, number]
    return kernels.pad(image, [(0, 0), (0, 0), *((-before, -behind) for before, behind in pads)])


def _from_the_start(index: Tensor, size: int) -> Tensor:
    index = index.long()
    return torch.where(index < 0, index + size, index)


def _columns(index: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The positions along each axis, counted from its start."""
    columns = index.long().unbind(-1)
    return [_from_the_start(c, size) for c, size in zip(columns, sizes, strict=False)]
