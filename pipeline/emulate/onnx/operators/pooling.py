"""Pooling, and the windows that convolutions share with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.emulate import kernels, windows
from pipeline.emulate.onnx.graph import Node
from pipeline.emulate.onnx.operators.table import Call, like, operator


@operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return kernels.reduce("mean", x, range(2, x.ndim), keep=True)


@operator("GlobalMaxPool", exact=True)
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return kernels.reduce("max", x, range(2, x.ndim), keep=True)


def _with_places(node: Node, types: Sequence[torch.dtype | None]) -> tuple[torch.dtype, ...]:
    return like(0)(node, types), torch.int64


@operator("MaxPool", result=_with_places, exact=True)
def _max_pool(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    kernel = call.attribute("kernel_shape", list(x.shape[2:]))
    strides, dilations, pads = window(call, x, kernel)
    ceil = bool(call.attribute("ceil_mode", 0))
    largest = kernels.max_pool(
        x, kernel, strides=strides, pads=pads, dilations=dilations, ceil=ceil
    )
    if not any(call.node.outputs[1:]):
        return (largest,)
    axes = windows.lay(x.shape[2:], kernel, strides, pads, dilations, ceil=ceil)
    places = windows.places_of_largest(axes, x)
    return largest, _in_the_whole(places, x, bool(call.attribute("storage_order", 0)))


def _in_the_whole(places: list[Tensor], x: Tensor, column_major: bool) -> Tensor:
    """Flat positions in the whole tensor of positions along each spatial axis."""
    axes = list(zip(places, x.shape[2:], strict=True))
    flat = torch.zeros_like(places[0])
    for place, size in reversed(axes) if column_major else axes:
        flat = flat * size + place
    image = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(axes))
    return flat + image * (x[0, 0].numel() if x.numel() else 0)


@operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.attribute("kernel_shape", list(x.shape[2:]))
    strides, dilations, pads = window(call, x, kernel)
    return kernels.average_pool(
        x,
        kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
        ceil=bool(call.attribute("ceil_mode", 0)),
        count_padding=bool(call.attribute("count_include_pad", 0)),
    )


@operator("LpPool")
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.attribute("kernel_shape", list(x.shape[2:]))
    strides, dilations, pads = window(call, x, kernel)
    ceil = bool(call.attribute("ceil_mode", 0))
    axes = windows.lay(x.shape[2:], kernel, strides, pads, dilations, ceil=ceil)
    order = call.attribute("p", 2)
    sums: Tensor = windows.sums(axes, x.abs() ** order) ** (1 / order)
    return sums


@operator("GlobalLpPool")
def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    order = call.attribute("p", 2)
    axes = list(range(2, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x, order, axes, keepdim=True)
    return norm


def window(
    call: Call, x: Tensor, kernel: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and padding of a sliding window."""
    ones = [1] * len(kernel)
    strides = call.attribute("strides", ones)
    dilations = call.attribute("dilations", ones)
    mode = call.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        upper = mode == "SAME_UPPER"
        size = x.shape[2:]
        return (
            strides,
            dilations,
            kernels.same_pads(size, kernel, strides, dilations, extra_behind=upper),
        )
    if mode == "VALID":
        return strides, dilations, [(0, 0)] * len(kernel)
    return strides, dilations, pairs(call.attribute("pads", [0] * (2 * len(kernel))))


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """ONNX's list of all beginnings, then all ends, as one pair an axis."""
    half = len(flat) // 2
    return list(zip(flat[:half], flat[half:], strict=True))
