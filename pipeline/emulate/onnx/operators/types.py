"""Casts, quantization and constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.emulate import kernels, rounding
from pipeline.emulate.onnx.graph import Constant, Node, to_dtype
from pipeline.emulate.onnx.operators.table import Call, ints, like, operator


def _cast_type(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
    return to_dtype(node.attributes["to"], f"node {node.name!r}")


@operator("Cast", result=_cast_type)
@operator("CastLike", result=like(1))
def _cast(call: Call, x: Tensor, model: Tensor | None = None) -> Tensor:
    if x.is_floating_point() and not call.dtype.is_floating_point and call.dtype != torch.bool:
        # What is out of range keeps its lowest bits, as in ONNX's own cases and in ONNX Runtime.
        return rounding.wrap(x.trunc().to(torch.int64), call.dtype)
    return x.to(rounding.storage(call.dtype)) if call.dtype.is_floating_point else x


def _quantized_type(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
    given = types[2] if len(types) > 2 else None
    wanted = node.attribute("output_dtype", 0)
    if given is not None:
        return given
    return to_dtype(wanted, f"node {node.name!r}") if wanted else torch.uint8


def _dequantized_type(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
    wanted = node.attribute("output_dtype", 0)
    return to_dtype(wanted, f"node {node.name!r}") if wanted else like(1)(node, types)


@operator("QuantizeLinear", result=_quantized_type, quantizes=True)
def _quantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    integer = not call.dtype.is_floating_point
    return kernels.quantize(
        x,
        scale,
        _needed(zero_point) if integer else zero_point,
        axis=call.attribute("axis", 1),
        block=call.attribute("block_size", 0),
        integer=integer,
    )


@operator("DequantizeLinear", result=_dequantized_type)
def _dequantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    if not x.is_floating_point():
        zero_point = _needed(zero_point)
    return kernels.dequantize(x, scale, zero_point, axis=axis, block=block)


def _needed(zero_point: Tensor | None) -> Tensor | None:
    """None for zeros: integers know no sign of zero, so that adding them changes nothing."""
    return zero_point if zero_point is not None and zero_point.any() else None


def _filled_type(node: Node, types: Sequence[torch.dtype | None]) -> torch.dtype:
    value: Constant | None = node.attribute("value", None)
    return torch.float32 if value is None else value.dtype


@operator("ConstantOfShape", result=_filled_type, exact=True)
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value: Constant | None = call.attribute("value", None)
    fill = 0.0 if value is None else value.value.item()
    return torch.full(ints(shape, []), fill, dtype=rounding.storage(call.dtype))


@operator("Range")
def _range(call: Call, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    dtype = rounding.storage(call.dtype)
    return torch.arange(start.item(), limit.item(), step.item(), dtype=dtype)
