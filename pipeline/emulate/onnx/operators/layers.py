"""Products and normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.emulate import kernels
from pipeline.emulate.onnx.graph import Node, to_dtype
from pipeline.emulate.onnx.operators.pooling import pairs, window
from pipeline.emulate.onnx.operators.table import Call, like, operator


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    strides, dilations, pads = window(call, x, kernel)
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


@operator("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    ones = [1] * len(kernel)
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    extra = call.attribute("output_padding", [0] * len(kernel))
    full = kernels.conv_transpose(
        x,
        weight,
        strides=strides,
        dilations=dilations,
        groups=call.attribute("group", 1),
        partial=call.partial,
    )
    length = [n + more for n, more in zip(full.shape[2:], extra, strict=True)]
    crops = _transpose_crops(call, x, strides, length)
    behind = [(-b, more - e) for (b, e), more in zip(crops, extra, strict=True)]
    result = kernels.pad(full, [(0, 0), (0, 0), *behind])
    return result if bias is None else result + bias.reshape(-1, *ones)


def _transpose_crops(
    call: Call, x: Tensor, strides: Sequence[int], length: Sequence[int]
) -> list[tuple[int, int]]:
    """What a transposed convolution leaves out before and behind each spatial axis."""
    mode = call.attribute("auto_pad", "NOTSET")
    wanted: list[int] = call.attribute("output_shape", [])[-len(length) :]
    if mode.startswith("SAME") and not wanted:
        wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if not wanted:
        return pairs(call.attribute("pads", [0] * (2 * len(length))))
    crops = []
    for has, size in zip(length, wanted, strict=True):
        half = (has - size) // 2
        crops.append(
            (half, has - size - half) if mode == "SAME_UPPER" else (has - size - half, half)
        )
    return crops


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
    return kernels.einsum(call.attribute("equation", ""), inputs, partial=call.partial)


@operator(
    "BatchNormalization",
    refuses={"training_mode": (0, "export the model in evaluation mode")},
)
def _batch_norm(
    call: Call, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return kernels.batch_norm(x, gamma, beta, mean, variance, call.attribute("epsilon", 1e-5))


def _with_statistics(node: Node, types: Sequence[torch.dtype | None]) -> tuple[torch.dtype, ...]:
    stash = to_dtype(node.attribute("stash_type", 1), f"node {node.name!r}")
    return like(0)(node, types), stash, stash


@operator("LayerNormalization", result=_with_statistics)
def _layer_norm(
    call: Call, x: Tensor, gamma: Tensor, beta: Tensor | None = None
) -> tuple[Tensor, ...]:
    axes = list(range(call.attribute("axis", -1) % x.ndim, x.ndim))
    epsilon = call.attribute("epsilon", 1e-5)
    if max(gamma.ndim, 0 if beta is None else beta.ndim) > len(axes):
        normalized = kernels.layer_norm(x, axes, None, None, epsilon) * gamma
        result = normalized if beta is None else normalized + beta
    else:
        result = kernels.layer_norm(x, axes, gamma, beta, epsilon)
    if not any(call.node.outputs[1:]):
        return (result,)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return result, mean, torch.rsqrt(variance + epsilon)


@operator("RMSNormalization")
def _rms_norm(call: Call, x: Tensor, gamma: Tensor) -> Tensor:
    axes = list(range(call.attribute("axis", -1) % x.ndim, x.ndim))
    mean = x.square().mean(axes, keepdim=True)
    return x / torch.sqrt(mean + call.attribute("epsilon", 1e-5)) * gamma


@operator("LpNormalization")
def _lp_norm(call: Call, x: Tensor) -> Tensor:
    axis, order = call.attribute("axis", -1), call.attribute("p", 2)
    norm = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def _mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    axes = call.attribute("axes", [0, 2, 3])
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


@operator("LRN")
def _local_response_norm(call: Call, x: Tensor) -> Tensor:
    size = call.node.attributes["size"]
    before, behind = (size - 1) // 2, size // 2
    rest = [(0, 0)] * (x.ndim - 2)
    padded = kernels.pad(x.square(), [(0, 0), (before, behind), *rest])
    squares = sum(padded.narrow(1, tap, x.shape[1]) for tap in range(size))
    scale = call.attribute("bias", 1.0) + call.attribute("alpha", 1e-4) / size * squares
    return x / torch.pow(scale, call.attribute("beta", 0.75))


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


@operator("Hardmax", exact=True)
def _hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call.attribute("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@operator("LogSoftmax")
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return torch.log_softmax(x, call.attribute("axis", -1))
