"""Each operation of a saved ML Program against torch; saved for one image, evaluated on three."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import DataError
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.operators.table import OPERATORS
from pipeline.emulate.mil.weights import DECOMPRESSORS

pytestmark = [
    # coremltools leaves its models' temporary folders to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

Build = Callable[[Any, Any], Any]
Save = Callable[..., Path]

_RANDOM = np.random.default_rng(0)
W = _RANDOM.standard_normal((6, 4, 3, 3)).astype(np.float32)
W_GROUPED = _RANDOM.standard_normal((4, 2, 3, 2)).astype(np.float32)
W_TRANSPOSED = _RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32)
W_LINEAR = _RANDOM.standard_normal((5, 8)).astype(np.float32)
MATRIX = _RANDOM.standard_normal((1, 4, 8, 5)).astype(np.float32)
BIAS = _RANDOM.standard_normal(6).astype(np.float32)
VECTOR = _RANDOM.uniform(0.5, 1.5, 4).astype(np.float32)
OTHER = _RANDOM.standard_normal((1, 4, 6, 8)).astype(np.float32)
VECTOR_8 = _RANDOM.uniform(0.5, 1.5, 8).astype(np.float32)

SHAPE = (1, 4, 6, 8)


def t(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array)


@pytest.fixture(scope="module")
def ct() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def save(ct: Any, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Build a program of one input and one or several outputs, convert it as it is, save it."""

    def build_and_save(
        *builds: Build,
        shape: tuple[int, ...] = SHAPE,
        target: str = "iOS17",
        half: bool = False,
    ) -> Path:
        mb = ct.converters.mil.Builder
        version = getattr(ct.target, target)

        @mb.program(input_specs=[mb.TensorSpec(shape)], opset_version=version)  # type: ignore[untyped-decorator]
        def program(x: Any) -> Any:
            return tuple(
                mb.identity(x=build(mb, x), name=f"out{i}") for i, build in enumerate(builds)
            )

        precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
        # An empty pipeline keeps every operation as it was written.
        passes = None if half else ct.PassPipeline.EMPTY
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=version,
            compute_precision=precision,
            pass_pipeline=passes,
            skip_model_load=True,
        )
        path = tmp_path_factory.mktemp("package") / "model.mlpackage"
        model.save(str(path))
        return path

    return build_and_save


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
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
    "tan": torch.tan,
    "tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "real_div": torch.true_divide,
    "sub": torch.sub,
    "floor_div": torch.floor_divide,
}
COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "not_equal": torch.ne,
}
LOGIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "reduce_mean": lambda x: x.mean((2, 3), True),
    "reduce_sum": lambda x: x.sum((2, 3), True),
    "reduce_max": lambda x: x.amax((2, 3), True),
    "reduce_min": lambda x: x.amin((2, 3), True),
    "reduce_l1_norm": lambda x: x.abs().sum((2, 3), True),
    "reduce_l2_norm": lambda x: x.square().sum((2, 3), True).sqrt(),
    "reduce_sum_square": lambda x: x.square().sum((2, 3), True),
    "reduce_log_sum_exp": lambda x: x.logsumexp((2, 3), True),
}


def _by_name(name: str, **settings: Any) -> Build:
    return lambda mb, x: getattr(mb, name)(x=x, **settings)


def _compared(name: str) -> Build:
    return lambda mb, x: mb.cast(x=getattr(mb, name)(x=mb.relu(x=x), y=np.float32(0)), dtype="fp32")


def _combined(name: str) -> Build:
    return lambda mb, x: mb.cast(
        x=getattr(mb, name)(
            x=mb.greater(x=x, y=np.float32(0)),
            y=mb.logical_not(x=mb.less(x=x, y=np.float32(1))),
        ),
        dtype="fp32",
    )


def _with(
    function: Callable[[Tensor, Tensor], Tensor],
    left: Callable[[Tensor], Tensor],
    right: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    return lambda x: function(left(x), right(x)).float()


def _simple_cases() -> list[tuple[str, str, Build, Callable[[Tensor], Tensor]]]:
    """The cases that differ in a name alone."""
    cases = [(name, name, _by_name(name), function) for name, function in UNARY.items()]
    for name, binary in BINARY.items():
        reference = _with(binary, lambda x: x, lambda x: t(OTHER))
        cases.append((name, name, _by_name(name, y=OTHER), reference))
    for name, compare in COMPARISONS.items():
        reference = _with(compare, torch.relu, lambda x: torch.zeros(()))
        cases.append((name, name, _compared(name), reference))
    for name, logic in LOGIC.items():
        reference = _with(logic, lambda x: x > 0, lambda x: ~(x < 1))
        cases.append((name, name, _combined(name), reference))
    for name, reduction in REDUCTIONS.items():
        cases.append((name, name, _by_name(name, axes=[2, -1], keep_dims=True), reduction))
    return cases


def _same_padding(x: Tensor, before: int, behind: int) -> Tensor:
    return F.pad(x, (before, behind, before, behind))


# name of the case, the operation that must be in the program, how to build it, the same in torch
CASES: list[tuple[str, str, Build, Callable[[Tensor], Tensor]]] = [
    ("inverse default", "inverse", lambda mb, x: mb.inverse(x=x), lambda x: 1 / (x + 1e-4)),
    (
        "inverse",
        "inverse",
        lambda mb, x: mb.inverse(x=x, epsilon=np.float32(0.5)),
        lambda x: 1 / (x + 0.5),
    ),
    (
        "rsqrt",
        "rsqrt",
        lambda mb, x: mb.rsqrt(x=mb.square(x=x), epsilon=np.float32(1e-3)),
        lambda x: torch.rsqrt(x * x + 1e-3),
    ),
    (
        "log",
        "log",
        lambda mb, x: mb.log(x=mb.square(x=x), epsilon=np.float32(1e-3)),
        lambda x: torch.log(x * x + 1e-3),
    ),
    ("sqrt", "sqrt", lambda mb, x: mb.sqrt(x=mb.abs(x=x)), lambda x: x.abs().sqrt()),
    (
        "clip",
        "clip",
        lambda mb, x: mb.clip(x=x, alpha=np.float32(-0.5), beta=np.float32(0.7)),
        lambda x: x.clamp(-0.5, 0.7),
    ),
    (
        "threshold",
        "threshold",
        lambda mb, x: mb.threshold(x=x, alpha=np.float32(0.1)),
        lambda x: x.clamp(min=0.1),
    ),
    ("elu", "elu", lambda mb, x: mb.elu(x=x, alpha=np.float32(0.8)), lambda x: F.elu(x, 0.8)),
    (
        "pow",
        "pow",
        lambda mb, x: mb.pow(x=mb.abs(x=x), y=np.float32(1.5)),
        lambda x: x.abs() ** 1.5,
    ),
    (
        "clamped_relu",
        "clamped_relu",
        lambda mb, x: mb.clamped_relu(x=x, alpha=np.float32(0.1), beta=np.float32(0.5)),
        lambda x: F.leaky_relu(x, 0.1).clamp(max=0.5),
    ),
    (
        "leaky_relu",
        "leaky_relu",
        lambda mb, x: mb.leaky_relu(x=x, alpha=np.float32(0.2)),
        lambda x: F.leaky_relu(x, 0.2),
    ),
    ("prelu", "prelu", lambda mb, x: mb.prelu(x=x, alpha=VECTOR), lambda x: F.prelu(x, t(VECTOR))),
    (
        "linear_activation",
        "linear_activation",
        lambda mb, x: mb.linear_activation(x=x, alpha=np.float32(2), beta=np.float32(-1)),
        lambda x: 2 * x - 1,
    ),
    (
        "scaled_tanh",
        "scaled_tanh",
        lambda mb, x: mb.scaled_tanh(x=x, alpha=np.float32(2), beta=np.float32(0.5)),
        lambda x: 2 * torch.tanh(0.5 * x),
    ),
    (
        "hard sigmoid",
        "sigmoid_hard",
        lambda mb, x: mb.sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5)),
        F.hardsigmoid,
    ),
    (
        "hard swish",
        "sigmoid_hard",
        lambda mb, x: mb.mul(
            x=x, y=mb.sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5))
        ),
        F.hardswish,
    ),
    (
        "softplus_parametric",
        "softplus_parametric",
        lambda mb, x: mb.softplus_parametric(x=x, alpha=VECTOR, beta=2 * VECTOR),
        lambda x: t(VECTOR).reshape(-1, 1, 1) * F.softplus(x * (2 * t(VECTOR)).reshape(-1, 1, 1)),
    ),
    (
        "thresholded_relu",
        "thresholded_relu",
        lambda mb, x: mb.thresholded_relu(x=x, alpha=np.float32(0.3)),
        lambda x: F.threshold(x, 0.3, 0.0),
    ),
    ("gelu", "gelu", lambda mb, x: mb.gelu(x=x), F.gelu),
    (
        "gelu tanh",
        "gelu",
        lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    (
        "gelu sigmoid",
        "gelu",
        lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    ("softmax", "softmax", lambda mb, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    (
        "cast to int",
        "cast",
        lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"),
        torch.trunc,
    ),
    ("conv valid", "conv", lambda mb, x: mb.conv(x=x, weight=W), lambda x: F.conv2d(x, t(W))),
    (
        "conv bias stride dilation",
        "conv",
        lambda mb, x: mb.conv(
            x=x,
            weight=W,
            bias=BIAS,
            strides=[2, 1],
            dilations=[1, 2],
            pad_type="custom",
            pad=[1, 1, 2, 2],
        ),
        lambda x: F.conv2d(x, t(W), t(BIAS), (2, 1), (1, 2), (1, 2)),
    ),
    (
        "conv asymmetric",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=W, pad_type="custom", pad=[0, 2, 1, 0]),
        lambda x: F.conv2d(F.pad(x, (1, 0, 0, 2)), t(W)),
    ),
    (
        "conv same",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=W, strides=[2, 2], pad_type="same"),
        lambda x: F.conv2d(_same_padding(x, 0, 1), t(W), stride=2),
    ),
    (
        "conv same_lower",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=W, strides=[2, 2], pad_type="same_lower"),
        lambda x: F.conv2d(_same_padding(x, 1, 0), t(W), stride=2),
    ),
    (
        "conv groups",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=W_GROUPED, groups=2),
        lambda x: F.conv2d(x, t(W_GROUPED), groups=2),
    ),
    (
        "conv_transpose",
        "conv_transpose",
        lambda mb, x: mb.conv_transpose(
            x=x, weight=W_TRANSPOSED, strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]
        ),
        lambda x: F.conv_transpose2d(x, t(W_TRANSPOSED), stride=2, padding=1),
    ),
    (
        "linear",
        "linear",
        lambda mb, x: mb.linear(x=x, weight=W_LINEAR, bias=BIAS[:5]),
        lambda x: F.linear(x, t(W_LINEAR), t(BIAS[:5])),
    ),
    ("matmul", "matmul", lambda mb, x: mb.matmul(x=x, y=MATRIX), lambda x: x @ t(MATRIX)),
    (
        "matmul transposed",
        "matmul",
        lambda mb, x: mb.matmul(x=x, y=OTHER, transpose_x=True),
        lambda x: x.mT @ t(OTHER),
    ),
    (
        "matmul transposed twice",
        "matmul",
        lambda mb, x: mb.matmul(x=x, y=x, transpose_y=True),
        lambda x: x @ x.mT,
    ),
    (
        "einsum",
        "einsum",
        lambda mb, x: mb.einsum(
            values=(x, mb.transpose(x=x, perm=[0, 3, 2, 1])), equation="nchw,nwhu->nchu"
        ),
        lambda x: torch.einsum("nchw,nwhu->nchu", x, x.permute(0, 3, 2, 1)),
    ),
    (
        "avg_pool counts padding",
        "avg_pool",
        lambda mb, x: mb.avg_pool(
            x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]
        ),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
    ),
    (
        "avg_pool excludes padding",
        "avg_pool",
        lambda mb, x: mb.avg_pool(
            x=x,
            kernel_sizes=[3, 3],
            strides=[2, 2],
            pad_type="custom",
            pad=[1, 1, 1, 1],
            exclude_padding_from_average=True,
        ),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    ),
    (
        "avg_pool same",
        "avg_pool",
        lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="same"),
        lambda x: F.avg_pool2d(_same_padding(x, 0, 1), 3, 2),
    ),
    (
        "avg_pool ceil",
        "avg_pool",
        lambda mb, x: mb.avg_pool(
            x=x,
            kernel_sizes=[3, 3],
            strides=[2, 2],
            pad_type="valid",
            ceil_mode=True,
            exclude_padding_from_average=True,
        ),
        lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    ),
    (
        "max_pool",
        "max_pool",
        lambda mb, x: mb.max_pool(
            x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 0]
        ),
        lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0)),
    ),
    (
        "max_pool ceil",
        "max_pool",
        lambda mb, x: mb.max_pool(
            x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="valid", ceil_mode=True
        ),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    ),
    (
        "batch_norm",
        "batch_norm",
        lambda mb, x: mb.batch_norm(
            x=x,
            mean=VECTOR,
            variance=2 * VECTOR,
            gamma=3 * VECTOR,
            beta=-VECTOR,
            epsilon=np.float32(1e-3),
        ),
        lambda x: F.batch_norm(x, t(VECTOR), t(2 * VECTOR), t(3 * VECTOR), t(-VECTOR), eps=1e-3),
    ),
    (
        "batch_norm plain",
        "batch_norm",
        lambda mb, x: mb.batch_norm(x=x, mean=VECTOR, variance=VECTOR),
        lambda x: F.batch_norm(x, t(VECTOR), t(VECTOR)),
    ),
    (
        "instance_norm",
        "instance_norm",
        lambda mb, x: mb.instance_norm(x=x, gamma=VECTOR, beta=VECTOR, epsilon=np.float32(0.1)),
        lambda x: F.instance_norm(x, weight=t(VECTOR), bias=t(VECTOR), eps=0.1),
    ),
    (
        "instance_norm plain",
        "instance_norm",
        lambda mb, x: mb.instance_norm(x=x),
        F.instance_norm,
    ),
    (
        "l2_norm",
        "l2_norm",
        lambda mb, x: mb.l2_norm(x=x, epsilon=np.float32(0.1)),
        lambda x: x / (x.square().sum((1, 2, 3), True) + 0.1).sqrt(),
    ),
    (
        "layer_norm last",
        "layer_norm",
        lambda mb, x: mb.layer_norm(
            x=x, axes=[-1], gamma=VECTOR_8, beta=VECTOR_8, epsilon=np.float32(1e-2)
        ),
        lambda x: F.layer_norm(x, (8,), t(VECTOR_8), t(VECTOR_8), 1e-2),
    ),
    (
        "layer_norm channels",
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=VECTOR, beta=VECTOR),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), t(VECTOR), t(VECTOR)).permute(
            0, 3, 1, 2
        ),
    ),
    (
        "reduce_mean drops axes",
        "reduce_mean",
        lambda mb, x: mb.reduce_mean(x=x, axes=[1, 3], keep_dims=False),
        lambda x: x.mean((1, 3)),
    ),
    (
        "reduce_argmax",
        "reduce_argmax",
        lambda mb, x: mb.cast(x=mb.reduce_argmax(x=x, axis=1), dtype="fp32"),
        lambda x: x.argmax(1).float(),
    ),
    (
        "cumsum",
        "cumsum",
        lambda mb, x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
        lambda x: x.flip(2).cumsum(2).flip(2) - x,
    ),
    (
        "reshape folds and unfolds the batch",
        "reshape",
        lambda mb, x: mb.reshape(x=mb.relu(x=mb.reshape(x=x, shape=[24, 8])), shape=[1, 6, 4, 8]),
        lambda x: x.relu().reshape(-1, 6, 4, 8),
    ),
    (
        "reshape minus one",
        "reshape",
        lambda mb, x: mb.reshape(x=x, shape=[1, -1]),
        lambda x: x.flatten(1),
    ),
    (
        "reshape to a computed shape",
        "shape",
        lambda mb, x: mb.reshape(
            x=x,
            shape=mb.concat(
                values=[
                    mb.slice_by_index(x=mb.shape(x=x), begin=[0], end=[1]),
                    np.array([32, 6], np.int32),
                ],
                axis=0,
            ),
        ),
        lambda x: x.reshape(-1, 32, 6),
    ),
    (
        "transpose",
        "transpose",
        lambda mb, x: mb.transpose(x=x, perm=[0, 2, -1, 1]),
        lambda x: x.permute(0, 2, 3, 1),
    ),
    (
        "expand_dims",
        "expand_dims",
        lambda mb, x: mb.expand_dims(x=x, axes=[-3]),
        lambda x: x.unsqueeze(2),
    ),
    (
        "squeeze leaves longer axes",
        "squeeze",
        lambda mb, x: mb.squeeze(x=mb.reduce_max(x=x, axes=[2], keep_dims=True), axes=[-2, 3]),
        lambda x: x.amax(2),
    ),
    (
        "flatten2d",
        "flatten2d",
        lambda mb, x: mb.flatten2d(x=x, axis=2),
        lambda x: x.reshape(-1, 48),
    ),
    (
        "concat",
        "concat",
        lambda mb, x: mb.concat(values=[x, mb.relu(x=x)], axis=-3),
        lambda x: torch.cat([x, x.relu()], 1),
    ),
    (
        "concat interleave",
        "concat",
        lambda mb, x: mb.concat(values=[x, mb.relu(x=x)], axis=1, interleave=True),
        lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2),
    ),
    (
        "stack",
        "stack",
        lambda mb, x: mb.stack(values=[x, mb.relu(x=x)], axis=-1),
        lambda x: torch.stack([x, x.relu()], -1),
    ),
    (
        "split even",
        "split",
        lambda mb, x: mb.sub(
            x=mb.split(x=x, num_splits=2, axis=1)[1], y=mb.split(x=x, num_splits=2, axis=1)[0]
        ),
        lambda x: x[:, 2:] - x[:, :2],
    ),
    (
        "split uneven",
        "split",
        lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=1)[1],
        lambda x: x[:, 1:],
    ),
    (
        "slice_by_index masks",
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[0, 3, 1, -6],
            end=[1, 0, 99, -1],
            stride=[1, 1, 2, 2],
            begin_mask=[False, True, False, False],
            end_mask=[False, True, False, False],
        ),
        lambda x: x[:, :, 1::2, 2:7:2],
    ),
    (
        "slice_by_index squeezes and reverses",
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[0, -2, 0, 5],
            end=[0, 0, 0, 1],
            stride=[1, 1, 1, -2],
            begin_mask=[True, False, True, False],
            end_mask=[True, False, True, False],
            squeeze_mask=[False, True, False, False],
        ),
        lambda x: x[:, 2, :, [5, 3]],
    ),
    (
        "slice_by_size",
        "slice_by_size",
        lambda mb, x: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[1, 2, -1, 5]),
        lambda x: x[:, 1:3, 2:, :5],
    ),
    (
        "gather",
        "gather",
        lambda mb, x: mb.gather(x=x, indices=np.array([[2, 0], [1, 1]], np.int32), axis=1),
        lambda x: x[:, torch.tensor([[2, 0], [1, 1]])],
    ),
    (
        "reverse",
        "reverse",
        lambda mb, x: mb.reverse(x=x, axes=[1, 3]),
        lambda x: x.flip((1, 3)),
    ),
    (
        "tile",
        "tile",
        lambda mb, x: mb.tile(x=x, reps=[1, 2, 1, 3]),
        lambda x: x.repeat(1, 2, 1, 3),
    ),
    (
        "pad constant",
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=np.float32(5)),
        lambda x: F.pad(x, (0, 3, 1, 2), value=5.0),
    ),
    (
        "pad reflect",
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="reflect"),
        lambda x: F.pad(x, (0, 3, 1, 2), "reflect"),
    ),
    (
        "pad replicate",
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="replicate"),
        lambda x: F.pad(x, (0, 3, 1, 2), "replicate"),
    ),
    (
        "select",
        "select",
        lambda mb, x: mb.select(cond=mb.greater(x=x, y=np.float32(0)), a=x, b=OTHER),
        lambda x: torch.where(x > 0, x, t(OTHER)),
    ),
    (
        "fill",
        "fill",
        lambda mb, x: mb.add(x=x, y=mb.fill(shape=mb.shape(x=x), value=np.float32(2))),
        lambda x: x + 2,
    ),
    (
        "range_1d",
        "range_1d",
        lambda mb, x: mb.add(
            x=x,
            y=mb.range_1d(
                start=np.float32(0),
                end=mb.cast(x=mb.gather(x=mb.shape(x=x), indices=3, axis=0), dtype="fp32"),
                step=np.float32(1),
            ),
        ),
        lambda x: x + torch.arange(8.0),
    ),
    (
        "topk",
        "topk",
        lambda mb, x: mb.topk(x=x, k=2, axis=-1)[0],
        lambda x: x.topk(2).values,
    ),
    (
        "pixel_shuffle",
        "pixel_shuffle",
        lambda mb, x: mb.pixel_shuffle(x=x, upscale_factor=2),
        lambda x: F.pixel_shuffle(x, 2),
    ),
    (
        "space_to_depth and back",
        "space_to_depth",
        lambda mb, x: mb.depth_to_space(
            x=mb.relu(x=mb.space_to_depth(x=x, block_size=2)), block_size=2
        ),
        torch.relu,
    ),
    (
        "upsample_nearest_neighbor",
        "upsample_nearest_neighbor",
        lambda mb, x: mb.upsample_nearest_neighbor(
            x=x, scale_factor_height=2.0, scale_factor_width=3.0
        ),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0)),
    ),
    (
        "quantize and dequantize",
        "quantize",
        lambda mb, x: mb.dequantize(
            input=mb.quantize(
                input=x, scale=np.float32(0.02), zero_point=np.int8(3), output_dtype="int8"
            ),
            scale=np.float32(0.02),
            zero_point=np.int8(3),
        ),
        lambda x: ((torch.round(x / 0.02) + 3).clamp(-128, 127) - 3) * 0.02,
    ),
    (
        "quantize by channel",
        "quantize",
        lambda mb, x: mb.dequantize(
            input=mb.quantize(input=x, scale=VECTOR, output_dtype="uint8", axis=1),
            scale=VECTOR,
            axis=1,
        ),
        lambda x: (
            torch.round(x / t(VECTOR).reshape(-1, 1, 1)).clamp(0, 255) * t(VECTOR).reshape(-1, 1, 1)
        ),
    ),
]
ALL = CASES + _simple_cases()


@pytest.fixture(scope="module")
def all_operations(save: Save) -> tuple[MilExecutor, dict[str, Any], Tensor]:
    """One program with an output for each case, evaluated on three images."""
    executor = MilExecutor(save(*(case[2] for case in ALL)), precision="float32")
    images = np.random.default_rng(1).standard_normal((3, *SHAPE[1:])).astype(np.float32)
    return executor, executor.predict(images), torch.from_numpy(images)


@pytest.mark.parametrize("index", range(len(ALL)), ids=[case[0] for case in ALL])
def test_operation_matches_torch(
    all_operations: tuple[MilExecutor, dict[str, Any], Tensor], index: int
) -> None:
    executor, found, images = all_operations
    _, operation, _, reference = ALL[index]
    assert operation in executor.operations()
    expected = reference(images).numpy()
    np.testing.assert_allclose(found[f"out{index}"], expected, rtol=1e-5, atol=2e-6)


def test_attention_of_ios18(save: Save) -> None:
    mask = np.tril(np.ones((6, 6), bool))
    masks = [None, mask, np.where(mask, 0.5, -1.0).astype(np.float32)]

    def attend(attn_mask: Any) -> Build:
        extra = {} if attn_mask is None else {"attn_mask": attn_mask}
        return lambda mb, x: mb.scaled_dot_product_attention(
            query=x, key=mb.mul(x=x, y=np.float32(0.7)), value=x, **extra
        )

    path = save(*(attend(entry) for entry in masks), target="iOS18")
    executor = MilExecutor(path, precision="float32")
    assert executor.operations()["scaled_dot_product_attention"] == 3
    x = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    for found, entry in zip(executor.predict(x.numpy()).values(), masks, strict=True):
        attn_mask = None if entry is None else torch.from_numpy(entry)
        expected = F.scaled_dot_product_attention(x, x * 0.7, x, attn_mask)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


# Programs that work along the axis on which images lie, or lay rows of an image there.
ALONG_THE_BATCH: dict[str, tuple[Build, Callable[[Tensor], Tensor]]] = {
    "concat": (
        lambda mb, x: mb.concat(values=[x, OTHER], axis=0),
        lambda x: torch.cat([x, t(OTHER)]),
    ),
    "reduce": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[0, 1], keep_dims=True),
        lambda x: x.mean((0, 1), keepdim=True),
    ),
    "reduce all": (lambda mb, x: mb.reduce_sum(x=x, keep_dims=False), lambda x: x.sum()[None]),
    "transpose": (
        lambda mb, x: mb.transpose(x=x, perm=[1, 0, 2, 3]),
        lambda x: x.permute(1, 0, 2, 3),
    ),
    "reverse": (lambda mb, x: mb.reverse(x=x), lambda x: x.flip((0, 1, 2, 3))),
    "squeeze": (lambda mb, x: mb.squeeze(x=x, axes=[0]), lambda x: x[0]),
    "slice": (
        lambda mb, x: mb.slice_by_index(
            x=mb.reshape(x=x, shape=[24, 8]), begin=[0, 0], end=[12, 8]
        ),
        lambda x: x.reshape(24, 8)[:12],
    ),
    "matmul": (
        lambda mb, x: mb.matmul(
            x=mb.reshape(x=x, shape=[24, 8]), y=mb.reshape(x=x, shape=[24, 8]), transpose_y=True
        ),
        lambda x: x.reshape(24, 8) @ x.reshape(24, 8).T,
    ),
    "add": (
        lambda mb, x: mb.add(x=mb.reshape(x=x, shape=[24, 8]), y=OTHER.reshape(24, 8)),
        lambda x: x.reshape(24, 8) + t(OTHER).reshape(24, 8),
    ),
    # With four images these shapes fit each other by accident.
    "broadcast": (
        lambda mb, x: mb.mul(x=mb.reduce_mean(x=x, axes=[2]), y=mb.reduce_mean(x=x, axes=[1, 2])),
        lambda x: x.mean(2) * x.mean((1, 2)),
    ),
    "class token": (
        lambda mb, x: mb.concat(
            values=[VECTOR.reshape(1, 1, 4), mb.reshape(x=x, shape=[1, 48, 4])], axis=1
        ),
        lambda x: torch.cat([t(VECTOR).reshape(1, 1, 4), x.reshape(1, 48, 4)], 1),
    ),
}


@pytest.fixture(scope="module")
def along_the_batch(save: Save) -> Path:
    return save(*(build for build, _ in ALONG_THE_BATCH.values()))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_images_stay_apart_whatever_axis_an_operation_works_along(
    along_the_batch: Path, count: int
) -> None:
    images = np.random.default_rng(5).standard_normal((count, *SHAPE[1:])).astype(np.float32)
    found = MilExecutor(along_the_batch, precision="float32").predict(images)
    for index, (name, (_, reference)) in enumerate(ALONG_THE_BATCH.items()):
        expected = torch.cat([reference(image) for image in t(images).split(1)])
        np.testing.assert_allclose(
            found[f"out{index}"], expected.numpy(), rtol=1e-5, atol=2e-5, err_msg=name
        )


def test_slice_whose_place_depends_on_the_image(save: Save) -> None:
    """What cannot be done for all images together is done one by one."""

    def build(mb: Any, x: Any) -> Any:
        brightest = mb.reduce_argmax(x=mb.reshape(x=x, shape=[192]), axis=0, keep_dims=True)
        return mb.slice_by_size(x=mb.reshape(x=x, shape=[192]), begin=brightest, size=[1])

    images = np.random.default_rng(6).standard_normal((5, *SHAPE[1:])).astype(np.float32)
    executor = MilExecutor(save(build), precision="float32", record=True)
    for _ in range(2):
        (found,) = executor.predict(images).values()
        np.testing.assert_array_equal(found, images.reshape(5, -1).max(1))
    entry = next(entry for entry in executor.ranges() if entry.operation == "slice_by_size")
    assert (entry.elements, entry.largest) == (10, np.abs(found).max())


def test_program_for_a_fixed_batch_takes_multiples_of_it(save: Save) -> None:
    path = save(
        lambda mb, x: mb.reshape(x=mb.reshape(x=x, shape=[8, 48]), shape=[2, 192]),
        lambda mb, x: mb.reduce_sum(x=x, axes=[0]),
        shape=(2, *SHAPE[1:]),
    )
    images = np.random.default_rng(2).standard_normal((6, *SHAPE[1:])).astype(np.float32)
    executor = MilExecutor(path, precision="float32", chunk=5)
    for batch in (2, 4, 6):
        rows, sums = executor.predict(images[:batch]).values()
        np.testing.assert_array_equal(rows, images[:batch].reshape(batch, -1))
        pairs = images[:batch].reshape(-1, 2, *SHAPE[1:]).sum(1)
        np.testing.assert_allclose(sums, pairs.reshape(-1, *SHAPE[2:]), atol=1e-6)
    with pytest.raises(DataError, match="batches of 2"):
        executor.predict(images[:5])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("record", "batch"), [(False, 1), (True, 1), (False, 2)])
def test_every_thread_has_images_of_its_own(
    save: Save, monkeypatch: pytest.MonkeyPatch, record: bool, batch: int
) -> None:
    convolved = lambda mb, x: mb.conv(x=x, weight=W, pad_type="same")  # noqa: E731
    path = save(convolved, shape=(batch, *SHAPE[1:]))
    images = np.random.default_rng(7).standard_normal((16, *SHAPE[1:])).astype(np.float32)
    alone = MilExecutor(path, precision="float32")
    (expected,) = alone.predict(images[:8]).values()
    seen: list[tuple[int, int, int]] = []
    evaluate, meet = MilExecutor._evaluate_chunk, threading.Barrier(1 if record else 2)

    def noted(self: MilExecutor, part: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        meet.wait(10)  # two begin together
        seen.append((len(part), threading.get_ident(), torch.get_num_threads()))
        return evaluate(self, part, wanted)

    monkeypatch.setattr(MilExecutor, "_evaluate_chunk", noted)
    executor = MilExecutor(path, precision="float32", record=record, chunk=8)
    (found,) = executor.predict(images).values()
    np.testing.assert_array_equal(found[:8], expected)
    assert [size for size, _, _ in seen] == [8, 8]
    assert {threads for _, _, threads in seen} == {1}
    assert len({thread for _, thread, _ in seen}) == (1 if record else 2)
    # What is recorded is written down by one thread; so is what is too little to divide.
    meet, seen[:] = threading.Barrier(1), []
    executor.predict(images[:6])
    assert [(size, thread) for size, thread, _ in seen] == [(6, threading.get_ident())]


def test_half_rounds_every_result(save: Save) -> None:
    path = save(lambda mb, x: mb.exp(x=mb.square(x=x)), half=True)
    images = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    (found,) = MilExecutor(path).predict(images).values()
    half = torch.from_numpy(images).half().float()
    expected = (half.square().half().float()).exp().half().float()
    np.testing.assert_array_equal(found, expected.numpy())


def test_float32_mode_does_not_round_nor_overflow(save: Save) -> None:
    path = save(lambda mb, x: mb.square(x=x), half=True)
    images = np.full(SHAPE, 300.1, np.float32)
    (exact,) = MilExecutor(path, precision="float32").predict(images).values()
    (half,) = MilExecutor(path).predict(images).values()
    np.testing.assert_allclose(exact, 300.1**2, rtol=1e-6)
    assert np.isinf(half).all()


@pytest.mark.parametrize(
    "operation",
    ["reduce_sum", "reduce_mean", "conv", "conv_transpose", "matmul", "linear", "einsum"],
)
def test_narrow_accumulator_rounds_running_sums(save: Save, operation: str) -> None:
    count = 4096
    ones = np.ones((1, count), np.float32)
    builds: dict[str, Build] = {
        "reduce_sum": lambda mb, x: mb.reduce_sum(x=x, axes=[1], keep_dims=True),
        "reduce_mean": lambda mb, x: mb.reduce_mean(x=x, axes=[1], keep_dims=True),
        "matmul": lambda mb, x: mb.matmul(x=x, y=ones.T.copy()),
        "linear": lambda mb, x: mb.linear(x=x, weight=ones, bias=np.zeros(1, np.float32)),
        "conv": lambda mb, x: mb.conv(
            x=mb.expand_dims(x=x, axes=[2]), weight=ones.reshape(1, count, 1)
        ),
        "conv_transpose": lambda mb, x: mb.conv_transpose(
            x=mb.expand_dims(x=x, axes=[2]), weight=ones.reshape(count, 1, 1)
        ),
        # Of the equations that the format has, one that sums over a single axis.
        "einsum": lambda mb, x: mb.einsum(
            values=(mb.reshape(x=x, shape=[1, 1, 1, count]), ones.reshape(1, count, 1, 1)),
            equation="nchw,nwhu->nchu",
        ),
    }
    path = save(builds[operation], shape=(1, count), half=True)
    images = np.full((1, count), 12.0625, np.float32)
    wide = MilExecutor(path).logits(images).item()
    narrow = MilExecutor(path, accumulate="float16").logits(images).item()
    scale = 1 if operation != "reduce_mean" else count
    assert wide * scale == pytest.approx(count * 12.0625, rel=1e-3)
    running = np.float16(0)
    for _ in range(count // 16):
        running = np.float16(np.float32(running) + np.float32(193))
    assert narrow * scale == pytest.approx(float(running), rel=1e-3)
    assert abs(narrow - wide) / wide > 2e-3


@pytest.mark.parametrize("operation", ["conv_transpose", "einsum"])
def test_narrow_accumulators_keep_images_apart(save: Save, operation: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(32, 3, 2, 2)).astype(np.float32)
    bias = np.arange(3, dtype=np.float32)
    other = rng.normal(size=(1, 6, 5, 2)).astype(np.float32)
    builds: dict[str, Build] = {
        "conv_transpose": lambda mb, x: mb.conv_transpose(
            x=x, weight=weight, bias=bias, strides=[2, 2]
        ),
        "einsum": lambda mb, x: mb.einsum(values=(x, other), equation="nchw,nwhu->nchu"),
    }
    path = save(builds[operation], shape=(1, 32, 5, 6), half=True)
    images = rng.normal(size=(3, 32, 5, 6)).astype(np.float32)
    narrow = MilExecutor(path, accumulate="float16")
    together = narrow.logits(images)
    alone = np.concatenate([narrow.logits(image[None]) for image in images])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, MilExecutor(path).logits(images), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "operation", ["sign", "thresholded_relu", "relu", "relu6", "threshold", "clip", "maximum"]
)
def test_what_is_no_number_stays_none(save: Save, operation: str) -> None:
    """Where an operation makes a number of it, an overflow would show nowhere in the logits."""
    settings: dict[str, dict[str, Any]] = {
        "thresholded_relu": {"alpha": 1.0},
        "threshold": {"alpha": 1.0},
        "clip": {"alpha": -1.0, "beta": 1.0},
        "maximum": {"y": 0.5},
    }
    path = save(
        lambda mb, x: getattr(mb, operation)(x=x, **settings.get(operation, {})), shape=(1, 4)
    )
    found = MilExecutor(path).logits(np.array([[np.nan, 2, -3, 0]], np.float32))
    assert np.isnan(found).tolist() == [[True, False, False, False]]


def test_subnormals_can_be_flushed(save: Save) -> None:
    path = save(lambda mb, x: mb.mul(x=x, y=np.float32(0.5)), half=True)
    images = np.full(SHAPE, 2.0**-14, np.float32)
    (kept,) = MilExecutor(path).predict(images).values()
    (flushed,) = MilExecutor(path, flush_subnormals=True).predict(images).values()
    assert (kept == 2.0**-15).all()
    assert (flushed == 0).all()


def test_inverse_of_a_small_number_shows_the_default_epsilon(save: Save) -> None:
    path = save(lambda mb, x: mb.inverse(x=x))
    (found,) = (
        MilExecutor(path, precision="float32").predict(np.full(SHAPE, 1e-4, np.float32)).values()
    )
    assert found.ravel()[0] == pytest.approx(0.5 / 1e-4)
    assert not math.isclose(found.ravel()[0], 1e4, rel_tol=0.1)


def test_the_documentation_lists_what_there_is() -> None:
    text = (Path(__file__).parents[4] / "docs/targets.md").read_text()
    part = text.partition("### Operations that the executor evaluates")[2].partition("###")[0]
    listed = re.findall(r"`(\w+)`", part)
    assert sorted(listed) == sorted({*OPERATORS, *DECOMPRESSORS})


def test_constants_of_whole_numbers_are_converted_once(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(mb: Any, x: Any) -> Any:
        pooled = mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        turned = mb.transpose(x=mb.conv(x=pooled, weight=W, strides=[1, 1]), perm=[0, 2, 3, 1])
        return mb.reduce_sum(x=mb.reshape(x=turned, shape=[1, -1]), axes=[1], keep_dims=True)

    executor = MilExecutor(save(build), precision="float32")
    images = _RANDOM.standard_normal((2, *SHAPE[1:])).astype(np.float32)
    convolved = F.conv2d(F.max_pool2d(t(images), 2), t(W))
    tolist = Tensor.tolist
    converted: list[Tensor] = []

    def convert(x: Tensor) -> Any:
        converted.append(x)
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", convert)
    (answer,) = executor.predict(images).values()
    assert not converted
    torch.testing.assert_close(t(answer), convolved.sum((1, 2, 3))[:, None], atol=1e-4, rtol=1e-5)


def test_operations_state_which_inputs_are_whole_numbers() -> None:
    assert OPERATORS["reshape"].whole == {"shape"}
    assert OPERATORS["slice_by_index"].whole == {
        *("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")
    }
    assert OPERATORS["conv"].whole == {"strides", "pad", "dilations"}
    assert OPERATORS["layer_norm"].whole == {"axes"}
    assert OPERATORS["range_1d"].whole == frozenset()
    assert not any(entry.whole & {"x", "axis", "value"} for entry in OPERATORS.values())
