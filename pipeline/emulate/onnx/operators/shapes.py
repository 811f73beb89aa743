"""Operators that move values and compute shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.emulate import kernels
from pipeline.emulate.onnx.operators.table import Call, fixed, ints, operator


@operator("Shape", result=fixed(torch.int64), exact=True)
def _shape(call: Call, x: Tensor) -> Tensor:
    end = call.attribute("end", x.ndim)
    return torch.tensor(x.shape[call.attribute("start", 0) : end], dtype=torch.int64)


@operator("Size", result=fixed(torch.int64), exact=True)
def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", exact=True)
def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape, [])
    if not call.attribute("allowzero", 0):
        sizes = [x.shape[axis] if n == 0 else n for axis, n in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten", exact=True)
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.attribute("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose", exact=True)
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.attribute("perm", list(range(x.ndim))[::-1]))


@operator("Unsqueeze", exact=True)
def _unsqueeze(call: Call, x: Tensor, axes: Tensor) -> Tensor:
    chosen = ints(axes, [])
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", exact=True)
def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    single = [axis for axis, n in enumerate(x.shape) if n == 1]
    chosen = {axis % x.ndim for axis in ints(axes, single)} if x.ndim else set()
    if not chosen.issubset(single):
        raise ValueError(f"axes {sorted(chosen)} do not all have length 1")
    return x.reshape([n for axis, n in enumerate(x.shape) if axis not in chosen])


@operator("Expand", exact=True)
def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape, [])))


@operator("Tile", exact=True)
def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats, []))


@operator("Concat", exact=True)
def _concat(call: Call, *parts: Tensor) -> Tensor:
    return torch.cat(parts, call.attribute("axis", 0))


@operator("Split", exact=True)
def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.attribute("axis", 0)
    pieces = len(call.node.outputs)
    length = math.ceil(x.shape[axis] / pieces)
    even = [length] * (pieces - 1) + [x.shape[axis] - length * (pieces - 1)]
    return torch.split_with_sizes(x, ints(sizes, even), axis)


@operator("Slice", exact=True)
def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    begin = ints(starts, [])
    return kernels.slice_axes(
        x,
        begin,
        ints(ends, []),
        ints(axes, range(len(begin))),
        ints(steps, [1] * len(begin)),
    )


@operator("Gather", exact=True)
def _gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    return kernels.gather(x, index, call.attribute("axis", 0))


@operator("Pad", exact=True)
def _pad(
    call: Call,
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    flat = ints(pads, [])
    half = len(flat) // 2
    every = [(0, 0)] * x.ndim
    for axis, before, behind in zip(
        ints(axes, range(x.ndim)), flat[:half], flat[half:], strict=True
    ):
        every[axis] = (before, behind)
    constant = 0.0 if value is None else value.item()
    return kernels.pad(x, every, call.attribute("mode", "constant"), constant)
