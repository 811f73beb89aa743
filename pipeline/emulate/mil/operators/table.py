"""The operations of ML Programs on torch tensors: the registry, and what works element by element.

A function's parameters have the names of the operation's inputs in coremltools'
`converters/mil/mil/ops/defs`, whose documentation is the reference for what they mean and for their
defaults; some defaults surprise: `inverse` adds 1e-4, `log` 1e-45 and `rsqrt` 1e-12 to its input.
Floating-point tensors arrive as float32, strings as `str`, every other constant as a tensor.
Results are not yet rounded to their declared type: that is the executor's step.

`layers` has convolutions, products, pools, norms and reductions, `shapes` what moves or selects
values, `resize` what changes the size of images. Importing a module registers its operations in
`OPERATORS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels

Result = Tensor | tuple[Tensor, ...]
Whole = Tensor | tuple[int, ...]
"""A parameter of whole numbers, which a function reads by `ints`: a constant was converted once."""
_Function = TypeVar("_Function", bound=Callable[..., Result])


@dataclass(frozen=True, slots=True)
class Operator:
    """How one operation is evaluated.

    Attributes:
        evaluate: Takes the operation's inputs by name.
        required: Names of the inputs that it cannot do without.
        optional: Names of the other inputs that it knows.
        selects: Its results are among the values of its inputs, so that there is nothing to round.
        sums: It takes `partial`, the rounding of a narrow accumulator.
        whole: Names of the inputs that are `Whole`.
    """

    evaluate: Callable[..., Result]
    required: frozenset[str]
    optional: frozenset[str]
    selects: bool
    sums: bool
    whole: frozenset[str]


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, selects: bool = False) -> Callable[[_Function], _Function]:
    """Register a function as the evaluation of the operations `names`; see `Operator`."""

    def register(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters
        required = {key for key, value in parameters.items() if value.default is value.empty}
        optional = parameters.keys() - required - {"partial"}
        annotated = ((key, str(value.annotation)) for key, value in parameters.items())
        entry = Operator(
            function,
            frozenset(required),
            frozenset(optional),
            selects,
            "partial" in parameters,
            frozenset(key for key, kind in annotated if kind.split(" | ")[0] == "Whole"),
        )
        OPERATORS.update(dict.fromkeys(names, entry))
        return function

    return register


def ints(numbers: Whole) -> list[int]:
    """Whole numbers, a scalar as one."""
    if isinstance(numbers, tuple):
        return list(numbers)
    return [int(value) for value in numbers.reshape(-1).tolist()]


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        return function(x)

    return evaluate


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return evaluate


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,  # half to even, as numpy, which coremltools' own inference uses
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
_SELECTING_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sign": kernels.sign,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": torch.true_divide,
    "sub": torch.sub,
}
for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))
for _name, _function in _SELECTING_UNARY.items():
    operator(_name, selects=True)(_unary(_function))
for _name, _pair in _BINARY.items():
    operator(_name, selects=_name in ("maximum", "minimum"))(_binary(_pair))


@operator("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """The conversion itself is the executor's: it stores every result in its declared type."""
    del dtype
    return x


@operator("clip")
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Limit x to between alpha and beta."""
    return x.clamp(alpha, beta)


@operator("threshold", selects=True)
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """Raise what is below alpha to alpha."""
    return torch.maximum(x, alpha)


@operator("inverse")
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    """1 / (x + epsilon), and epsilon is not 0 unless the program says so."""
    return 1 / (x + epsilon)


@operator("rsqrt")
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


@operator("log")
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    """Natural logarithm of x + epsilon."""
    return torch.log(x + epsilon)


@operator("clamped_relu")
def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The smaller of beta and the leaky ReLU with slope alpha."""
    return torch.minimum(kernels.leaky_relu(x, alpha), beta)


@operator("elu")
def elu(x: Tensor, alpha: Tensor) -> Tensor:
    """Keep x where positive, alpha (exp(x) - 1) elsewhere."""
    return kernels.elu(x, float(alpha))


@operator("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """GELU by erf, or one of the format's two approximations."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    if mode == "TANH_APPROXIMATION":
        return kernels.gelu(x, "tanh")
    if mode != "EXACT":
        raise UnsupportedOperatorError(f"gelu with mode '{mode}'")
    return kernels.gelu(x)


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """Keep x where positive, alpha x elsewhere."""
    return kernels.leaky_relu(x, alpha)


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """A leaky ReLU with a slope for each channel."""
    return kernels.leaky_relu(x, _along_channels(alpha, x))


@operator("linear_activation")
def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Scale and shift: alpha x + beta."""
    return alpha * x + beta


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Hyperbolic tangent of beta x, times alpha."""
    return alpha * torch.tanh(beta * x)


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Limit alpha x + beta to between 0 and 1."""
    return kernels.hard_sigmoid(x, float(alpha), float(beta))


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Softplus of beta x, times alpha, with an alpha and a beta for each channel."""
    return _along_channels(alpha, x) * F.softplus(_along_channels(beta, x) * x)


@operator("thresholded_relu", selects=True)
def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """Keep x from alpha upwards, 0 below; NaN is on neither side, and stays."""
    return torch.where(x < alpha, 0.0, x)


@operator("softmax")
def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    """Exponentials that sum to 1 along an axis."""
    return torch.softmax(x, int(axis))


def _along_channels(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.reshape(-1, *[1] * (x.ndim - 2))
