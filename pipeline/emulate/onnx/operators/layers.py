"""Products, normalization, reductions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate import kernels
from pipeline.emulate.onnx.operators.table import Call, fixed, ints, operator


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    strides, dilations, pads = _window(call, x, kernel)
    return kernels.conv(
        x,
        weight,
        bias,
        strides=strides,
        pads=pads,
        dilations=dilations,
        groups=call.attribute("group", 1),
        partial=call.partial,
    )


@operator("MatMul")
def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return kernels.matmul(a, b, partial=call.partial)


@operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if call.attribute("transA", 0) else a
    b = b.T if call.attribute("transB", 0) else b
    product = kernels.matmul(a, b, partial=call.partial)
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


@operator("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.attribute("equation", ""), *inputs)


@operator("BatchNormalization")
def _batch_norm(
    call: Call, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return kernels.batch_norm(x, gamma, beta, mean, variance, call.attribute("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    axes = range(call.attribute("axis", -1) % x.ndim, x.ndim)
    return kernels.layer_norm(x, axes, gamma, beta, call.attribute("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return kernels.instance_norm(x, gamma, beta, call.attribute("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(call: Call, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    groups = call.attribute("num_groups", 1)
    if gamma.numel() != x.shape[1]:  # before opset 21 one a group
        each = x.shape[1] // groups
        gamma, beta = gamma.repeat_interleave(each), beta.repeat_interleave(each)
    return kernels.group_norm(x, groups, gamma, beta, call.attribute("epsilon", 1e-5))


@operator("Softmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    return torch.softmax(x, call.attribute("axis", -1))


@operator("LogSoftmax")
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return torch.log_softmax(x, call.attribute("axis", -1))


def _register_reductions() -> None:
    kinds = {
        "ReduceMean": "mean",
        "ReduceSum": "sum",
        "ReduceMax": "max",
        "ReduceMin": "min",
        "ReduceL1": "l1",
        "ReduceL2": "l2",
        "ReduceSumSquare": "sum_square",
        "ReduceLogSumExp": "log_sum_exp",
    }
    for name, kind in kinds.items():

        def reduce(call: Call, x: Tensor, axes: Tensor | None = None, kind: str = kind) -> Tensor:
            # The axes were an attribute before they became an input (opset 13 and 18).
            chosen = ints(axes, call.attribute("axes", []))
            if not chosen:
                if call.attribute("noop_with_empty_axes", 0):
                    return kernels.reduce(kind, x, [], keep=True)
                chosen = list(range(x.ndim))
            return kernels.reduce(kind, x, chosen, keep=bool(call.attribute("keepdims", 1)))

        operator(name, exact=kind in ("max", "min"))(reduce)


_register_reductions()


@operator("ArgMax", result=fixed(torch.int64), exact=True)
def _argmax(call: Call, x: Tensor) -> Tensor:
    return x.argmax(call.attribute("axis", 0), keepdim=bool(call.attribute("keepdims", 1)))


@operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return kernels.reduce("mean", x, range(2, x.ndim), keep=True)


@operator("GlobalMaxPool", exact=True)
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return kernels.reduce("max", x, range(2, x.ndim), keep=True)


@operator("MaxPool", exact=True)
def _max_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.attribute("kernel_shape", list(x.shape[2:]))
    strides, dilations, pads = _window(call, x, kernel)
    ceil = bool(call.attribute("ceil_mode", 0))
    return kernels.max_pool(x, kernel, strides=strides, pads=pads, dilations=dilations, ceil=ceil)


@operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.attribute("kernel_shape", list(x.shape[2:]))
    strides, dilations, pads = _window(call, x, kernel)
    if any(d != 1 for d in dilations):
        raise UnsupportedOperatorError(
            f"node {call.node.name!r}: AveragePool with dilations {dilations} is not known to the "
            "reference executor; express it as a convolution"
        )
    return kernels.average_pool(
        x,
        kernel,
        strides=strides,
        pads=pads,
        ceil=bool(call.attribute("ceil_mode", 0)),
        count_padding=bool(call.attribute("count_include_pad", 0)),
    )


def _window(
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
    flat = call.attribute("pads", [0] * (2 * len(kernel)))
    pads = list(zip(flat[: len(kernel)], flat[len(kernel) :], strict=True))
    return strides, dilations, pads
