"""Operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.onnx.graph import Node
from pipeline.emulate.onnx.operators.table import Call, fixed, like, operator


def _register_elementwise(
    functions: dict[str, Callable[..., Tensor]], *, exact: bool = False, truth: bool = False
) -> None:
    """Enter functions that take tensors alone."""
    result = fixed(torch.bool) if truth else None
    for name, function in functions.items():

        def apply(call: Call, *inputs: Tensor, function: Any = function) -> Tensor:
            return cast(Tensor, function(*inputs))

        operator(name, result=result, exact=exact)(apply)


_register_elementwise(
    {
        "Relu": lambda x: x.clamp_min(0),
        "Abs": torch.abs,
        "Neg": torch.neg,
        "Sign": kernels.sign,
        "Floor": torch.floor,
        "Ceil": torch.ceil,
        "Round": torch.round,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Identity": lambda x: x,
    },
    exact=True,
)
_register_elementwise(
    {
        "Exp": torch.exp,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
        "Reciprocal": torch.reciprocal,
        "Erf": torch.erf,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Tan": torch.tan,
        "Asin": torch.asin,
        "Acos": torch.acos,
        "Atan": torch.atan,
        "Sinh": torch.sinh,
        "Cosh": torch.cosh,
        "Asinh": torch.asinh,
        "Acosh": torch.acosh,
        "Atanh": torch.atanh,
        "BitwiseNot": torch.bitwise_not,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Mish": F.mish,
        "HardSwish": kernels.hard_swish,
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Pow": torch.pow,
        "PRelu": kernels.leaky_relu,
    }
)
_register_elementwise(
    {
        "Equal": torch.eq,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "And": torch.logical_and,
        "Or": torch.logical_or,
        "Xor": torch.logical_xor,
        "Not": torch.logical_not,
        "IsNaN": torch.isnan,
    },
    exact=True,
    truth=True,
)


@operator("Div")
def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    # ONNX divides integers towards zero.
    return torch.div(a, b, rounding_mode=None if call.dtype.is_floating_point else "trunc")


@operator("Mod")
def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.attribute("fmod", 0) else torch.remainder(a, b)


@operator("Sum")
def _sum(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    return sum(others, start=first)


@operator("Mean")
def _mean(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    return sum(others, start=first) / (1 + len(others))


@operator("Min", exact=True)
def _min(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.minimum(first, other)
    return first


@operator("Max", exact=True)
def _max(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.maximum(first, other)
    return first


@operator("Clip", exact=True)
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Where", result=like(1), exact=True)
def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    if x.is_floating_point() and math.isfinite(x.sum().item()):
        # What `kernels.gelu` mends begins with infinities alone, and no sum that has any is finite.
        return F.gelu(x, approximate=call.attribute("approximate", "none"))
    return kernels.gelu(x, "tanh" if call.attribute("approximate", "none") == "tanh" else "none")


@operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return kernels.hard_sigmoid(x, call.attribute("alpha", 0.2), call.attribute("beta", 0.5))


@operator("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return kernels.elu(x, call.attribute("alpha", 1.0))


@operator("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return kernels.leaky_relu(x, call.attribute("alpha", 0.01))


@operator("Swish")
def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.attribute("alpha", 1.0) * x)


@operator("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.attribute("alpha", 1.0))


@operator("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha = call.attribute("alpha", 1.67326319217681884765625)
    return call.attribute("gamma", 1.05070102214813232421875) * kernels.elu(x, alpha)


@operator("ThresholdedRelu", exact=True)
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x <= call.attribute("alpha", 1.0), torch.zeros_like(x), x)


@operator("Shrink")
def _shrink(call: Call, x: Tensor) -> Tensor:
    edge, bias = call.attribute("lambd", 0.5), call.attribute("bias", 0.0)
    moved = torch.where(x < -edge, x + bias, x - bias)
    return torch.where(x.abs() > edge, moved, torch.zeros_like(moved))


@operator("IsInf", result=fixed(torch.bool), exact=True)
def _is_inf(call: Call, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if call.attribute("detect_positive", 1):
        found |= x == math.inf
    if call.attribute("detect_negative", 1):
        found |= x == -math.inf
    return found


def _with_mask(node: Node, types: Sequence[torch.dtype | None]) -> tuple[torch.dtype, ...]:
    return like(0)(node, types), torch.bool


@operator("Dropout", result=_with_mask, exact=True)
def _dropout(
    call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    share = 0.5 if ratio is None else ratio.item()
    if training is not None and training.item() and share > 0:
        raise UnsupportedOperatorError(
            f"node {call.node.name!r}: Dropout in training mode draws at random; export the model "
            "in evaluation mode"
        )
    return x, torch.ones_like(x, dtype=torch.bool)
