"""Compare the ONNX executor with ONNX Runtime on random graphs, node by node.

    python scripts/random_graphs.py --graphs 1000 --seed 0

Graphs are small and of three kinds: float32, float16, and float32 around 8-bit quantization. ONNX
Runtime computes each node from given values; the executor computes the same node from the same
values, so that what one node does wrong is not hidden by another, and both must agree: integers
exactly, float32 closely, half precision within one unit in the last place. Then the executor runs
the graph as a whole, which must give what its nodes give one by one, and bit for bit the same
whether it keeps every tensor or frees what nothing reads any more.

The last line says how many graphs and tensors were compared; any wrong value ends with exit code 1.
A number of a graph draws the same graph each time: `--first N --graphs 1` runs the N-th alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.errors import PipelineError
from pipeline.emulate.onnx.executor import GraphExecutor

RUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
OPSET = 22
KINDS = ("float32", "float16", "quantized")
LARGEST = 4096
"""Values that a tensor of a random graph may hold."""
FLOAT32_BITS = 126
"""Normal numbers of float32 lie between so many halvings and doublings of 1."""

Random = np.random.Generator
Attributes = dict[str, Any]
Draft = tuple[str, list[np.ndarray | str | None], Attributes]
"""An operator, its inputs after the first (arrays are constants, strings tensors), attributes."""


@dataclass
class Drawn:
    """A graph while it is drawn.

    Attributes:
        kind: One of KINDS.
        random: What draws it.
        values: ONNX Runtime's value of every tensor so far.
        nodes: The nodes.
        constants: The constants.
    """

    kind: str
    random: Random
    values: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def floating(self) -> type[np.generic]:
        """The type of most tensors."""
        return np.float16 if self.kind == "float16" else np.float32

    @property
    def readable(self) -> list[str]:
        """Tensors that nodes may read.

        None with NaN: of a NaN and a number the runtime's maxima take now one, now the other; the
        executor's are NaN.
        """
        return [n for n, v in self.values.items() if not (is_float(v) and np.isnan(v).any())]

    def normal(self, *shape: int) -> np.ndarray:
        """Values around zero."""
        return np.asarray(self.random.standard_normal(shape), dtype=self.floating)

    def positive(self, *shape: int) -> np.ndarray:
        """Values from 0.1 up."""
        values = np.abs(self.random.standard_normal(shape)) + 0.1
        return np.asarray(values, dtype=self.floating)

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both among them."""
        return int(self.random.integers(low, high + 1))

    def chance(self, share: float = 0.5) -> bool:
        """True with the probability `share`."""
        return bool(self.random.random() < share)

    def one_of(self, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        return choices[self.integer(0, len(choices) - 1)]

    def axis(self, x: np.ndarray) -> int:
        """An axis, counted from the start or from the end."""
        return self.integer(-x.ndim, x.ndim - 1)

    def axes(self, x: np.ndarray) -> np.ndarray:
        """Some axes, in any order and counted either way."""
        chosen = self.random.permutation(x.ndim)[: self.integer(1, x.ndim)]
        turned = [int(a) - x.ndim if self.chance(0.3) else int(a) for a in chosen]
        return np.array(turned, dtype=np.int64)

    def like(self, x: np.ndarray) -> np.ndarray | str:
        """Something that broadcasts with x and has its type: another tensor or a constant."""
        others = [n for n in self.readable if self.values[n].dtype == x.dtype]
        others = [n for n in others if self.values[n].shape == x.shape]
        if others and self.chance():
            return str(self.one_of(others))
        first = self.integer(0, x.ndim)
        shape = [1 if self.chance(0.3) else n for n in x.shape[first:]]
        return self.constant(x.dtype, shape)

    def constant(self, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
        """A constant of a type."""
        if dtype == np.bool_:
            return np.asarray(self.random.random(shape) < 0.5)
        if np.issubdtype(dtype, np.integer):
            return np.asarray(self.random.integers(1, 5, shape), dtype=dtype)
        return np.asarray(2 * self.random.standard_normal(shape), dtype=dtype)


Maker = Callable[[Drawn, np.ndarray], Draft | None]
"""Drafts a node that reads x; None where x does not fit."""

MAKERS: list[Maker] = []


def maker(function: Maker) -> Maker:
    """Enter a maker."""
    MAKERS.append(function)
    return function


def is_float(x: np.ndarray) -> bool:
    """Whether x is floating-point."""
    return bool(np.issubdtype(x.dtype, np.floating))


def is_image(x: np.ndarray) -> bool:
    """Whether x is floating-point and has one to three spatial axes, none of them empty."""
    return is_float(x) and 3 <= x.ndim <= 5 and x.size > 0


UNARY = [
    "Relu",
    "Abs",
    "Neg",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Identity",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Erf",
    "Sigmoid",
    "Tanh",
    "Sin",
    "Cos",
    "Tan",
    "Asin",
    "Acos",
    "Atan",
    "Sinh",
    "Cosh",
    "Asinh",
    "Acosh",
    "Atanh",
    "Softplus",
    "Softsign",
    "Mish",
    "HardSwish",
    "Gelu",
    "HardSigmoid",
    "Elu",
    "Celu",
    "Selu",
    "LeakyRelu",
    "ThresholdedRelu",
    "Shrink",
]


@maker
def _unary(d: Drawn, x: np.ndarray) -> Draft | None:
    name = d.one_of(UNARY)
    attributes: Attributes = {}
    if name in ("HardSigmoid", "Elu", "Celu", "LeakyRelu", "ThresholdedRelu") and d.chance():
        attributes["alpha"] = float(np.float32(d.random.uniform(0.1, 1.5)))
    if name == "Gelu" and d.chance():
        attributes["approximate"] = "tanh"
    return (name, [], attributes) if is_float(x) else None


@maker
def _binary(d: Drawn, x: np.ndarray) -> Draft | None:
    name = d.one_of(["Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "PRelu", "Pow"])
    if x.dtype == np.bool_ or (name in ("PRelu", "Pow") and not is_float(x)):
        return None
    attributes = {"fmod": 1} if name == "Mod" and is_float(x) else {}
    if name in ("Div", "Mod") and not is_float(x):  # the runtime dies of a division by zero
        return name, [d.constant(x.dtype, x.shape)], attributes
    return name, [d.like(x)], attributes


@maker
def _many(d: Drawn, x: np.ndarray) -> Draft | None:
    name = d.one_of(["Sum", "Mean", "Max", "Min"])
    return (name, [d.like(x) for _ in range(d.integer(0, 2))], {}) if is_float(x) else None


@maker
def _compare(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.dtype == np.bool_:
        name = d.one_of(["And", "Or", "Xor", "Not"])
        return name, [] if name == "Not" else [d.like(x)], {}
    if is_float(x) and d.chance(0.2):
        return d.one_of(["IsNaN", "IsInf"]), [], {}
    name = d.one_of(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
    return name, [d.like(x)], {}


@maker
def _where(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.dtype != np.bool_:
        return None
    first = d.constant(np.dtype(d.floating), x.shape)
    return "Where", [first, d.constant(first.dtype, x.shape[1:])], {}


@maker
def _clip(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.dtype == np.bool_:
        return None
    bounds: list[np.ndarray | str | None] = [
        d.constant(x.dtype, []) if d.chance(0.8) else None for _ in range(2)
    ]
    return "Clip", bounds, {}


@maker
def _cast(d: Drawn, x: np.ndarray) -> Draft | None:
    wanted = d.one_of([TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL])
    if d.chance():
        wanted = helper.np_dtype_to_tensor_dtype(np.dtype(d.floating))
    known = not is_float(x) or (np.isfinite(x).all() and float(np.abs(x).max(initial=0)) < 1e9)
    return ("Cast", [], {"to": wanted}) if known else None


def step(d: Drawn, *shape: int) -> np.ndarray:
    """Steps of a quantized scale."""
    return np.asarray(d.positive(*shape) / 20, dtype=np.float32)


@maker
def _quantize(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_float(x) or d.kind != "quantized":
        return None
    integer = d.one_of([np.int8, np.uint8, np.int16, np.uint16])
    if x.ndim > 1 and d.chance(0.3):
        axis = d.axis(x)
        shape, attributes = [x.shape[axis]], {"axis": axis}
    else:
        shape, attributes = [], {}
    zero = np.full(shape, d.integer(0, 20), dtype=integer)
    return "QuantizeLinear", [step(d, *shape), zero], attributes


@maker
def _dequantize(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.dtype not in (np.int8, np.uint8, np.int16, np.uint16):
        return None
    return "DequantizeLinear", [step(d), np.array(3, dtype=x.dtype)], {}


def window(d: Drawn, x: np.ndarray, kernel: list[int]) -> Attributes | None:
    """Strides, dilations and padding; None where the window does not fit.

    There the runtime divides a negative number towards zero and finds a position. Dilated windows
    that are longer than the input may find nothing in it. With SAME and strides beyond the kernel
    the runtime pads by negative amounts in some operators and not in others.
    """
    strides = [d.integer(1, 3) for _ in kernel]
    dilations = [d.integer(1, 2) if d.chance(0.3) else 1 for _ in kernel]
    if d.chance(0.2):
        mode = d.one_of(["SAME_UPPER", "SAME_LOWER", "VALID"])
        limits = x.shape[2:] if mode == "VALID" else kernel
        sizes = kernel if mode == "VALID" else strides
        fits = all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        return {"auto_pad": mode, "strides": strides} if fits else None
    before, behind = ([d.integer(0, k - 1) for k in kernel] for _ in range(2))
    for n, k, b, a, step in zip(x.shape[2:], kernel, before, behind, dilations, strict=True):
        if n + b + a <= (k - 1) * step or (step > 1 and n <= (k - 1) * step):
            return None
    return {"strides": strides, "pads": before + behind, "dilations": dilations}


@maker
def _conv(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_image(x):
        return None
    kernel = [d.integer(1, 3) for _ in x.shape[2:]]
    groups = d.one_of([g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0])
    out = groups * d.integer(1, 3)
    weight = d.normal(out, x.shape[1] // groups, *kernel)
    bias = [d.normal(out)] if d.chance() else []
    where = window(d, x, kernel)
    return None if where is None else ("Conv", [weight, *bias], {"group": groups, **where})


@maker
def _conv_transpose(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_image(x) or x.ndim == 5:
        return None
    kernel = [d.integer(1, 3) for _ in x.shape[2:]]
    groups = d.one_of([g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0])
    weight = d.normal(x.shape[1], d.integer(1, 3), *kernel)
    strides = [d.integer(1, 3) for _ in kernel]
    pads = [d.integer(0, (k - 1) // 2) for k in kernel] * 2
    extra = [d.integer(0, s - 1) for s in strides]
    attributes = {"group": groups, "strides": strides, "pads": pads, "output_padding": extra}
    return "ConvTranspose", [weight], attributes


@maker
def _pool(d: Drawn, x: np.ndarray) -> Draft | None:
    small = x.dtype in (np.int8, np.uint8) and x.ndim in (3, 4, 5) and x.size > 0
    if not (is_image(x) or small):
        return None
    name = "MaxPool" if small else d.one_of(["MaxPool", "AveragePool", "LpPool"])
    kernel = [d.integer(1, 4) for _ in x.shape[2:]]
    where = window(d, x, kernel)
    if where is None:
        return None
    attributes = {"kernel_shape": kernel, **where}
    if "auto_pad" not in attributes:
        attributes["ceil_mode"] = d.integer(0, 1)
    if name == "AveragePool":
        attributes["count_include_pad"] = d.integer(0, 1)
        if RUNTIME < (1, 25):  # it counts uneven padding wrongly
            attributes["count_include_pad"] = 0
    return name, [], attributes


@maker
def _global_pool(d: Drawn, x: np.ndarray) -> Draft | None:
    name = d.one_of(["GlobalAveragePool", "GlobalMaxPool"])
    return (name, [], {}) if is_image(x) else None


@maker
def _product(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_float(x) or x.ndim < 1 or x.size == 0:  # the runtime dies of an empty Einsum
        return None
    if x.ndim == 2 and d.chance():
        turn_a, turn_b = d.integer(0, 1), d.integer(0, 1)
        rows, inner = x.shape[::-1] if turn_a else x.shape
        columns = d.integer(1, 6)
        weight = d.normal(*((columns, inner) if turn_b else (inner, columns)))
        bias = [d.normal(*d.one_of([(columns,), (1, columns), (rows, 1), ()]))]
        scales = {"alpha": d.one_of([1.0, 0.5]), "beta": d.one_of([1.0, 2.0])}
        return "Gemm", [weight, *bias], {"transA": turn_a, "transB": turn_b, **scales}
    if x.ndim == 4 and d.chance(0.3):
        weight = d.normal(x.shape[3], x.shape[1], 2)
        return "Einsum", [weight], {"equation": "abcd,dbe->abce"}
    inner = x.shape[-1]
    if d.chance(0.2):
        return "MatMul", [d.normal(inner)], {}
    batch = x.shape[:-2] if d.chance() else ()
    return "MatMul", [d.normal(*batch, inner, d.integer(1, 6))], {}


@maker
def _normalize(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_float(x) or x.ndim < 2 or x.size == 0:
        return None
    name = d.one_of(["BatchNormalization", "LayerNormalization", "LpNormalization"])
    channels = x.shape[1]
    # A small epsilon would multiply the last places of values that are nearly all the same.
    if name == "LayerNormalization":
        axis = d.axis(x)
        shape = x.shape[axis:]
        bias = [d.normal(*shape)] if d.chance() else []
        return name, [d.normal(*shape), *bias], {"axis": axis, "epsilon": 0.1}
    if name == "LpNormalization":
        return name, [], {"axis": d.axis(x), "p": d.integer(1, 2)}
    scale, shift, mean = (d.normal(channels) for _ in range(3))
    if x.ndim > 2 and d.chance():
        return "InstanceNormalization", [scale, shift], {"epsilon": 0.1}
    if x.ndim > 2 and d.chance():
        groups = d.one_of([g for g in range(1, channels + 1) if channels % g == 0])
        attributes = {"num_groups": groups, "epsilon": 0.1}
        return "GroupNormalization", [scale, shift], attributes
    return name, [scale, shift, mean, d.positive(channels)], {}


@maker
def _softmax(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_float(x) or x.ndim == 0 or x.size == 0:
        return None
    return d.one_of(["Softmax", "LogSoftmax", "Hardmax"]), [], {"axis": d.axis(x)}


REDUCTIONS = ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


@maker
def _reduce(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or x.dtype in (np.bool_, np.int16, np.uint16, np.uint8, np.int8):
        return None
    if x.size == 0:  # the runtime gets shapes wrong; the standard's own cases say what is right
        return None
    name = d.one_of(REDUCTIONS if is_float(x) else ["Mean", "Sum", "Max", "Min", "Prod"])
    if name == "Prod" and is_float(x) and _product_depends_on_order(x):
        return None
    axes: list[np.ndarray | str | None] = [d.axes(x)] if d.chance(0.8) else []
    attributes = {"keepdims": d.integer(0, 1), "noop_with_empty_axes": d.integer(0, 1)}
    if RUNTIME < (1, 24):  # it takes a reduction over no axes for no operation at all
        attributes["noop_with_empty_axes"] = 0
    return f"Reduce{name}", axes, attributes


def _product_depends_on_order(x: np.ndarray) -> bool:
    """Whether a product of some of the values leaves the range of float32.

    What else is multiplied before or after decides then whether that shows: infinity times a
    product that has become zero is NaN, where another order gives infinity, or a finite number.
    """
    values = np.abs(x[np.isfinite(x) & (x != 0)].astype(np.float64))
    bits = np.log2(values)
    return bool(max(bits[bits > 0].sum(), -bits[bits < 0].sum()) >= FLOAT32_BITS)


@maker
def _places(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or x.size == 0 or not is_float(x):
        return None
    axis = d.axis(x)
    if d.chance(0.3):
        count = np.array([d.integer(1, x.shape[axis])])
        return "TopK", [count], {"axis": axis, "largest": d.integer(0, 1)}
    attributes = {"keepdims": d.integer(0, 1), "select_last_index": d.integer(0, 1)}
    return d.one_of(["ArgMax", "ArgMin"]), [], {"axis": axis, **attributes}


@maker
def _running_sum(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or x.dtype not in (np.float32, np.int32, np.int64):
        return None
    attributes = {"exclusive": d.integer(0, 1), "reverse": d.integer(0, 1)}
    return "CumSum", [np.array(d.axis(x))], attributes


@maker
def _reshape(d: Drawn, x: np.ndarray) -> Draft | None:
    kind = d.integer(0, 5)
    if kind == 0 and x.size:
        return "Reshape", [np.array([d.one_of([1, x.shape[0] if x.ndim else 1]), -1])], {}
    if kind == 1:
        return "Flatten", [], {"axis": d.integer(-x.ndim, x.ndim)}
    if kind == 2 and x.ndim:
        return "Transpose", [], {"perm": [int(a) for a in d.random.permutation(x.ndim)]}
    if kind == 3 and x.ndim < 5:
        return "Unsqueeze", [np.array([d.integer(-x.ndim - 1, x.ndim)])], {}
    if kind == 4 and x.ndim < 5:
        shape = [1 if n == 1 and d.chance() else d.one_of([1, n]) for n in x.shape]
        return "Expand", [np.array([d.integer(1, 2), *shape])], {}
    single = [a for a, n in enumerate(x.shape) if n == 1]
    return ("Squeeze", [np.array(single)], {}) if single else None


@maker
def _join_and_part(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0:
        return None
    axis = d.axis(x)
    kind = d.integer(0, 3)
    if kind == 0:
        shape = list(x.shape)
        shape[axis] = d.integer(1, 3)
        return "Concat", [d.constant(x.dtype, shape)], {"axis": axis}
    if kind == 1 and x.shape[axis] > 1:
        first = d.integer(1, x.shape[axis] - 1)
        return "Split", [np.array([first, x.shape[axis] - first])], {"axis": axis}
    if kind == 2:
        return "Tile", [np.array([d.integer(1, 2) for _ in x.shape])], {}
    axes = d.axes(x)
    starts, ends = (d.random.integers(-6, 6, len(axes)) for _ in range(2))
    steps = np.array([d.one_of([-2, -1, 1, 1, 2]) for _ in axes])
    return "Slice", [starts, ends, axes, steps], {}


@maker
def _gather(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or x.size == 0:
        return None
    axis = d.axis(x)
    n = x.shape[axis]
    if d.chance(0.3):
        shape = [d.integer(1, size) for size in x.shape]
        return "GatherElements", [d.random.integers(-n, n, shape)], {"axis": axis}
    if d.chance(0.3):
        return "GatherND", [d.random.integers(-x.shape[0], x.shape[0], (3, 1))], {}
    index = np.asarray(d.random.integers(-n, n, (2,) * d.integer(0, 2)))
    return "Gather", [index], {"axis": axis}


@maker
def _scatter(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or x.size == 0 or not is_float(x):
        return None
    axis = d.axis(x)
    if d.chance():
        rows = d.random.permutation(x.shape[0])[: d.integer(1, x.shape[0])]
        updates = d.normal(len(rows), *x.shape[1:])
        return "ScatterND", [rows[:, None], updates], {"reduction": d.one_of(["none", "add"])}
    shape = list(x.shape)
    shape[axis] = 1
    index = d.random.integers(-x.shape[axis], x.shape[axis], shape)
    reduction = d.one_of(["none", "add", "mul", "max", "min"])
    return "ScatterElements", [index, d.normal(*shape)], {"axis": axis, "reduction": reduction}


@maker
def _pad(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim == 0 or not is_float(x):
        return None
    mode = d.one_of(["constant", "reflect", "edge", "wrap"])
    if mode == "constant":
        pads = d.random.integers(-1, 3, 2 * x.ndim)
        lowest = min(x.shape)
        if lowest < 3:
            pads = np.abs(pads)
        return "Pad", [pads, d.constant(x.dtype, [])], {"mode": mode}
    if x.size == 0:
        return None
    most = [max(0, n - 1) for n in x.shape] * 2
    return "Pad", [np.array([d.integer(0, min(2, n)) for n in most])], {"mode": mode}


@maker
def _move_depth(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_image(x) or x.ndim != 4:
        return None
    if x.shape[1] % 4 == 0 and d.chance():
        return "DepthToSpace", [], {"blocksize": 2, "mode": d.one_of(["DCR", "CRD"])}
    if x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
        return "SpaceToDepth", [], {"blocksize": 2}
    return None


@maker
def _triangle(d: Drawn, x: np.ndarray) -> Draft | None:
    if x.ndim < 2 or x.dtype not in (np.float32, np.float16, np.int64):
        return None
    return "Trilu", [np.array(d.integer(-2, 2))], {"upper": d.integer(0, 1)}


@maker
def _resize(d: Drawn, x: np.ndarray) -> Draft | None:
    if not is_image(x) or x.ndim != 4:
        return None
    mode = d.one_of(["nearest", "linear", "cubic"])
    places = d.one_of(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    attributes: Attributes = {"mode": mode, "coordinate_transformation_mode": places}
    if mode == "nearest":
        rounding = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = d.one_of(rounding)
    sizes = np.array([*x.shape[:2], d.integer(2, 9), d.integer(2, 9)])
    if mode != "nearest" and places == "half_pixel" and d.chance():
        attributes["antialias"] = 1
    return "Resize", [None, None, sizes], attributes


@maker
def _shape(d: Drawn, x: np.ndarray) -> Draft | None:
    return d.one_of(["Shape", "Size"]), [], {}


def draw(kind: str, random: Random) -> Iterator[tuple[Drawn, onnx.NodeProto]]:
    """Draw a graph; yields each node as soon as ONNX Runtime has computed it."""
    d = Drawn(kind, random)
    shape = [d.integer(1, 6) for _ in range(d.one_of([1, 2, 3, 4, 4, 4, 5]))]
    if d.chance(0.03):
        shape[d.integer(0, len(shape) - 1)] = 0
    d.values["x"] = (2 * d.normal(*shape)).astype(d.floating)
    wanted = d.integer(3, 12)
    for _ in range(20 * wanted):
        if len(d.nodes) == wanted:
            return
        source = d.one_of(d.readable[-4:])
        draft = d.one_of(MAKERS)(d, d.values[source])
        node = _attempt(d, source, draft) if draft else None
        if node:
            d.nodes.append(node)
            yield d, node


def _attempt(d: Drawn, source: str, draft: Draft) -> onnx.NodeProto | None:
    """Let ONNX Runtime compute a node; None where it cannot, or where the result is too large."""
    name, others, attributes = draft
    number = len(d.nodes)
    constants: dict[str, np.ndarray] = {}
    inputs = [source]
    for position, other in enumerate(others):
        if isinstance(other, np.ndarray):
            constants[f"c{number}_{position}"] = other
            other = f"c{number}_{position}"
        inputs.append(other or "")
    pieces = 2 if name in ("Split", "TopK") else 1
    outputs = [f"t{number}_{piece}" for piece in range(pieces)]
    node = helper.make_node(name, inputs, outputs, name=f"{name}_{number}", **attributes)
    try:
        results = run_in_runtime(alone(node, d.values, constants), node, d.values)
    except _REFUSALS:
        return None
    vanished = d.values[source].size and name != "Slice" and not all(r.size for r in results)
    if vanished or any(r.size > LARGEST or r.ndim > 5 for r in results):
        return None
    d.constants |= constants
    d.values |= dict(zip(outputs, results, strict=True))
    return node


_STATES = onnxruntime.capi.onnxruntime_pybind11_state
_REFUSALS = (
    _STATES.Fail,
    _STATES.InvalidArgument,
    _STATES.InvalidGraph,
    _STATES.NotImplemented,
    _STATES.RuntimeException,
)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A model; the outputs' types are left to be inferred."""
    ports = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in inputs.items()
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(list(nodes), "random", ports, results, tensors)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def alone(
    node: onnx.NodeProto, values: dict[str, np.ndarray], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A model of one node, which reads tensors of the graph as inputs."""
    read = {n: values[n] for n in node.input if n in values}
    own = {n: constants[n] for n in node.input if n in constants}
    return model_of([node], read, own, node.output)


def run_in_runtime(
    model: onnx.ModelProto, node: onnx.NodeProto, values: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """ONNX Runtime's outputs of a model of one node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    results: list[np.ndarray] = session.run(None, {n: values[n] for n in node.input if n in values})
    return results


def wrong_values(result: np.ndarray, expected: np.ndarray, size: float) -> int:
    """How many values of a tensor are wrong.

    Args:
        result: The executor's, in the type that it stores.
        expected: ONNX Runtime's.
        size: The largest value that the node read.
    """
    if result.shape != expected.shape:
        return max(1, expected.size)
    if not is_float(expected):
        return int((result != expected).sum())
    reference = expected.astype(np.float64)
    ours = result.astype(np.float64)
    same = (ours == reference) | (np.isnan(ours) & np.isnan(reference))
    finite = np.abs(reference[np.isfinite(reference)])
    size = max(size, finite.max(initial=0.0))
    with np.errstate(all="ignore"):
        allowed = 2e-5 * np.abs(reference) + 4e-6 * size
        if expected.dtype == np.float16:
            # One unit; what float32 sums cannot tell may be the last of them.
            unit = np.abs(np.spacing(expected)).astype(np.float64)
            allowed = unit + 1e-6 * size
        near = np.isfinite(reference) & (np.abs(ours - reference) <= allowed)
    return int((~(same | near)).sum())


@dataclass
class Tally:
    """What was compared.

    Attributes:
        graphs: Graphs.
        tensors: Tensors.
        wrong: A line for each tensor with wrong values.
        operators: How often each operator was compared.
    """

    graphs: int = 0
    tensors: int = 0
    wrong: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)


def compare(number: int, seed: int, tally: Tally) -> None:
    """Draw one graph and compare its nodes, then the graph as a whole."""
    tally.graphs += 1
    kind = KINDS[number % len(KINDS)]
    d = None
    try:
        for d, node in draw(kind, np.random.default_rng([seed, number])):
            _compare_node(d, node, d.values, number, tally)
            tally.operators[node.op_type] += 1
        if d is not None:
            _compare_whole(d, number, tally)
    except PipelineError as error:
        tally.wrong.append(f"graph {number}: refused: {error}")


def _ours(d: Drawn, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The executor's outputs of one node, from given values of the right type."""
    typed = {n: values[n].astype(d.values[n].dtype) for n in values}
    model = alone(node, typed, d.constants)
    _declare(model, d)
    results = GraphExecutor(model).evaluate({n: typed[n] for n in node.input if n in typed})
    return [results[name] for name in node.output]


def _declare(model: onnx.ModelProto, d: Drawn) -> None:
    """Declare the outputs' types as ONNX Runtime found them."""
    for port in model.graph.output:
        value = d.values[port.name]
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        port.CopyFrom(helper.make_tensor_value_info(port.name, kind, None))


def _compare_node(
    d: Drawn, node: onnx.NodeProto, values: dict[str, np.ndarray], number: int, tally: Tally
) -> None:
    """Compare the executor's outputs of one node with those among `values`."""
    read = [values[n] if n in values else d.constants[n] for n in node.input if n]
    size = max((float(_finite(v).max(initial=0)) for v in read), default=0.0)
    for name, result in zip(node.output, _ours(d, node, values), strict=True):
        tally.tensors += 1
        wrong = wrong_values(result, values[name].astype(d.values[name].dtype), size)
        if wrong:
            shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in read)
            text = helper.printable_node(node)
            tally.wrong.append(f"graph {number}: {wrong} wrong of {name}: {text} on {shapes}")


def _finite(value: np.ndarray) -> np.ndarray:
    magnitudes = np.abs(value.astype(np.float64))
    return magnitudes[np.isfinite(magnitudes)]


def _compare_whole(d: Drawn, number: int, tally: Tally) -> None:
    """The plan of a graph: order, what is freed, what is computed once, what shares memory."""
    x = {"x": d.values["x"]}
    read = {n for node in d.nodes for n in node.input}
    names = [n for node in d.nodes for n in node.output]
    kept, freed = ({**x, **_whole(d, wanted)} for wanted in (names, sorted({*names} - read)))
    for node in d.nodes:
        _compare_node(d, node, kept, number, tally)
    for name, value in freed.items():
        if not np.array_equal(value, kept[name], equal_nan=is_float(value)):
            tally.wrong.append(f"graph {number}: {name} differs where other tensors are freed")


def _whole(d: Drawn, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The executor's values of some tensors of the whole graph."""
    x = {"x": d.values["x"]}
    model = model_of(d.nodes, x, d.constants, outputs)
    _declare(model, d)
    return GraphExecutor(model).evaluate(x)


@click.command(help=__doc__)
@click.option("--graphs", default=1000, show_default=True, help="Graphs to draw.")
@click.option("--first", default=0, show_default=True, help="Number of the first graph.")
@click.option("--seed", default=0, show_default=True, help="What the numbers start from.")
def main(graphs: int, first: int, seed: int) -> None:
    """Draw graphs and compare them."""
    torch.set_num_threads(1)
    tally = Tally()
    for number in range(first, first + graphs):
        compare(number, seed, tally)
    for line in tally.wrong:
        click.echo(line)
    click.echo(
        f"{tally.graphs} graphs, {tally.tensors} tensors of {len(tally.operators)} operators "
        f"compared with ONNX Runtime {onnxruntime.__version__}: "
        f"{len(tally.wrong)} with wrong values"
    )
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
