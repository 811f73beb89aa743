"""Every operation of ML Programs over a grid of its parameters, in float32 and in float16.

A program holds many operations: each takes its own part of the one input and has its own output, so
that shapes are free, also along the axis on which images lie. Two images are evaluated at once and
each compared with torch or numpy on that image alone. In float16 what is expected is computed in
float32 from rounded inputs and then rounded: results may differ by one unit in the last place,
where another order of summation falls on the other side of a tie.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.operators.table import OPERATORS
from pipeline.emulate.mil.weights import DECOMPRESSORS

# coremltools leaves its models' temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

Shape = tuple[int, ...]
Number = Callable[[Any], Any]
"""Makes an array a constant of the program's floating-point type."""

LENGTH = 1024


@dataclass(frozen=True)
class Case:
    """One operation with its parameters.

    Attributes:
        operation: Its name.
        shapes: Shapes of its inputs, parts of the program's input one after the other.
        build: Takes coremltools' builder, `Number` and the inputs.
        reference: The same on torch tensors; constants are given by `Number`'s twin.
        settings: For the case's name.
    """

    operation: str
    shapes: tuple[Shape, ...]
    build: Callable[..., Any]
    reference: Callable[..., Tensor]
    settings: str = ""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.settings}".strip()


def constant(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(operation: str, part: Shape, reference: Callable[..., Tensor], /, **settings: Any) -> Case:
    """An operation on one input whose other parameters are neither tensors nor of its type."""
    return Case(
        operation,
        (part,),
        lambda mb, number, x: getattr(mb, operation)(x=x, **settings),
        reference,
        " ".join(f"{key}={value}" for key, value in settings.items()),
    )


# The grids, one function for each kind of operation.


def convolutions() -> Iterator[Case]:
    sizes = {1: (9,), 2: (7, 9), 3: (4, 5, 6)}
    kernels = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}
    pads: list[tuple[str, int, int]] = [
        ("valid", 0, 0),
        ("same", 0, 0),
        ("same_lower", 0, 0),
        ("custom", 1, 1),
        ("custom", 0, 2),
    ]
    for axes, (kind, before, behind), stride, dilation, groups in itertools.product(
        (1, 2, 3), pads, (1, 2), (1, 2), (1, 2)
    ):
        if axes == 3 and (dilation == 2 or groups == 2):
            continue
        weight = constant(axes, 4, 2 // groups, *kernels[axes])
        bias = constant(5, 4) if groups == 1 else None
        pad = [before, behind] * axes
        yield Case(
            "conv",
            ((1, 2, *sizes[axes]),),
            _conv(weight, bias, kind, pad, stride, dilation, groups),
            _conv_reference(weight, bias, kind, pad, stride, dilation, groups),
            f"axes={axes} {kind} pad={pad} stride={stride} dilation={dilation} groups={groups}",
        )


def _conv(
    weight: Any, bias: Any, kind: str, pad: list[int], stride: int, dilation: int, groups: int
) -> Callable[..., Any]:
    axes = weight.ndim - 2

    def build(mb: Any, number: Number, x: Any) -> Any:
        more = {"pad": pad} if kind == "custom" else {}
        if bias is not None:
            more["bias"] = number(bias)
        return mb.conv(
            x=x,
            weight=number(weight),
            pad_type=kind,
            strides=[stride] * axes,
            dilations=[dilation] * axes,
            groups=groups,
            **more,
        )

    return build


def _conv_reference(
    weight: Any, bias: Any, kind: str, pad: list[int], stride: int, dilation: int, groups: int
) -> Callable[..., Tensor]:
    def reference(x: Tensor, number: Number) -> Tensor:
        axes = x.ndim - 2
        pairs = list(zip(pad[0::2], pad[1::2], strict=True))
        for axis in range(axes):
            if kind.startswith("same"):
                size, kernel = x.shape[2 + axis], weight.shape[2 + axis]
                total = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size
                small, large = max(0, total) // 2, -(-max(0, total) // 2)
                pairs[axis] = (small, large) if kind == "same" else (large, small)
            elif kind == "valid":
                pairs[axis] = (0, 0)
        padded = F.pad(x, [n for pair in reversed(pairs) for n in pair])
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
        offset = None if bias is None else number(bias)
        return convolve(padded, number(weight), offset, stride, 0, dilation, groups)

    return reference


def transposed_convolutions() -> Iterator[Case]:
    sizes = {1: (5,), 2: (4, 5), 3: (3, 3, 4)}
    for axes, stride, dilation, groups, pad, stated in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), (1, 2), (0, 1), (False, True)
    ):
        if axes == 3 and (dilation == 2 or groups == 2):
            continue
        kernel = (3, 2, 2)[:axes]
        weight, bias = constant(axes, 2, 4 // groups, *kernel), constant(6, 4)

        def reference(
            x: Tensor,
            number: Number,
            weight: Any = weight,
            bias: Any = bias,
            settings: Any = (stride, pad, 0, groups, dilation),
        ) -> Tensor:
            convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
            return convolve[x.ndim - 2](x, number(weight), number(bias), *settings)

        expected = reference(torch.zeros(1, 2, *sizes[axes]), torch.from_numpy)

        def build(
            mb: Any,
            number: Number,
            x: Any,
            weight: Any = weight,
            bias: Any = bias,
            more: Any = {"output_shape": list(expected.shape)} if stated else {},
            settings: Any = (stride, pad, groups, dilation),
        ) -> Any:
            stride, pad, groups, dilation = settings
            axes = weight.ndim - 2
            return mb.conv_transpose(
                x=x,
                weight=number(weight),
                bias=number(bias),
                pad_type="custom" if pad else "valid",
                pad=[pad, pad] * axes,
                strides=[stride] * axes,
                dilations=[dilation] * axes,
                groups=groups,
                **more,
            )

        yield Case(
            "conv_transpose",
            ((1, 2, *sizes[axes]),),
            build,
            reference,
            f"axes={axes} {stride=} {dilation=} {groups=} {pad=} {stated=}",
        )


def products() -> Iterator[Case]:
    shapes: list[tuple[Shape, Shape]] = [
        ((4, 6), (6, 3)),
        ((2, 4, 6), (2, 6, 3)),
        ((2, 4, 6), (6, 3)),
        ((1, 3, 4, 6), (2, 1, 6, 5)),
    ]
    for (a, b), first, second in itertools.product(shapes, (False, True), (False, True)):
        x = (*a[:-2], a[-1], a[-2]) if first else a
        y = (*b[:-2], b[-1], b[-2]) if second else b
        yield Case(
            "matmul",
            (x, y),
            lambda mb, number, x, y, first=first, second=second: mb.matmul(
                x=x, y=y, transpose_x=first, transpose_y=second
            ),
            lambda x, y, number, first=first, second=second: (
                (x.mT if first else x) @ (y.mT if second else y)
            ),
            f"{a} {b} {first} {second}",
        )
    for shape in [(6,), (3, 6), (2, 3, 6)]:
        weight, bias = constant(7, 5, 6), constant(8, 5)
        yield Case(
            "linear",
            (shape,),
            lambda mb, number, x, weight=weight, bias=bias: mb.linear(
                x=x, weight=number(weight), bias=number(bias)
            ),
            lambda x, number, weight=weight, bias=bias: F.linear(x, number(weight), number(bias)),
            str(shape),
        )
    for equation, a, b in [
        ("nchw,nwhu->nchu", (1, 3, 4, 5), (1, 5, 4, 2)),
        ("chw,whr->chr", (3, 4, 5), (5, 4, 2)),
    ]:
        yield Case(
            "einsum",
            (a, b),
            lambda mb, number, x, y, equation=equation: mb.einsum(values=(x, y), equation=equation),
            lambda x, y, number, equation=equation: torch.einsum(equation, x, y),
            equation,
        )


def mixed_product() -> Iterator[Case]:
    whole = np.arange(-6, 6, dtype=np.int32).reshape(4, 3)
    yield Case(
        "matmul",
        ((2, 4),),
        lambda mb, number, x: mb.matmul(x=x, y=whole),
        lambda x, number: x @ torch.from_numpy(whole).float(),
        "float by int32",
    )


def pools() -> Iterator[Case]:
    sizes = {1: (9,), 2: (7, 9), 3: (5, 6, 5)}
    for axes, stride, (kind, pad), ceil in itertools.product(
        (1, 2, 3), (1, 2), (("valid", 0), ("custom", 1)), (False, True)
    ):
        if axes == 3 and ceil:
            continue  # coremltools refuses
        kernel = [3, 2, 3][:axes]
        shape = (1, 3, *sizes[axes])
        settings = {
            "kernel_sizes": kernel,
            "strides": [stride] * axes,
            "pad_type": kind,
            "pad": [pad, pad] * axes,
            "ceil_mode": ceil,
        }
        arguments = (kernel, stride, pad)
        largest = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
        yield same(
            "max_pool",
            shape,
            lambda x, number, largest=largest, arguments=arguments, ceil=ceil: largest(
                x, *arguments, ceil_mode=ceil
            ),
            **settings,
        )
        mean: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
        for excluded in (False, True):
            yield same(
                "avg_pool",
                shape,
                lambda x, number, mean=mean, arguments=arguments, ceil=ceil, excluded=excluded: (
                    mean(x, *arguments, ceil_mode=ceil, count_include_pad=not excluded)
                ),
                **settings,
                exclude_padding_from_average=excluded,
            )


def norms() -> Iterator[Case]:
    shape = (2, 4, 3, 5)
    gamma, beta, mean = constant(1, 4), constant(2, 4), constant(3, 4)
    variance = np.abs(constant(4, 4)) + 0.5
    for epsilon in (1e-5, 1e-2):
        yield Case(
            "batch_norm",
            (shape,),
            lambda mb, number, x, epsilon=epsilon: mb.batch_norm(
                x=x,
                mean=number(mean),
                variance=number(variance),
                gamma=number(gamma),
                beta=number(beta),
                epsilon=number(epsilon),
            ),
            lambda x, number, epsilon=epsilon: F.batch_norm(
                x,
                number(mean),
                number(variance),
                number(gamma),
                number(beta),
                eps=float(number(epsilon)),
            ),
            str(epsilon),
        )
        yield Case(
            "instance_norm",
            (shape,),
            lambda mb, number, x, epsilon=epsilon: mb.instance_norm(
                x=x, gamma=number(gamma), beta=number(beta), epsilon=number(epsilon)
            ),
            lambda x, number, epsilon=epsilon: F.instance_norm(
                x, weight=number(gamma), bias=number(beta), eps=float(number(epsilon))
            ),
            str(epsilon),
        )
        yield Case(
            "l2_norm",
            (shape,),
            lambda mb, number, x, epsilon=epsilon: mb.l2_norm(x=x, epsilon=number(epsilon)),
            lambda x, number, epsilon=epsilon: (
                x / (x.square().sum((-3, -2, -1), keepdim=True) + number(epsilon)).sqrt()
            ),
            str(epsilon),
        )
    for axes in ([-1], [1], [2, 3], [1, 2, 3], [0]):
        normalized = [shape[axis] for axis in axes]
        weights = None if axes == [0] else (constant(9, *normalized), constant(10, *normalized))

        def build(mb: Any, number: Number, x: Any, axes: Any = axes, weights: Any = weights) -> Any:
            more: dict[str, Any] = {}
            if weights is not None:
                more = {"gamma": number(weights[0]), "beta": number(weights[1])}
            return mb.layer_norm(x=x, axes=axes, epsilon=number(1e-3), **more)

        def reference(
            x: Tensor, number: Number, dims: Any = axes, weights: Any = weights
        ) -> Tensor:
            variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            result: Tensor = (x - mean) / (variance + number(1e-3)).sqrt()
            if weights is None:
                return result
            scale: Tensor
            shift: Tensor
            own = [1, 1, 1, 1]
            for axis in dims:
                own[axis] = x.shape[axis]
            scale, shift = (number(weight).reshape(own) for weight in weights)
            return result * scale + shift

        yield Case("layer_norm", (shape,), build, reference, f"{axes}")


def reductions() -> Iterator[Case]:
    functions: dict[str, Callable[..., Tensor]] = {
        "reduce_mean": lambda x, dims, keep: x.mean(dims, keep),
        "reduce_sum": lambda x, dims, keep: x.sum(dims, keep),
        "reduce_max": lambda x, dims, keep: x.amax(dims, keep),
        "reduce_min": lambda x, dims, keep: x.amin(dims, keep),
        "reduce_l1_norm": lambda x, dims, keep: x.abs().sum(dims, keep),
        "reduce_l2_norm": lambda x, dims, keep: x.square().sum(dims, keep).sqrt(),
        "reduce_sum_square": lambda x, dims, keep: x.square().sum(dims, keep),
        "reduce_log_sum_exp": lambda x, dims, keep: x.logsumexp(dims, keep),
    }
    for (name, function), axes, keep in itertools.product(
        functions.items(), ([0], [-1], [1, 2], [0, 2], None), (True, False)
    ):
        dims = [0, 1, 2] if axes is None else axes
        more = {} if axes is None else {"axes": axes}
        yield same(
            name,
            (3, 4, 5),
            lambda x, number, function=function, dims=dims, keep=keep: function(x, dims, keep),
            keep_dims=keep,
            **more,
        )
    for axis, keep in itertools.product((0, 1, -1), (True, False)):
        yield Case(
            "reduce_argmax",
            ((3, 4, 5),),
            lambda mb, number, x, axis=axis, keep=keep: mb.reduce_argmax(
                x=x, axis=axis, keep_dims=keep
            ),
            lambda x, number, axis=axis, keep=keep: x.argmax(axis, keep),
            f"{axis=} {keep=}",
        )
    for axis, exclusive, reverse in itertools.product((0, 1, -1), (False, True), (False, True)):
        yield same(
            "cumsum",
            (3, 4, 5),
            lambda x, number, axis=axis, exclusive=exclusive, reverse=reverse: _running(
                x, axis, exclusive, reverse
            ),
            axis=axis,
            exclusive=exclusive,
            reverse=reverse,
        )


def _running(x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    """A running sum by definition, one sum for each entry."""
    entries = list(x.unbind(axis))
    count = len(entries)
    sums = []
    for i in range(count):
        first, last = (i, count) if reverse else (0, i + 1)
        terms = entries[first + exclusive : last] if reverse else entries[first : last - exclusive]
        sums.append(sum(terms, torch.zeros_like(entries[0])))
    return torch.stack(sums, axis)


def activations() -> Iterator[Case]:
    shape = (2, 3, 4, 1)
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs,
        "atan": torch.atan,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "cosh": torch.cosh,
        "erf": torch.erf,
        "exp": torch.exp,
        "exp2": torch.exp2,
        "floor": torch.floor,
        "relu": torch.relu,
        "relu6": F.relu6,
        "round": torch.round,
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "silu": F.silu,
        "sin": torch.sin,
        "sinh": torch.sinh,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "square": torch.square,
        "tanh": torch.tanh,
        "identity": torch.clone,
    }
    for name, function in plain.items():
        yield same(name, shape, lambda x, number, function=function: function(x))
    narrow: dict[str, Callable[[Tensor], Tensor]] = {
        "acos": torch.acos,
        "asin": torch.asin,
        "atanh": torch.atanh,
        "tan": torch.tan,
    }
    for name, function in narrow.items():
        yield Case(
            name,
            (shape,),
            lambda mb, number, x, name=name: getattr(mb, name)(x=mb.mul(x=x, y=number(0.25))),
            lambda x, number, function=function: function(_rounded(x * 0.25, number)),
        )
    for name, positive in (("sqrt", torch.sqrt), ("log", torch.log), ("rsqrt", torch.rsqrt)):
        more = {} if name == "sqrt" else {"epsilon": 1e-3}
        yield Case(
            name,
            (shape,),
            lambda mb, number, x, name=name, more=more: getattr(mb, name)(
                x=mb.abs(x=x), **{key: number(value) for key, value in more.items()}
            ),
            lambda x, number, positive=positive, more=more: positive(
                x.abs() + (number(1e-3) if more else 0)
            ),
        )
    yield Case(
        "inverse",
        (shape,),
        lambda mb, number, x: mb.inverse(x=mb.abs(x=x), epsilon=number(0.5)),
        lambda x, number: 1 / (x.abs() + 0.5),
    )
    for mode, form in (
        ("EXACT", F.gelu),
        ("TANH_APPROXIMATION", lambda x: F.gelu(x, approximate="tanh")),
        ("SIGMOID_APPROXIMATION", lambda x: x * torch.sigmoid(1.702 * x)),
    ):
        yield same("gelu", shape, lambda x, number, form=form: form(x), mode=mode)
    for axis in (0, 1, -1):
        yield same("softmax", shape, lambda x, number, axis=axis: x.softmax(axis), axis=axis)
    slopes = np.array([0.1, 0.5, 1.5], np.float32)

    def along(values: Any, number: Number) -> Tensor:
        return torch.as_tensor(number(values)).reshape(-1, 1, 1)

    forms: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
        "leaky_relu": ({"alpha": 0.25}, lambda x, n: F.leaky_relu(x, 0.25)),
        "elu": ({"alpha": 0.75}, lambda x, n: F.elu(x, 0.75)),
        "clamped_relu": (
            {"alpha": 0.25, "beta": 0.5},
            lambda x, n: F.leaky_relu(x, 0.25).clamp(max=0.5),
        ),
        "thresholded_relu": ({"alpha": 0.5}, lambda x, n: torch.where(x >= 0.5, x, 0.0)),
        "threshold": ({"alpha": 0.5}, lambda x, n: x.clamp(min=0.5)),
        "linear_activation": ({"alpha": 2.0, "beta": -1.0}, lambda x, n: 2 * x - 1),
        "scaled_tanh": ({"alpha": 2.0, "beta": 0.5}, lambda x, n: 2 * torch.tanh(0.5 * x)),
        "sigmoid_hard": ({"alpha": 0.25, "beta": 0.5}, lambda x, n: (0.25 * x + 0.5).clamp(0, 1)),
        "clip": ({"alpha": -0.5, "beta": 0.75}, lambda x, n: x.clamp(-0.5, 0.75)),
        "prelu": ({"alpha": slopes}, lambda x, n: torch.where(x < 0, x * along(slopes, n), x)),
        "softplus_parametric": (
            {"alpha": slopes, "beta": 2 * slopes},
            lambda x, n: along(slopes, n) * F.softplus(along(2 * slopes, n) * x),
        ),
    }
    for name, (settings, reference) in forms.items():
        yield Case(
            name,
            (shape,),
            lambda mb, number, x, name=name, settings=settings: getattr(mb, name)(
                x=x, **{key: number(value) for key, value in settings.items()}
            ),
            reference,
        )


def _rounded(x: Tensor, number: Number) -> Tensor:
    return torch.as_tensor(number(x.numpy()))


def pairs() -> Iterator[Case]:
    shapes: list[tuple[Shape, Shape]] = [
        ((2, 3, 4), (2, 3, 4)),
        ((2, 3, 4), (1, 3, 1)),
        ((2, 3, 4), (4,)),
        ((3, 1), (1, 4)),
        ((4, 5), (3, 4, 5)),
    ]
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "real_div": torch.true_divide,
        "floor_div": torch.floor_divide,
        "mod": torch.remainder,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "equal": torch.eq,
        "not_equal": torch.ne,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
    }
    for (name, function), (a, b) in itertools.product(functions.items(), shapes):
        yield Case(
            name,
            (a, b),
            lambda mb, number, x, y, name=name: getattr(mb, name)(x=x, y=y),
            lambda x, y, number, function=function: function(x, y),
            f"{a} {b}",
        )
    for a, b in shapes:
        yield Case(
            "pow",
            (a, b),
            lambda mb, number, x, y: mb.pow(x=mb.abs(x=x), y=y),
            lambda x, y, number: x.abs() ** y,
            f"{a} {b}",
        )
        for name, logic in (
            ("logical_and", torch.logical_and),
            ("logical_or", torch.logical_or),
            ("logical_xor", torch.logical_xor),
        ):
            yield Case(
                name,
                (a, b),
                lambda mb, number, x, y, name=name: getattr(mb, name)(
                    x=mb.greater(x=x, y=number(0)), y=mb.greater(x=y, y=number(0))
                ),
                lambda x, y, number, logic=logic: logic(x > 0, y > 0),
                f"{a} {b}",
            )
    yield Case(
        "logical_not",
        ((3, 4),),
        lambda mb, number, x: mb.logical_not(x=mb.greater(x=x, y=number(0))),
        lambda x, number: x <= 0,
    )
    yield Case(
        "select",
        ((3, 4), (3, 4), (3, 4)),
        lambda mb, number, x, y, z: mb.select(cond=mb.greater(x=x, y=number(0)), a=y, b=z),
        lambda x, y, z, number: torch.where(x > 0, y, z),
    )
    for kind, whole in (("int32", torch.int32), ("bool", torch.bool)):
        yield Case(
            "cast",
            ((3, 4),),
            lambda mb, number, x, kind=kind: mb.cast(x=x, dtype=kind),
            lambda x, number, whole=whole: x.to(whole),
            kind,
        )


def layouts() -> Iterator[Case]:
    shape = (2, 3, 4)
    for perm in itertools.permutations(range(3)):
        yield same(
            "transpose", shape, lambda x, number, perm=perm: x.permute(perm), perm=list(perm)
        )
    yield same("transpose", shape, lambda x, number: x.permute(0, 2, 1), perm=[0, -1, -2])
    for target in ([24], [4, 6], [-1, 2], [0, 4, 3], [0, -1, 2], [1, 2, 3, 4]):
        sizes = [2 if size == 0 else size for size in target]
        yield same("reshape", shape, lambda x, number, sizes=sizes: x.reshape(sizes), shape=target)
    for axes in ([0], [1], [-1], [0, 2], [-2, 0]):
        expected = np.expand_dims(np.zeros(shape), tuple(axes)).shape
        yield same("expand_dims", shape, lambda x, number, e=expected: x.reshape(e), axes=axes)
    dropped: tuple[list[int] | None, ...] = ([0], [2], [0, -1], None)
    for squeezed in dropped:
        more = {} if squeezed is None else {"axes": squeezed}
        yield same(
            "squeeze",
            (1, 3, 1, 4, 1),
            lambda x, number, axes=squeezed: x.squeeze() if axes is None else x.squeeze(axes),
            **more,
        )
    for axis in (0, 1, 2, 3, -1, -2):
        split_at = axis if axis >= 0 else axis + 3
        yield same(
            "flatten2d",
            shape,
            lambda x, number, s=split_at: x.reshape(math.prod(shape[:s]), math.prod(shape[s:])),
            axis=axis,
        )
    for reps in ([1, 1, 1], [2, 1, 3], [1, 2, 1]):
        yield same("tile", shape, lambda x, number, reps=reps: x.repeat(reps), reps=reps)


def joins() -> Iterator[Case]:
    shape = (2, 3, 4)
    for axis in (0, 1, 2, -1):
        yield Case(
            "concat",
            (shape, shape),
            lambda mb, number, x, y, axis=axis: mb.concat(values=(x, y, x), axis=axis),
            lambda x, y, number, axis=axis: torch.cat([x, y, x], axis),
            f"{axis=}",
        )
        dim = axis % 3
        yield Case(
            "concat",
            (shape, shape),
            lambda mb, number, x, y, axis=axis: mb.concat(
                values=(x, y), axis=axis, interleave=True
            ),
            lambda x, y, number, dim=dim: torch.stack([x, y], dim + 1).flatten(dim, dim + 1),
            f"{axis=} interleave",
        )
        yield Case(
            "stack",
            (shape, shape),
            lambda mb, number, x, y, axis=axis: mb.stack(values=(x, y), axis=axis),
            lambda x, y, number, axis=axis: torch.stack([x, y], axis),
            f"{axis=}",
        )
        yield same("reverse", shape, lambda x, number, axis=axis: x.flip(axis), axes=[axis])
    for axis, parts in ((0, 2), (1, 3), (-1, 2)):
        for part in range(parts):
            yield Case(
                "split",
                (shape,),
                lambda mb, number, x, axis=axis, parts=parts, part=part: mb.split(
                    x=x, num_splits=parts, axis=axis
                )[part],
                lambda x, number, axis=axis, parts=parts, part=part: x.chunk(parts, axis)[part],
                f"{axis=} {parts=} {part=}",
            )
    for part in range(3):
        yield Case(
            "split",
            (shape,),
            lambda mb, number, x, part=part: mb.split(x=x, split_sizes=[1, 0, 3], axis=2)[part],
            lambda x, number, part=part: x.split([1, 0, 3], 2)[part],
            f"sizes {part=}",
        )


def places() -> Iterator[Case]:
    shape = (3, 4, 6)
    slices: list[dict[str, Any]] = [
        {"begin": [0, 1, 2], "end": [3, 4, 5]},
        {"begin": [0, -3, -4], "end": [2, -1, -1]},
        {"begin": [2, 0, 0], "end": [3, 4, 6], "stride": [1, 2, 3]},
        {
            "begin": [-1, 3, 5],
            "end": [0, 0, 1],
            "stride": [-1, -1, -2],
            "end_mask": [True, False, False],
        },
        {"begin": [0, 1, 9], "end": [9, 9, 9], "begin_mask": [False, False, True]},
        {"begin": [1, 1, 1], "end": [0, 0, 0], "end_mask": [True, True, True]},
        {"begin": [1, -1, 0], "end": [2, 0, 6], "squeeze_mask": [True, True, False]},
        {"begin": [1, 1, 2], "end": [1, 1, 1], "squeeze_mask": [True, True, True]},
        {"begin": [0, 2, 0], "end": [3, 2, 6]},
    ]
    for settings in slices:
        yield same(
            "slice_by_index", shape, lambda x, number, s=settings: _sliced(x, **s), **settings
        )
    for begin, size in (
        ([0, 1, 2], [3, 2, 1]),
        ([1, 0, 3], [-1, -1, -1]),
        ([0, -3, -1], [1, 2, 1]),
    ):
        yield same(
            "slice_by_size",
            shape,
            lambda x, number, begin=begin, size=size: _sliced(
                x,
                [b % n for b, n in zip(begin, x.shape, strict=True)],
                [n if s == -1 else b % n + s for b, s, n in zip(begin, size, x.shape, strict=True)],
            ),
            begin=begin,
            size=size,
        )
    for axis, indices in itertools.product((0, 1, -1), ([2], [0, 2, 2], [[1, 0], [-1, -2]])):
        index = np.array(indices, np.int32)
        yield same(
            "gather",
            shape,
            lambda x, number, axis=axis, index=index: torch.from_numpy(
                np.take(x.numpy(), index, axis)
            ),
            indices=index,
            axis=axis,
        )
        along = np.resize(np.array([0, 2, 1, -1], np.int32), (3, 4, 6))
        yield same(
            "gather_along_axis",
            shape,
            lambda x, number, axis=axis, along=along: torch.from_numpy(
                np.take_along_axis(x.numpy(), along, axis)
            ),
            indices=along,
            axis=axis,
        )
    for mode, name in (("constant", "constant"), ("reflect", "reflect"), ("replicate", "edge")):
        for pad in ([1, 2], [0, 3, 2, 1]):
            widths = [(0, 0)] * (3 - len(pad) // 2) + list(zip(pad[0::2], pad[1::2], strict=True))
            yield Case(
                "pad",
                (shape,),
                lambda mb, number, x, mode=mode, pad=pad: mb.pad(
                    x=x, pad=pad, mode=mode, constant_val=number(0.5)
                ),
                lambda x, number, name=name, widths=widths: torch.from_numpy(
                    np.pad(
                        x.numpy(),
                        widths,
                        name,
                        **({"constant_values": 0.5} if name == "constant" else {}),
                    )
                ),
                f"{mode} {pad}",
            )
    for axis, ascending in itertools.product((0, 1, -1), (False, True)):
        yield same(
            "argsort",
            shape,
            lambda x, number, axis=axis, ascending=ascending: torch.argsort(
                x, dim=axis, descending=not ascending, stable=True
            ),
            axis=axis,
            ascending=ascending,
        )
        for which in (0, 1):
            yield Case(
                "topk",
                (shape,),
                lambda mb, number, x, axis=axis, ascending=ascending, which=which: mb.topk(
                    x=x, k=2, axis=axis, ascending=ascending
                )[which],
                lambda x, number, axis=axis, ascending=ascending, which=which: x.topk(
                    2, axis, largest=not ascending
                )[which],
                f"{axis=} {ascending=} {which=}",
            )
    for lower, upper in itertools.product((-1, 0, 1, 9), (-1, 0, 2)):
        rows, columns = np.mgrid[0:4, 0:6]
        kept = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
        yield same(
            "band_part",
            shape,
            lambda x, number, kept=kept: x * torch.from_numpy(kept),
            lower=lower,
            upper=upper,
        )
    yield same("shape", shape, lambda x, number: torch.tensor([3, 4, 6]))
    yield Case(
        "fill",
        (shape,),
        lambda mb, number, x: mb.fill(shape=mb.shape(x=x), value=number(2)),
        lambda x, number: torch.full(shape, 2.0),
    )
    yield Case(
        "fill_like",
        (shape,),
        lambda mb, number, x: mb.fill_like(ref_tensor=x, value=number(2)),
        lambda x, number: torch.full(shape, 2.0),
    )
    for start, end, step in ((0, 5, 1), (2, 9, 3), (5, 0, -2)):
        yield Case(
            "range_1d",
            (shape,),
            lambda mb, number, x, start=start, end=end, step=step: mb.range_1d(
                start=np.int32(start),
                end=mb.sub(
                    x=mb.add(x=mb.gather(x=mb.shape(x=x), indices=0, axis=0), y=np.int32(end)),
                    y=np.int32(3),
                ),
                step=np.int32(step),
            ),
            lambda x, number, start=start, end=end, step=step: torch.arange(start, end, step),
            f"{start} {end} {step}",
        )


def _sliced(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """What numpy makes of these slices."""
    keys: list[Any] = []
    for axis, (first, last) in enumerate(zip(begin, end, strict=True)):
        start = None if begin_mask and begin_mask[axis] else first
        stop = None if end_mask and end_mask[axis] else last
        one = squeeze_mask is not None and squeeze_mask[axis]
        keys.append(first if one else slice(start, stop, stride[axis] if stride else 1))
    return torch.from_numpy(np.array(x.numpy()[tuple(keys)]))


def images() -> Iterator[Case]:
    shape = (1, 8, 4, 6)
    yield same("pixel_shuffle", shape, lambda x, number: F.pixel_shuffle(x, 2), upscale_factor=2)
    yield same(
        "pixel_unshuffle",
        shape,
        lambda x, number: F.pixel_unshuffle(x, 2),
        downscale_factor=np.uint32(2),
    )
    yield same(
        "depth_to_space",
        shape,
        lambda x, number: (
            x.reshape(1, 2, 2, 2, 4, 6).permute(0, 3, 4, 1, 5, 2).reshape(1, 2, 8, 12)
        ),
        block_size=2,
    )
    yield same(
        "space_to_depth",
        shape,
        lambda x, number: (
            x.reshape(1, 8, 2, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(1, 32, 2, 3)
        ),
        block_size=2,
    )
    yield same(
        "crop",
        shape,
        lambda x, number: x[:, :, 1:4, 2:5],
        crop_height=[1, 0],
        crop_width=[2, 1],
    )
    for height, width in ((2, 3), (1, 1), (1.5, 2.5), (0.5, 0.5), (1.25, 0.7)):
        size = (math.floor(4 * height), math.floor(6 * np.float32(width)))
        kind = np.float32 if isinstance(height, float) else np.int32
        factors = {"scale_factor_height": kind(height), "scale_factor_width": kind(width)}
        yield same(
            "upsample_nearest_neighbor",
            shape,
            lambda x, number, size=size: F.interpolate(x, size),
            **factors,
        )
        for aligned in (True, False):
            yield same(
                "upsample_bilinear",
                shape,
                lambda x, number, size=size, aligned=aligned: F.interpolate(
                    x, size, mode="bilinear", align_corners=aligned
                ),
                align_corners=aligned,
                **factors,
            )
    yield same(
        "upsample_bilinear",
        (1, 1, 2),
        lambda x, number: torch.lerp(
            x[..., [0, 0, 0, 1, 1, 1]],
            x[..., [1, 1, 1, 1, 1, 1]],
            torch.tensor([0, 1 / 3, 2 / 3, 0, 0, 0]),
        ),
        scale_factor_height=1,
        scale_factor_width=3,
        align_corners=False,
        half_pixel_centers=False,
    )


def eight_bits() -> Iterator[Case]:
    shape = (2, 3, 4)
    steps, zeros = np.array([0.25, 0.5, 0.125], np.float32), np.array([0, 3, -2], np.int8)
    for kind, low, high in (("int8", -128, 127), ("uint8", 0, 255)):
        for axis, scale, zero in (
            (None, np.float32(0.25), None),
            (None, np.float32(0.0625), np.dtype(kind).type(5)),
            (1, steps, None),
            (1, steps, zeros if kind == "int8" else np.abs(zeros).astype(np.uint8)),
        ):
            more: dict[str, Any] = {} if axis is None else {"axis": axis}
            more |= {} if zero is None else {"zero_point": zero}

            def build(
                mb: Any,
                number: Number,
                x: Any,
                scale: Any = scale,
                kind: str = kind,
                more: Any = more,
            ) -> Any:
                stored = mb.quantize(input=x, scale=number(scale), output_dtype=kind, **more)
                return mb.dequantize(input=stored, scale=number(scale), **more)

            def reference(
                x: Tensor,
                number: Number,
                scale: Any = scale,
                zero: Any = 0 if zero is None else zero,
                limits: Any = (low, high),
            ) -> Tensor:
                step = torch.as_tensor(np.asarray(scale)).reshape(-1, 1)
                point = torch.as_tensor(np.asarray(zero, np.float32)).reshape(-1, 1)
                return (((x / step).round() + point).clamp(*limits) - point) * step

            name = f"{kind} {axis=} {zero=}"
            yield Case("quantize", (shape,), build, reference, name)


GRIDS = (
    convolutions,
    transposed_convolutions,
    products,
    mixed_product,
    pools,
    norms,
    reductions,
    activations,
    pairs,
    layouts,
    joins,
    places,
    images,
    eight_bits,
)


@pytest.fixture(scope="module")
def ct() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return pytest.importorskip("coremltools")


def numbers(half: bool) -> tuple[Number, Number]:
    """`Number` for the program, and its twin for references: float32 with the same values."""
    kind = np.float16 if half else np.float32

    def stored(value: Any) -> Any:
        return np.asarray(value, np.float32).astype(kind)

    def read(value: Any) -> Any:
        return torch.from_numpy(np.array(stored(value).astype(np.float32)))

    return stored, read


def save(ct: Any, cases: list[Case], path: Path, half: bool) -> MilExecutor:
    """A program with an output for each case, converted as it is, without a pass."""
    mb = ct.converters.mil.Builder
    stored, _ = numbers(half)

    @mb.program(input_specs=[mb.TensorSpec((1, LENGTH))], opset_version=ct.target.iOS17)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        values = mb.cast(x=x, dtype="fp16") if half else x
        results = []
        for index, case in enumerate(cases):
            parts, start = [], 0
            for shape in case.shapes:
                count = math.prod(shape)
                part = mb.slice_by_size(x=values, begin=[0, start], size=[1, count])
                parts.append(mb.reshape(x=part, shape=shape))
                start += count
            result = case.build(mb, stored, *parts)
            results.append(mb.cast(x=result, dtype="fp32", name=f"out{index}"))
        return tuple(results)

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return MilExecutor(path, precision="half")


def expected(case: Case, image: Tensor, half: bool) -> np.ndarray[Any, Any]:
    _, read = numbers(half)
    values = image.half().float() if half else image
    parts, start = [], 0
    for shape in case.shapes:
        count = math.prod(shape)
        parts.append(values[start : start + count].reshape(shape))
        start += count
    result = case.reference(*parts, read)
    rounded = result.half() if half and result.is_floating_point() else result
    # The executor joins the results of images along their first axis.
    return np.atleast_1d(rounded.float().numpy())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid.__name__))
def test_grid(ct: Any, grid: Callable[[], Iterator[Case]], half: bool, tmp_path: Path) -> None:
    cases = list(grid())
    executor = save(ct, cases, tmp_path / "model.mlpackage", half)
    made = executor.operations()
    values = np.random.default_rng(3).standard_normal((2, LENGTH)).astype(np.float32)
    answers = executor.predict(values)
    wrong = []
    for index, case in enumerate(cases):
        assert made[case.operation] > 0
        wanted = np.concatenate([expected(case, image, half) for image in torch.from_numpy(values)])
        found = answers[f"out{index}"]
        if found.shape != wanted.shape or not _close(found, wanted, half):
            shapes = f"{found.shape} instead of {wanted.shape}"
            values_found = f"{found.ravel()[:4]} instead of {wanted.ravel()[:4]}"
            wrong.append(f"{case.name}: {shapes}: {values_found}")
    assert not wrong, "\n".join(wrong)


def _close(found: Any, wanted: Any, half: bool) -> bool:
    """Within one unit of float16, or the noise of float32 sums."""
    if not half:
        return bool(np.allclose(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True))
    unit = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float32)
    # Sums of terms around 1 that cancel are no better than their terms.
    return bool(
        ((np.abs(found - wanted) <= unit + 2e-6) | (np.isnan(found) & np.isnan(wanted))).all()
    )


def test_every_claimed_operation_is_in_a_grid() -> None:
    covered = {case.operation for grid in GRIDS for case in grid()}
    # Part of the case of `quantize`; and one that iOS 17 lacks, see `test_operators`.
    elsewhere = {"dequantize", "scaled_dot_product_attention"}
    assert covered | elsewhere == OPERATORS.keys()


def test_every_other_operation_is_refused_by_name(ct: Any, tmp_path: Path) -> None:
    registry = ct.converters.mil.mil.ops.registry.SSAOpRegistry
    known = OPERATORS.keys() | DECOMPRESSORS.keys() | {"const", "classify"}
    others = set(registry.core_ops) - known
    assert len(others) > 30
    package = tmp_path / "model.mlpackage"
    save(ct, [same("relu", (2,), lambda x, number: x.relu())], package, half=False)
    path = package / "Data/com.apple.CoreML/model.mlmodel"
    model = ct.proto.Model_pb2.Model.FromString(path.read_bytes())
    function = model.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    operation = next(entry for entry in operations if entry.type == "relu")
    for name in sorted(others):
        operation.type = name
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UnsupportedOperatorError, match=f"'{name}'.*is not supported"):
            MilExecutor(package)


@pytest.mark.parametrize("reverse", [False, True])
def test_exclusive_running_sum_keeps_small_sums_beside_large_terms(
    ct: Any, tmp_path: Path, reverse: bool
) -> None:
    cases = [
        same("cumsum", (2,), lambda x, number: x, axis=0, exclusive=True, reverse=reverse),
        same("cumsum", (1,), lambda x, number: x, axis=0, exclusive=True, reverse=reverse),
    ]
    executor = save(ct, cases, tmp_path / "model.mlpackage", half=False)
    values = np.zeros((1, LENGTH), np.float32)
    values[0, :2] = (1e8, 1) if reverse else (1, 1e8)
    answers = executor.predict(values)
    np.testing.assert_array_equal(answers["out0"], [1, 0] if reverse else [0, 1])
    np.testing.assert_array_equal(answers["out1"], [0])


def test_sizes_that_a_program_computes_may_be_scalars_and_zero(ct: Any, tmp_path: Path) -> None:
    """Scalars joined to a shape, and slices of what is empty, as in programs with free sizes."""
    mb = ct.converters.mil.Builder
    width = ct.converters.mil.mil.get_new_symbol()

    @mb.program(input_specs=[mb.TensorSpec((1, 3, width))], opset_version=ct.target.iOS17)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        size = mb.gather(x=mb.shape(x=x), indices=2, axis=0)
        turned = mb.reshape(x=x, shape=mb.concat(values=(size, np.int32(3)), axis=0))
        rest = mb.slice_by_index(x=x, begin=[0, 0, 2], end=[1, 3, 0], end_mask=[True, True, True])
        again = mb.slice_by_size(x=rest, begin=[0, 0, 0], size=[1, 3, -1])
        first = mb.slice_by_index(
            x=again, begin=[0, 0, 0], end=[1, 3, 5], end_mask=[False, False, False]
        )
        return mb.identity(x=turned, name="turned"), mb.identity(x=first, name="first")

    model = ct.convert(
        program,
        inputs=[ct.TensorType(name="x", shape=(1, 3, ct.RangeDim(1, 9, default=4)))],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    executor = MilExecutor(tmp_path / "model.mlpackage", precision="float32")
    for size in (5, 2):
        images = constant(1, 2, 3, size)
        answers = executor.predict(images)
        np.testing.assert_array_equal(answers["turned"], images.reshape(2 * size, 3))
        np.testing.assert_array_equal(answers["first"], images[:, :, 2:])


def test_places_outside_are_errors_that_name_the_operation(ct: Any, tmp_path: Path) -> None:
    mb = ct.converters.mil.Builder
    whole = Case(
        "gather",
        ((4,), (1,)),
        lambda mb, number, x, y: mb.gather(x=x, indices=mb.cast(x=y, dtype="int32"), axis=0),
        lambda x, y, number: x,
    )
    assert mb is not None
    executor = save(ct, [whole], tmp_path / "model.mlpackage", half=False)
    values = np.full((2, LENGTH), 9, np.float32)
    with pytest.raises(UnsupportedOperatorError, match=r"'gather' \(line \d+"):
        executor.predict(values)
