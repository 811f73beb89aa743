"""Every operator against ONNX Runtime in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest

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

    @property
    def id(self) -> str:
        return f"{self.body} {self.x.shape} opset {self.opset}"


IMAGE = normal(2, 4, 9, 7)
ROW = normal(3, 6)
TOKENS = normal(2, 3, 5, 8)

UNARY = [
    Case(f"y = {name}(x)", x)
    for names, x in (
        (
            "Relu Abs Neg Sign Floor Ceil Round Identity Exp Erf Sigmoid Tanh Sin Cos Softplus "
            "Softsign Mish HardSwish Gelu HardSigmoid Elu LeakyRelu Softmax LogSoftmax Flatten",
            IMAGE,
        ),
        ("Log Sqrt Reciprocal", positive(2, 3, 4)),
        ("GlobalAveragePool GlobalMaxPool Transpose Dropout", IMAGE),
        ("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2", IMAGE),
        ("ReduceSumSquare ReduceLogSumExp", IMAGE),
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
]

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
]

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
    Case("y = LayerNormalization<axis=1>(x, s)", TOKENS, {"s": normal(3, 1, 1)}),
    Case("y = InstanceNormalization(x, s, b)", IMAGE, {"s": normal(4), "b": normal(4, seed=1)}),
    Case("y = GroupNormalization<num_groups=2>(x, s, b)", IMAGE,
         {"s": normal(4), "b": normal(4, seed=1)}, opset=21),
    Case("y = GroupNormalization<num_groups=2>(x, s, b)", IMAGE,
         {"s": normal(2), "b": normal(2, seed=1)}),
    Case("y = Softmax<axis=1>(x)", IMAGE),
    Case("y = LogSoftmax<axis=2>(x)", IMAGE),
]  # fmt: skip

REDUCTION = [
    Case("y = ReduceMean<keepdims=0>(x, a)", IMAGE, {"a": ints(2, -1)}),
    Case("y = ReduceMean<axes=[2,3]>(x)", IMAGE, opset=17),
    Case("y = ReduceSum<noop_with_empty_axes=1>(x)", IMAGE),
    Case("y = ReduceL2<noop_with_empty_axes=1>(x, a)", IMAGE, {"a": ints()}),
    Case("y = ReduceMax<keepdims=0>(x, a)", IMAGE, {"a": ints(1)}),
    Case("i = ArgMax<axis=1, keepdims=0>(x) y = Cast<to=1>(i)", IMAGE),
]

POOLING = [
    Case("y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[3,2], pads=[0,1,2,0], strides=[2,2]>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[0,1,2,0]>(x)", IMAGE),
    Case("y = AveragePool<kernel_shape=[3,3], pads=[0,1,2,0], count_include_pad=1>(x)", IMAGE),
    Case('y = AveragePool<kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER">(x)', IMAGE),
    Case("y = AveragePool<kernel_shape=[3]>(x)", normal(2, 3, 8)),
]

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
    Case("y = Gather<axis=1>(x, i)", IMAGE, {"i": ints(0, -1, 2).reshape(3, 1)}),
    Case("y = Gather(x, i)", ROW, {"i": np.array(-1)}),
    Case("y = Pad(x, p, v)", IMAGE, {"p": ints(0, 0, 1, 2, 0, 1, 0, -1), "v": scalar(0.5)}),
    Case("y = Pad(x, p, , a)", IMAGE, {"p": ints(2, 1), "a": ints(-1)}),
    Case("y = Pad<mode=\"reflect\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
    Case("y = Pad<mode=\"edge\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
    Case("y = Pad<mode=\"wrap\">(x, p)", IMAGE, {"p": ints(0, 0, 3, 2, 0, 0, 1, 4)}),
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
    Case("d = DequantizeLinear<axis=0>(w, s, z) y = Conv(x, d)", IMAGE,
         {"w": (40 * normal(5, 4, 3, 3)).astype(np.int8), "s": positive(5) / 100,
          "z": np.zeros(5, dtype=np.int8)}),
]  # fmt: skip

CASES = [
    *UNARY,
    *BINARY,
    *LOGIC,
    *ELEMENTWISE,
    *CONV,
    *PRODUCTS,
    *NORMALIZATION,
    *REDUCTION,
    *POOLING,
    *SHAPES,
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_agrees_with_onnx_runtime(case: Case, make_model: Callable[..., onnx.ModelProto]) -> None:
    model = make_model(case.body, case.x.shape, case.constants, y=case.y, opset=case.opset)
    expected = runtime(model, case.x)
    result = OnnxExecutor(model).run(case.x)
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    covered = {
        word for case in CASES for word in case.body.replace("(", " ").replace("<", " ").split()
    }
    # Swish is younger than the runtime's CPU kernels.
    assert set(OPERATORS) - covered == {"Swish"}


def test_swish(make_model: Callable[..., onnx.ModelProto]) -> None:
    model = make_model("y = Swish<alpha=1.5>(x)", ROW.shape, opset=24)
    expected = ROW / (1 + np.exp(-1.5 * ROW))
    np.testing.assert_allclose(OnnxExecutor(model).run(ROW), expected, rtol=1e-5, atol=1e-6)
