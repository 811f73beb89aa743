"""Every operator against ONNX Runtime in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.onnx.operators import OPERATORS


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng([seed, *shape])
    values: np.ndarray = generator.standard_normal(shape, dtype=np.float32)
    return values


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    values: np.ndarray = np.abs(normal(*shape, seed=seed)) + 0.1
    return values


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)


@dataclass(frozen=True)
class Case:
    body: str
    x: np.ndarray
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    opset: int = 20
    y: str = "float"
    # The first ONNX Runtime that follows ONNX's definition. For older ones ONNX's own code stands
    # in, or, where that was wrong as well, the definition as it is written here.
    since: tuple[int, int] = (1, 23)
    defined: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def id(self) -> str:
        return f"{self.body} {self.x.shape} opset {self.opset}"


IMAGE = normal(2, 4, 9, 7)
ROW = normal(3, 6)
TOKENS = normal(2, 3, 5, 8)

INFINITE = np.array([np.inf, -np.inf, np.nan, 0, 1], dtype=np.float32)

UNARY = [
    Case(f"y = {name}(x)", x)
    for names, x in (
        (
            "Relu Abs Neg Sign Floor Ceil Round Identity Exp Erf Sigmoid Tanh Sin Cos Softplus "
            "Softsign Mish HardSwish Gelu HardSigmoid Elu LeakyRelu Softmax LogSoftmax Flatten "
            "Tan Atan Sinh Cosh Asinh Celu Selu ThresholdedRelu Shrink Hardmax LpNormalization "
            "MeanVarianceNormalization GlobalLpPool",
            IMAGE,
        ),
        ("Asin Acos Atanh", np.tanh(IMAGE)),
        ("Acosh", 1 + positive(2, 3, 4)),
        ("Log Sqrt Reciprocal", positive(2, 3, 4)),
        ("GlobalAveragePool GlobalMaxPool Transpose Dropout", IMAGE),
        ("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2", IMAGE),
        ("ReduceSumSquare ReduceLogSumExp ReduceProd", IMAGE),
        ("ReduceLogSum", positive(2, 3, 4)),
    )
    for name in names.split()
]

BINARY = [
    Case(f"y = {name}(x, b)", normal(2, 3, 4), {"b": positive(3, 1)})
    for name in ["Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu", "Sum", "Mean"]
] + [
    Case(f"z = {name}(x, b) y = Cast<to=1>(z)", ROW, {"b": np.where(ROW > 0, ROW, 0)})
    for name in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
]

LOGIC = [
    Case(
        f"p = Greater(x, b) q = Less(x, c) r = {name}(p, q) y = Cast<to=1>(r)",
        ROW,
        {"b": scalar(-0.5), "c": scalar(0.5)},
    )
    for name in ["And", "Or", "Xor"]
] + [
    Case("p = Greater(x, b) q = Not(p) y = Where(q, x, c)", ROW, {"b": scalar(0), "c": -ROW}),
    Case("r = Sqrt(x) n = IsNaN(r) y = Cast<to=1>(n)", ROW),
    *(
        Case(f"i = Cast<to=6>(x) j = {name}(i, b) y = Cast<to=1>(j)", 20 * ROW,
             {"b": np.array([6, -3, 0, 1, 2, 9], dtype=np.int32)})
        for name in ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]
    ),
    Case("i = Cast<to=6>(x) j = BitwiseNot(i) y = Cast<to=1>(j)", 20 * ROW),
    *(
        Case(f"n = IsInf{which}(x) y = Cast<to=1>(n)", INFINITE)
        for which in ["", "<detect_positive=0>", "<detect_negative=0>"]
    ),
]  # fmt: skip

ELEMENTWISE = [
    Case('y = Gelu<approximate="tanh">(x)', IMAGE),
    Case("y = Elu<alpha=0.3>(x)", IMAGE),
    Case("y = LeakyRelu<alpha=0.2>(x)", IMAGE),
    Case("y = HardSigmoid<alpha=0.3, beta=0.4>(x)", IMAGE),
    Case("y = Pow(x, e)", positive(2, 3), {"e": scalar(1.7)}),
    Case("y = Pow(x, e)", normal(2, 3), {"e": ints(2)}),
    Case("y = Clip(x, lo, hi)", IMAGE, {"lo": scalar(-0.5), "hi": scalar(0.7)}),
    Case("y = Clip(x, lo)", IMAGE, {"lo": scalar(-0.5)}),
    Case("y = Mod<fmod=1>(x, b)", ROW, {"b": scalar(0.7)}),
    Case("i = Cast<to=7>(x) j = Div(i, b) y = Cast<to=1>(j)", 20 * ROW, {"b": ints(3)}),
    Case("i = Cast<to=7>(x) j = Mod(i, b) y = Cast<to=1>(j)", 20 * ROW, {"b": ints(3)}),
    Case("y = Max(x, b, c)", ROW, {"b": normal(6), "c": scalar(0.2)}),
    *(
        Case(f"y = {name}(x)", INFINITE)
        for name in ["Gelu", "Sign", "HardSwish", "Mish", "Softplus", "Relu", "Elu", "HardSigmoid"]
    ),
    Case("y = Celu<alpha=0.7>(x)", IMAGE),
    Case("y = Selu<alpha=1.2, gamma=0.9>(x)", IMAGE),
    Case("y = Shrink<lambd=0.3, bias=0.2>(x)", IMAGE),
    Case("y = ThresholdedRelu<alpha=0.4>(x)", IMAGE),
]

CONV = [
    Case("y = Conv(x, w, b)", IMAGE, {"w": normal(6, 4, 3, 3), "b": normal(6)}),
    Case(
        "y = Conv<group=2, pads=[1,2,0,1], strides=[2,1]>(x, w)", IMAGE, {"w": normal(6, 2, 3, 3)}
    ),
    Case(
        "y = Conv<group=4, pads=[2,0,2,0], dilations=[2,1]>(x, w)", IMAGE, {"w": normal(4, 1, 3, 1)}
    ),
    Case('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', IMAGE, {"w": normal(6, 4, 3, 2)}),
    Case('y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)', IMAGE, {"w": normal(6, 4, 4, 4)}),
    Case("y = Conv<pads=[1,0]>(x, w)", normal(2, 3, 8), {"w": normal(5, 3, 3)}),
    Case("y = Conv(x, w)", normal(1, 2, 4, 4, 4), {"w": normal(3, 2, 2, 2, 2)}),
    Case('y = Conv<auto_pad="VALID", strides=[2,2]>(x, w)', IMAGE, {"w": normal(6, 4, 4, 4)}),
    Case("y = ConvTranspose(x, w, b)", IMAGE, {"w": normal(4, 3, 3, 2), "b": normal(3)}),
    Case(
        "y = ConvTranspose<group=2, strides=[2,3], pads=[1,0,0,1], output_padding=[1,2], "
        "dilations=[2,1]>(x, w)",
        IMAGE,
        {"w": normal(4, 3, 3, 2)},
    ),
    *(
        Case(f'y = ConvTranspose<auto_pad="{mode}", strides=[3,2]>(x, w)', IMAGE,
             {"w": normal(4, 2, 4, 3)})
        for mode in ["SAME_UPPER", "SAME_LOWER"]
    ),
    Case("y = ConvTranspose<output_shape=[20], strides=[2]>(x, w)", normal(1, 2, 9),
         {"w": normal(2, 2, 4)}),
]  # fmt: skip

PRODUCTS = [
    Case("y = MatMul(x, b)", TOKENS, {"b": normal(8, 4)}),
    Case("y = MatMul(x, b)", TOKENS, {"b": normal(3, 8, 4)}),
    Case("y = MatMul(x, b)", TOKENS, {"b": normal(8)}),
    Case("y = Gemm(x, b, c)", ROW, {"b": normal(6, 4), "c": normal(4)}),
    Case("y = Gemm<transA=1, transB=1, alpha=0.5, beta=2.0>(x, b, c)", ROW,
         {"b": normal(4, 3), "c": normal(6, 1)}),
    Case("y = Gemm(x, b)", ROW, {"b": normal(6, 4)}),
    Case("y = Einsum<equation=\"bhnd,dm->bhnm\">(x, b)", TOKENS, {"b": normal(8, 4)}),
]  # fmt: skip

NORMALIZATION = [
    Case("y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)", IMAGE,
         {"s": normal(4), "b": normal(4, seed=1), "m": normal(4, seed=2), "v": positive(4)}),
    Case("y = LayerNormalization(x, s, b)", TOKENS, {"s": normal(8), "b": normal(8, seed=1)}),
    Case("y = LayerNormalization<axis=2, epsilon=0.1>(x, s)", TOKENS, {"s": normal(5, 8)}),
    Case("y = LayerNormalization<axis=1>(x, s)", TOKENS, {"s": normal(3, 1, 1)}, since=(1, 24)),
    Case("y = InstanceNormalization(x, s, b)", IMAGE, {"s": normal(4), "b": normal(4, seed=1)}),
    Case("y = GroupNormalization<num_groups=2>(x, s, b)", IMAGE,
         {"s": normal(4), "b": normal(4, seed=1)}, opset=21),
    Case("y = GroupNormalization<num_groups=2>(x, s, b)", IMAGE,
         {"s": normal(2), "b": normal(2, seed=1)}),
    Case("y = LayerNormalization<axis=-1>(x, s, b)", TOKENS,
         {"s": normal(5, 8), "b": normal(8, seed=1)}, since=(1, 24)),
    Case("y = InstanceNormalization<epsilon=0.1>(x, s, b)", normal(2, 4, 1, 1),
         {"s": normal(4), "b": normal(4, seed=1)}),
    Case("y = GroupNormalization<num_groups=4>(x, s, b)", normal(2, 4, 1, 1),
         {"s": normal(4), "b": normal(4, seed=1)}, opset=21),
    Case("y = RMSNormalization<axis=-2>(x, s)", TOKENS, {"s": normal(5, 8)}, opset=23),
    Case("y = LpNormalization<axis=1, p=1>(x)", IMAGE),
    Case("y = LRN<size=3, alpha=0.5, beta=0.6, bias=1.5>(x)", IMAGE),
    Case("y = Hardmax<axis=1>(x)", IMAGE),
    Case("y = Softmax<axis=1>(x)", IMAGE),
    Case("y = LogSoftmax<axis=2>(x)", IMAGE),
]  # fmt: skip

REDUCTION = [
    Case("y = ReduceMean<keepdims=0>(x, a)", IMAGE, {"a": ints(2, -1)}),
    Case("y = ReduceMean<axes=[2,3]>(x)", IMAGE, opset=17),
    Case("y = ReduceSum<noop_with_empty_axes=1>(x)", IMAGE, since=(1, 24)),
    Case("y = ReduceL2<noop_with_empty_axes=1>(x, a)", IMAGE, {"a": ints()}, since=(1, 24),
         defined=np.abs),
    Case("y = ReduceMax<keepdims=0>(x, a)", IMAGE, {"a": ints(1)}),
    Case("i = ArgMax<axis=1, keepdims=0>(x) y = Cast<to=1>(i)", IMAGE),
    *(
        Case(f"i = {name}<axis=-1, select_last_index={last}>(x) y = Cast<to=1>(i)",
             np.array([[2, 2, 1, 1], [0, 3, 3, 0]], dtype=np.float32))
        for name in ["ArgMax", "ArgMin"] for last in [0, 1]
    ),
    *(
        Case(f"i = Cast<to={kind}>(x) r = {name}(i, a) y = Cast<to=1>(r)", 9 * IMAGE,
             {"a": ints(1, -1)})
        for name in ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"]
        for kind in [6, 7]
    ),
    Case("i = Cast<to=7>(x) r = ReduceProd(i, a) y = Cast<to=1>(r)", 9 * ROW, {"a": ints(1)}),
    *(
        Case(f"y = {name}(x, a)", normal(2, 0, 3), {"a": ints(1)})
        for name in ["ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceLogSumExp"]
    ),
    *(
        Case(f"y = CumSum<exclusive={e}, reverse={r}>(x, a)", IMAGE, {"a": np.array(-1)})
        for e in [0, 1] for r in [0, 1]
    ),
    Case("v, i = TopK<axis=1>(x, k) f = Cast<to=1>(i) y = Add(v, f)", IMAGE, {"k": ints(3)}),
    Case("v, i = TopK<largest=0>(x, k) y = Cast<to=1>(i)", np.round(IMAGE), {"k": ints(4)}),
]  # fmt: skip

POOLING = [
    Case("y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[3,2], pads=[0,1,2,0], strides=[2,2]>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[0,1,2,0]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[0,1,2,0], count_include_pad=1>(x)", IMAGE,
         since=(1, 25)),
    Case('y = AveragePool<kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER">(x)', IMAGE),
    Case("y = AveragePool<kernel_shape=[3]>(x)", normal(2, 3, 8)),
    *(
        Case(f"y = {kind}Pool<kernel_shape=[3], strides=[3], pads=[0,1], ceil_mode=1>(x)",
             np.arange(1, 7, dtype=np.float32).reshape(1, 1, 6))
        for kind in ["Max", "Average", "Lp"]
    ),
    *(
        Case(f"y = {kind}Pool<kernel_shape=[3,4], strides=[2,3], pads={pads}, ceil_mode={ceil}"
             f"{more}>(x)", IMAGE, since=(1, 25))
        for kind, more in [("Max", ""), ("Average", ""), ("Average", ", count_include_pad=1")]
        for pads in ["[0,1,2,3]", "[2,3,2,3]", "[2,0,1,2]"]
        for ceil in [0, 1]
    ),
    Case("y = AveragePool<kernel_shape=[2,3], dilations=[3,2], pads=[1,1,0,2]>(x)", IMAGE),
    Case("y, i = MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]>(x)", IMAGE),
    Case("v, i = MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]>(x) y = Cast<to=1>(i)",
         IMAGE),
    Case("v, i = MaxPool<kernel_shape=[2,2], storage_order=1>(x) y = Cast<to=1>(i)", IMAGE),
    *(
        Case(f"q = QuantizeLinear(x, s, z) p = MaxPool<kernel_shape={kernel}, pads={pads}>(q) "
             "y = DequantizeLinear(p, s, z)", x,
             {"s": scalar(0.02), "z": np.array(zero, dtype=kind)})
        for kind, zero in [(np.int8, 0), (np.uint8, 128)]
        for kernel, pads, x in [
            ("[2]", "[1,0]", normal(2, 3, 8)),
            ("[3,2]", "[0,1,2,0]", IMAGE),
            ("[2,2]", "[1,1,1,1]", IMAGE),
        ]
    ),
    Case("y = LpPool<kernel_shape=[3,2], pads=[1,0,1,1], strides=[2,1], p=3>(x)", IMAGE),
    Case("y = GlobalLpPool<p=3>(x)", IMAGE),
]  # fmt: skip

SHAPES = [
    Case("s = Shape(x) y = Cast<to=1>(s)", IMAGE),
    Case("s = Shape<start=1, end=-1>(x) y = Cast<to=1>(s)", IMAGE),
    Case("s = Size(x) y = Cast<to=1>(s)", IMAGE),
    Case("y = Reshape(x, s)", IMAGE, {"s": ints(0, -1, 7)}),
    Case("y = Reshape<allowzero=1>(x, s)", IMAGE, {"s": ints(8, -1)}),
    Case("y = Reshape<allowzero=1>(x, s)", normal(0, 3), {"s": ints(3, 0)}),
    Case("y = Flatten<axis=2>(x)", IMAGE),
    Case("y = Flatten<axis=-1>(x)", IMAGE),
    Case("y = Flatten<axis=0>(x)", IMAGE),
    Case("y = Transpose<perm=[0,2,3,1]>(x)", IMAGE),
    Case("y = Unsqueeze(x, a)", ROW, {"a": ints(-1, 0)}),
    Case("y = Squeeze(x, a)", normal(1, 3, 1), {"a": ints(-1)}),
    Case("y = Squeeze(x)", normal(1, 3, 1)),
    Case("y = Expand(x, s)", normal(3, 1), {"s": ints(2, 1, 4)}),
    Case("y = Tile(x, r)", ROW, {"r": ints(2, 3)}),
    Case("y = Concat<axis=-1>(x, b, x)", ROW, {"b": normal(3, 2)}),
    Case("a, y = Split<axis=1>(x, s)", IMAGE, {"s": ints(1, 3)}),
    Case("a, y = Split<axis=2, num_outputs=2>(x)", IMAGE),
    Case("y = Slice(x, s, e, a, t)", IMAGE,
         {"s": ints(-1, 1), "e": ints(-(2**63), 2**63 - 1), "a": ints(2, -1), "t": ints(-2, 2)}),
    Case("y = Slice(x, s, e)", ROW, {"s": ints(1, -4), "e": ints(3, -1)}),
    # Going backwards, a start before the first value is the first value.
    Case("y = Slice(x, s, e, a, t)", ROW,
         {"s": ints(-9, -9), "e": ints(-9, -9), "a": ints(1, 0), "t": ints(-1, -2)}),
    Case("y = Gather<axis=1>(x, i)", IMAGE, {"i": ints(0, -1, 2).reshape(3, 1)}),
    Case("y = Gather(x, i)", ROW, {"i": np.array(-1)}),
    Case("y = Pad(x, p, v)", IMAGE, {"p": ints(0, 0, 1, 2, 0, 1, 0, -1), "v": scalar(0.5)}),
    Case("y = Pad(x, p, , a)", IMAGE, {"p": ints(2, 1), "a": ints(-1)}),
    Case("y = Pad<mode=\"reflect\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
    Case("y = Pad<mode=\"edge\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
    Case("y = Pad<mode=\"wrap\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
]  # fmt: skip

PLACES = [
    Case("y = GatherElements<axis=1>(x, i)", ROW, {"i": ints(0, -1, 2, 5, 1, -6).reshape(3, 2)}),
    Case("y = GatherND(x, i)", IMAGE, {"i": ints(0, 1, -1, 3).reshape(2, 2)}),
    Case("y = GatherND<batch_dims=1>(x, i)", IMAGE, {"i": ints(1, 0, -1, 3).reshape(2, 2)}),
    *(
        Case(f'y = ScatterElements<axis=1, reduction="{kind}">(x, i, u)', ROW,
             {"i": ints(0, -1, 2, 5, 1, -6).reshape(3, 2), "u": normal(3, 2)}, opset=18)
        for kind in ["none", "add", "mul", "max", "min"]
    ),
    *(
        Case(f'y = ScatterND<reduction="{kind}">(x, i, u)', IMAGE,
             {"i": ints(0, 1, -1, 3).reshape(2, 2), "u": normal(2, 9, 7)}, opset=18)
        for kind in ["none", "add", "mul", "max", "min"]
    ),
    Case("i = Cast<to=7>(x) y = OneHot<axis=1>(i, d, v)", 4 * ROW,
         {"d": np.array(5), "v": np.array([-1, 2], dtype=np.float32)}),
    Case("y = Trilu(x)", IMAGE),
    Case("y = Trilu<upper=0>(x, k)", IMAGE, {"k": np.array(-2)}),
    Case("y = EyeLike<k=1>(x)", ROW),
    Case("y = DepthToSpace<blocksize=2>(x)", normal(2, 8, 3, 2)),
    Case('y = DepthToSpace<blocksize=2, mode="CRD">(x)', normal(2, 8, 3, 2)),
    Case("y = SpaceToDepth<blocksize=2>(x)", normal(2, 3, 4, 6)),
    Case("y = Col2Im<strides=[2,1], pads=[1,0,0,1], dilations=[1,2]>(x, s, b)", normal(2, 12, 9),
         {"s": ints(6, 4), "b": ints(2, 2)}),
]  # fmt: skip

RESIZING = [
    *(
        Case(f'y = Resize<mode="{mode}", coordinate_transformation_mode="{places}"{more}>'
             "(x, , , s)", IMAGE, {"s": ints(2, 4, *size)})
        for mode, more in [
            ("nearest", ""),
            ("nearest", ', nearest_mode="ceil"'),
            ("linear", ""),
            ("cubic", ""),
            ("cubic", ", cubic_coeff_a=-0.5, exclude_outside=1"),
        ]
        for places in ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]
        for size in [(5, 9), (18, 1)]
    ),
    *(
        Case(f'y = Resize<mode="{mode}", antialias=1>(x, , , s)', IMAGE, {"s": ints(2, 4, 4, 5)})
        for mode in ["linear", "cubic"]
    ),
    Case('y = Resize<mode="linear">(x, , f)', IMAGE,
         {"f": np.array([1, 1, 1.7, 0.6], dtype=np.float32)}),
    Case('y = Resize<mode="linear", axes=[2,3], keep_aspect_ratio_policy="not_larger">(x, , , s)',
         IMAGE, {"s": ints(12, 20)}),
    *(
        Case(f'y = GridSample<mode="{mode}", padding_mode="{padding}", align_corners={corners}>'
             "(x, g)", IMAGE, {"g": 1.2 * np.tanh(normal(2, 3, 5, 2))})
        for mode in ["linear", "nearest", "cubic"]
        for padding in ["zeros", "border", "reflection"]
        for corners in [0, 1]
    ),
]  # fmt: skip

GROUPED = {"k": normal(2, 5, 16), "v": normal(2, 5, 12), "m": normal(5, 5)}


def capped_attention(x: np.ndarray) -> np.ndarray:
    """Four heads of queries, two of keys and values: capped first, then masked."""
    q, k, v = (
        tokens.reshape(2, 5, heads, -1).transpose(0, 2, 1, 3)
        for tokens, heads in ((x, 4), (GROUPED["k"], 2), (GROUPED["v"], 2))
    )
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = 2 * np.tanh(q @ k.swapaxes(2, 3) / np.sqrt(8) / 2) + GROUPED["m"]
    weights = np.where(np.tri(5, dtype=bool), np.exp(scores), 0)
    mixed: np.ndarray = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(2, 5, -1)


ATTENTION = [
    Case("y = Attention(x, k, v)", normal(2, 3, 5, 8), {"k": normal(2, 3, 4, 8),
         "v": normal(2, 3, 4, 6)}, opset=23),
    Case("y = Attention<is_causal=1, softcap=2.0, q_num_heads=4, kv_num_heads=2>(x, k, v, m)",
         normal(2, 5, 32), GROUPED, opset=23, since=(1, 27), defined=capped_attention),
    Case("y = Attention<scale=0.3>(x, k, v, m)", normal(2, 3, 5, 8), {"k": normal(2, 3, 4, 8),
         "v": normal(2, 3, 4, 6), "m": normal(5, 4) > -0.5}, opset=23),
    *(
        Case(f"y = RotaryEmbedding<interleaved={i}>(x, c, s)", normal(2, 3, 5, 8),
             {"c": normal(2, 5, 4), "s": normal(2, 5, 4, seed=1)}, opset=23)
        for i in [0, 1]
    ),
]  # fmt: skip

TYPES = [
    Case("i = Cast<to=6>(x) y = Cast<to=1>(i)", 5 * ROW),
    Case("i = Cast<to=9>(x) y = Cast<to=1>(i)", np.where(ROW > 0, ROW, 0)),
    Case("h = Cast<to=10>(x) y = Cast<to=1>(h)", 1e5 * ROW),
    Case("h = Cast<to=16>(x) y = Cast<to=1>(h)", ROW),
    Case("d = Cast<to=11>(x) e = Exp(d) y = Cast<to=1>(e)", ROW),
    Case("h = CastLike(x, b) y = CastLike(h, x)", ROW, {"b": np.zeros(1, dtype=np.float16)}),
    Case("s = Shape(x) c = ConstantOfShape(s) y = Add(x, c)", ROW),
    Case("s = Shape(x) c = ConstantOfShape<value=float[1] {2.5}>(s) y = Add(x, c)", ROW),
    Case("n = Size(x) r = Range(a, n, b) y = Cast<to=1>(r)", ROW,
         {"a": np.array(2), "b": np.array(3)}),
    Case("y = Add(x, c) ", ROW, {"c": scalar(1)}),
    Case("c = Constant<value_floats=[1.0, 2.0]>() i = Constant<value_int=1>() "
         "g = Gather(c, i) y = Add(x, g)", ROW),
]  # fmt: skip

TYPES += [
    *(
        Case(f"i = Cast<to={kind}>(x) y = Cast<to=1>(i)", 200 * ROW)
        for kind in [2, 3, 4, 5]  # 8 and 16 bits: what is out of range keeps its lowest bits
    ),
    *(
        Case(f"i = Cast<to={wide}>(x) j = Cast<to={kind}>(i) y = Cast<to=1>(j)", 4e4 * ROW)
        for wide in [6, 7] for kind in [2, 3, 4, 5]
    ),
]  # fmt: skip

QUANTIZED = [
    Case("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", 3 * IMAGE,
         {"s": scalar(0.02), "z": np.array(0, dtype=np.int8)}),
    Case("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", 3 * IMAGE,
         {"s": scalar(0.02), "z": np.array(100, dtype=np.uint8)}),
    Case("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", 3 * IMAGE, {"s": scalar(0.02)}),
    Case("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", 3 * IMAGE,
         {"s": positive(4) / 50, "z": np.zeros(4, dtype=np.int8)}),
    Case("q = QuantizeLinear<axis=3>(x, s, z) y = DequantizeLinear<axis=3>(q, s, z)", 3 * IMAGE,
         {"s": positive(7) / 50, "z": np.arange(7, dtype=np.int8)}),
    # Ties: the position rounds to even before the zero point is added.
    Case("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
         np.array([[-1.5, -0.5, 0.5, 1.5, 2.5, 300.0]], dtype=np.float32),
         {"s": scalar(1), "z": np.array(1, dtype=np.int8)}),
    Case("q = QuantizeLinear<block_size=2, axis=1>(x, s, z) "
         "y = DequantizeLinear<block_size=2, axis=1>(q, s, z)", ROW,
         {"s": positive(3, 3) / 10, "z": np.zeros((3, 3), dtype=np.int8)}, opset=21),
    *(
        Case("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
             np.array([[-40000, -32769, -1, 0, 40000, 70000, np.inf]], dtype=np.float32),
             {"s": scalar(1), "z": np.array(zero, dtype=kind)}, opset=21)
        for kind, zero in [(np.int16, 0), (np.int16, -7), (np.uint16, 0), (np.uint16, 300)]
    ),
    Case("d = DequantizeLinear<axis=0>(w, s, z) y = Conv(x, d)", IMAGE,
         {"w": (40 * normal(5, 4, 3, 3)).astype(np.int8), "s": positive(5) / 100,
          "z": np.zeros(5, dtype=np.int8)}),
]  # fmt: skip

STEPS = normal(5, 2, 6)
GATES = {"w": normal(1, 16, 6), "r": normal(1, 16, 4)}
TWO_WAYS = {"w": normal(2, 16, 6), "r": normal(2, 16, 4), "b": normal(2, 32)}
STATE = {"h": normal(2, 2, 4), "c": normal(2, 2, 4, seed=1), "p": normal(2, 12)}

RECURRENT = [
    Case("y, h, c = LSTM<hidden_size=4>(x, w, r)", STEPS, GATES),
    Case('y, h, c = LSTM<hidden_size=4, direction="reverse">(x, w, r)', STEPS, GATES),
    Case("z, y, c = LSTM<hidden_size=4>(x, w, r)", STEPS, GATES),
    Case("z, h, y = LSTM<hidden_size=4>(x, w, r)", STEPS, GATES),
    Case(
        'y, g, d = LSTM<hidden_size=4, direction="bidirectional">(x, w, r, b, , h, c, p)',
        STEPS,
        TWO_WAYS | STATE,
    ),
    Case(
        'y, g, d = LSTM<hidden_size=4, direction="bidirectional">(x, w, r, b, n, h)',
        STEPS,
        TWO_WAYS | STATE | {"n": np.array([5, 5], dtype=np.int32)},
    ),
]

CASES = [
    *UNARY,
    *BINARY,
    *LOGIC,
    *ELEMENTWISE,
    *CONV,
    *PRODUCTS,
    *RECURRENT,
    *NORMALIZATION,
    *REDUCTION,
    *POOLING,
    *SHAPES,
    *PLACES,
    *RESIZING,
    *ATTENTION,
    *TYPES,
    *QUANTIZED,
]


def runtime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def expected(case: Case, model: onnx.ModelProto) -> np.ndarray:
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version >= case.since:
        return runtime(model, case.x)
    if case.defined is not None:
        return case.defined(case.x)
    results: Any = ReferenceEvaluator(model).run(None, {"x": case.x})
    result: np.ndarray = results[0]
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_agrees_with_onnx_runtime(case: Case, make_model: Callable[..., onnx.ModelProto]) -> None:
    model = make_model(case.body, case.x.shape, case.constants, y=case.y, opset=case.opset)
    right = expected(case, model)
    result = OnnxExecutor(model).run(case.x)
    assert result.dtype == np.float32
    assert result.shape == right.shape
    np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.defined], ids=lambda case: case.id)
def test_agrees_with_the_definition(case: Case, make_model: Callable[..., onnx.ModelProto]) -> None:
    assert case.defined is not None
    model = make_model(case.body, case.x.shape, case.constants, y=case.y, opset=case.opset)
    right = case.defined(case.x)
    np.testing.assert_allclose(OnnxExecutor(model).run(case.x), right, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    covered = {
        word for case in CASES for word in case.body.replace("(", " ").replace("<", " ").split()
    }
    # These are younger than the runtime's CPU kernels; ONNX's own cases cover them.
    assert set(OPERATORS) - covered == {"Swish", "CumProd"}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("LSTM<hidden_size=4, clip=1.0>(x, w, r)", "clip the values"),
        ("LSTM<hidden_size=4, input_forget=1>(x, w, r)", "weights of their own"),
        ('LSTM<hidden_size=4, activations=["Relu", "Tanh", "Tanh"]>(x, w, r)', "other activations"),
        ("LSTM<hidden_size=4>(x, w, r, , n)", "shorter sequences"),
    ],
)
def test_unusual_recurrent_layers_are_refused(
    call: str, told: str, make_model: Callable[..., onnx.ModelProto]
) -> None:
    lengths = {"n": np.array([5, 3], dtype=np.int32)}
    model = make_model(f"y, h, c = {call}", STEPS.shape, GATES | lengths)
    with pytest.raises(UnsupportedOperatorError, match=f"LSTM.*{told}"):
        OnnxExecutor(model).run(STEPS)


def test_the_state_of_a_recurrent_layer_is_stored_in_its_type(
    make_model: Callable[..., onnx.ModelProto],
) -> None:
    """By a loop of one step at a time, each in half precision."""
    half = {name: value.astype(np.float16) for name, value in GATES.items()}
    steps = STEPS.astype(np.float16).astype(np.float32)
    wrapped = "v = Cast<to=10>(x)\n s, g, d = LSTM<hidden_size=4>(v, w, r)\n y = Cast<to=1>(s)"
    whole = OnnxExecutor(make_model(wrapped, steps.shape, half)).run(steps)[:, 0]
    hidden, cell = torch.zeros(2, 4), torch.zeros(2, 4)
    weight, recurrence = (torch.from_numpy(half[name][0]).float().T for name in ("w", "r"))
    exact = []
    for step in torch.from_numpy(steps):
        enters, leaves, stays, new = (step @ weight + hidden @ recurrence).split(4, -1)
        cell = (stays.sigmoid() * cell + enters.sigmoid() * new.tanh()).half().float()
        hidden = (leaves.sigmoid() * cell.tanh()).half().float()
        exact.append(hidden)
    assert float(np.mean(whole == torch.stack(exact).numpy())) > 0.95


def test_swish(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = make_model("y = Swish<alpha=1.5>(x)", ROW.shape, opset=24)
    expected = ROW / (1 + np.exp(-1.5 * ROW))
    np.testing.assert_allclose(OnnxExecutor(model).run(ROW), expected, rtol=1e-5, atol=1e-6)


def test_the_document_lists_every_operator() -> None:
    text = (Path(__file__).parents[4] / "docs/targets.md").read_text(encoding="utf-8")
    part = text.partition("### Operators that the executor runs")[2].partition("\n\n`Constant`")[0]
    assert set(re.findall(r"`(\w+)`", part)) == set(OPERATORS)
