from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import pipeline
from pipeline.core.errors import ArtifactError, DataError, PipelineError, UnsupportedOperatorError
from pipeline.emulate.beside import Beside
from pipeline.emulate.onnx.executor import OnnxExecutor, _worth_a_thread
from pipeline.emulate.onnx.plan import Step
from pipeline.emulate.ranges import _COUNTS, TensorRange, first_failure

MakeModel = Callable[..., onnx.ModelProto]

INDEX = np.zeros(1, dtype=np.int64)
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
HALF = torch.from_numpy(X).half()


def half(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float16)


# ------------------------------------------------------------------ rounding


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Add(x, b)", lambda x, b: x + b),
        ("y = Mul(x, b)", lambda x, b: x * b),
        ("y = Div(x, b)", lambda x, b: x / b),
        ("y = Exp(x)", lambda x, b: x.exp()),
        ("y = Tanh(x)", lambda x, b: x.tanh()),
        ("y = Gelu(x)", lambda x, b: F.gelu(x)),
        ("y = Softmax(x)", lambda x, b: x.softmax(-1)),
        # One rounding an operation: fusing the two would give other values.
        ("t = Mul(x, b) y = Sub(t, b)", lambda x, b: x * b - b),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), [("float16", "half"), ("bfloat16", "bfloat16")])
def test_sixteen_bit_graphs_compute_what_torch_computes(
    make_model: MakeModel,
    body: str,
    expected: Callable[[Tensor, Tensor], Tensor],
    name: str,
    dtype: str,
) -> None:
    elem_type = TensorProto.FLOAT16 if name == "float16" else TensorProto.BFLOAT16
    constant = helper.make_tensor("b", elem_type, [1], [0.7])
    model = make_model(body, X.shape, {"b": constant}, x=name, y=name)
    x = getattr(torch.from_numpy(X), dtype)()
    b = getattr(torch.tensor([0.7]), dtype)()
    assert torch.equal(torch.from_numpy(OnnxExecutor(model).run(X)), expected(x, b).float())


def test_products_accumulate_in_float32_and_round_once(make_model: MakeModel) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float16)
    model = make_model("y = MatMul(x, w)", X.shape, {"w": weight}, x="float16", y="float16")
    expected = (HALF.float() @ torch.from_numpy(weight).float()).half().float()
    assert torch.equal(torch.from_numpy(OnnxExecutor(model).run(X)), expected)


def test_a_running_sum_overflows_in_a_narrow_accumulator(make_model: MakeModel) -> None:
    x = np.concatenate([np.full((1, 16), 100), np.full((1, 16), -100)], 1).astype(np.float32)
    weight = np.full((32, 1), 50, dtype=np.float16)
    model = make_model("y = MatMul(x, w)", x.shape, {"w": weight}, x="float16", y="float16")
    assert OnnxExecutor(model).run(x).item() == 0
    narrow = OnnxExecutor(model, accumulate="output", record=True)
    assert narrow.run(x).item() == math.inf
    assert narrow.overflow_report()[0].headroom == 0


CANCELLING = np.concatenate([np.full(16, 100), np.full(16, -100)]).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "shape", "weight"),
    [
        ("y = Conv(x, w)", (1, 32, 1, 1), (1, 32, 1, 1)),
        # Channels are too few for a step: the kernel's positions fill it.
        ("y = Conv(x, w)", (1, 1, 32, 1), (1, 1, 32, 1)),
        ("y = Conv<group=1>(x, w)", (1, 4, 2, 4), (1, 4, 2, 4)),
        ("y = ConvTranspose(x, w)", (1, 32, 1, 1), (32, 1, 1, 1)),
        ("y = Gemm(x, w)", (1, 32), (32, 1)),
        ('y = Einsum<equation="abc,bcd->ad">(x, w)', (1, 4, 8), (4, 8, 1)),
        ("y = Attention<scale=1.0>(x, k, w)", (1, 1, 1, 32), (1, 1, 1, 32)),
    ],
)
def test_every_sum_of_products_can_have_a_narrow_accumulator(
    make_model: MakeModel, body: str, shape: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    x = CANCELLING.reshape(shape)
    if body.startswith("y = Conv"):  # channels are counted first
        x = np.moveaxis(CANCELLING.reshape(shape[:1] + shape[2:] + shape[1:2]), -1, 1)
    w = np.full(weight, 50, dtype=np.float16)
    constants = {"w": w, "k": w} if "k" in body else {"w": w}
    model = make_model(body, shape, constants, x="float16", y="float16", opset=23)
    assert np.isfinite(OnnxExecutor(model).run(np.ascontiguousarray(x))).all()
    narrow = OnnxExecutor(model, accumulate="output").run(np.ascontiguousarray(x))
    assert not np.isfinite(narrow).all()


def test_a_narrow_accumulator_changes_nothing_else(make_model: MakeModel) -> None:
    """Neither float32 products, nor those of integers, nor other sums."""
    half_sum = "y = ReduceSum(x, a)"
    wide = "a = Cast<to=1>(x) y = MatMul(a, w)"
    x, w = CANCELLING.reshape(1, 32), np.full((32, 1), 50, dtype=np.float32)
    for model in (
        make_model(half_sum, x.shape, {"a": np.array([1])}, x="float16", y="float16"),
        make_model(wide, x.shape, {"w": w}, x="float16"),
        quantized_product(make_model, np.int8),
    ):
        assert OnnxExecutor(model, accumulate="output").run(x).item() == 0


def quantized_product(make_model: MakeModel, integer: type) -> onnx.ModelProto:
    """A product of dequantized tensors, one of them moved by operators that compute nothing."""
    body = (
        "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
        "d = DequantizeLinear(w, s, z) t = Transpose(d) y = MatMul(a, t)"
    )
    constants = {
        "s": np.array(1, dtype=np.float16),
        "z": np.array(0, dtype=integer),
        "w": np.full((1, 32), 50, dtype=integer),
    }
    return make_model(body, (1, 32), constants, x="float16", y="float16", opset=21)


def test_products_with_one_dequantized_operand_have_one(make_model: MakeModel) -> None:
    body = "d = DequantizeLinear(w, s) y = MatMul(x, d)"
    constants = {"s": np.array(1, dtype=np.float16), "w": np.full((32, 1), 50, dtype=np.int8)}
    model = make_model(body, (1, 32), constants, x="float16", y="float16", opset=21)
    x = CANCELLING.reshape(1, 32)
    assert OnnxExecutor(model, accumulate="output").run(x).item() == math.inf


@pytest.mark.parametrize("body", ['y = Einsum<equation="ab,bc->ac">(x, w)', "y = Gemm(x, w)"])
def test_tf32_rounds_the_factors_of_every_product(make_model: MakeModel, body: str) -> None:
    fine = 1 + 2.0**-12  # more bits than TF32 has
    model = make_model(body, (1, 1), {"w": np.full((1, 1), fine, dtype=np.float32)})
    x = np.full((1, 1), fine, dtype=np.float32)
    assert OnnxExecutor(model).run(x).item() > 1
    assert OnnxExecutor(model, tf32=True).run(x).item() == 1


def test_float32_parts_of_a_mixed_graph_are_not_rounded(make_model: MakeModel) -> None:
    body = "a = Cast<to=1>(x) b = Mul(a, s) y = Div(b, s)"
    constants = {"s": np.array([1e6], dtype=np.float32)}
    model = make_model(body, (1, 2), constants, x="float16")
    x = np.array([[1.5, 60000.0]], dtype=np.float32)
    np.testing.assert_allclose(OnnxExecutor(model).run(x), x, rtol=1e-6)


def test_what_is_rounded_stays_as_it_is_for_its_other_readers(make_model: MakeModel) -> None:
    body = "a = Relu(x) h = Cast<to=10>(a) b = Cast<to=1>(h) y = Sub(a, b)"
    x = np.array([[0.1, 1.0, 2049.0, -3.0]], dtype=np.float32)
    lost = np.maximum(x, 0) - np.maximum(x, 0).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(OnnxExecutor(make_model(body, x.shape)).run(x), lost)


def test_the_callers_images_stay_untouched(make_model: MakeModel) -> None:
    model = make_model("a = Relu(x) y = Add(a, x)", X.shape, x="float16", y="float16")
    images = X.copy()
    images.flags.writeable = False
    OnnxExecutor(model).run(images)
    np.testing.assert_array_equal(images, X)


# ------------------------------------------------------------------ quantized graphs


def test_float8_weights_and_activations(make_model: MakeModel) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    stored = helper.make_tensor(
        "w", TensorProto.FLOAT8E4M3FN, (6, 3), (weight / 0.01).astype(np.float32).ravel().tolist()
    )
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
    body = (
        "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
        "d = DequantizeLinear(w, t) y = MatMul(a, d)"
    )
    constants = {"w": stored, "z": zero, "s": np.float32(0.004), "t": np.float32(0.01)}
    arrays = {k: np.asarray(v) if isinstance(v, np.generic) else v for k, v in constants.items()}
    executor = OnnxExecutor(make_model(body, X.shape, arrays), record=True)
    result = executor.run(X)

    def eight(values: np.ndarray) -> np.ndarray:
        limited = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        widened: np.ndarray = limited.astype(np.float32)
        return widened

    expected = (eight(X / np.float32(0.004)) * np.float32(0.004)) @ (
        eight(weight / 0.01) * np.float32(0.01)
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    entry = next(r for r in executor.overflow_report() if r.op_type == "QuantizeLinear")
    assert (entry.dtype, entry.limit) == ("float8_e4m3fn", 448)
    assert entry.saturated == int((np.abs(X / 0.004) > 448).sum()) > 0


def test_four_bit_weights_in_blocks(make_model: MakeModel) -> None:
    values = np.random.default_rng(1).integers(-8, 8, (6, 4))
    stored = helper.make_tensor("w", TensorProto.INT4, (6, 4), values.ravel().tolist())
    scale = np.random.default_rng(2).uniform(0.1, 1, (3, 4)).astype(np.float16)
    model = make_model(
        "d = DequantizeLinear<axis=0, block_size=2>(w, s) y = MatMul(x, d)",
        X.shape,
        {"w": stored, "s": scale},
        x="float16",
        y="float16",
        opset=21,
    )
    weight = torch.from_numpy(values * np.repeat(scale.astype(np.float32), 2, 0)).half()
    expected = (HALF.float() @ weight.float()).half().float()
    assert torch.equal(torch.from_numpy(OnnxExecutor(model).run(X)), expected)


def test_the_type_of_quantization_comes_from_the_attribute(make_model: MakeModel) -> None:
    body = "q = QuantizeLinear<output_dtype=3>(x, s) y = DequantizeLinear(q, s)"
    scale = {"s": np.array(1, dtype=np.float32)}
    model = make_model(body, (3,), scale, opset=21)
    result = OnnxExecutor(model).run(np.array([-200, -1, 200], dtype=np.float32))
    assert result.tolist() == [-128, -1, 127]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    ("values", "zero", "expected"),
    [
        ([-1.5, -0.5, 0.5, 1.5, 100.4], 0, [-2, 0, 0, 2, 100]),  # all within the type: unclamped
        ([-128, 127, 3], 0, [-128, 127, 3]),
        ([-129, 128, math.inf, -math.inf], 0, [-128, 127, 127, -128]),
        ([math.nan, 5, 300], 0, [0, 5, 127]),
        ([-100, 120, 0], 10, [-90, 127, 10]),
    ],
)
def test_positions_become_integers_the_same_with_and_without_records(
    make_model: MakeModel, record: bool, values: list[float], zero: int, expected: list[int]
) -> None:
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, np.int8)}
    body = "q = QuantizeLinear(x, s, z) y = Cast<to=1>(q)"
    model = make_model(body, (len(values),), constants)
    executor = OnnxExecutor(model, record=record)
    given = np.array(values, dtype=np.float32)
    assert executor.run(given).tolist() == expected
    assert given.tobytes() == np.array(values, dtype=np.float32).tobytes()
    if record:
        entry = executor.overflow_report()[0]
        beyond = sum(not -128 <= value + zero <= 127 for value in values if value == value)
        assert (entry.saturated, entry.values) == (beyond, len(values))


# ------------------------------------------------------------------ the overflow report


@pytest.mark.parametrize("scale", [0.05, 2.0**-14, 6e-5, 600.0, 511.76, -0.05, 0.0, math.nan])
@pytest.mark.parametrize(("integer", "zero"), [("int8", 0), ("int8", 7), ("uint8", 200)])
def test_steps_tell_of_dequantized_values_what_the_values_tell(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, scale: float, integer: str, zero: int
) -> None:
    step = helper.make_tensor("t", TensorProto.FLOAT16, [], [scale])
    constants = {"s": np.array(1, np.float16), "z": np.array(zero, integer), "t": step}
    body = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, t, z)"
    model = make_model(body, (1, 5), constants, x="float16", y="float16")
    rows = [
        [-128, 3, 0, 1, 100],
        [-128, 3, 0, 1, 127],
        [-900, 3, 0, 1, 400],
        [-90, math.nan, 0, 1, 9],
    ]
    batches = [np.array([row], np.float32) for row in rows]

    def found() -> list[TensorRange]:
        by_steps = OnnxExecutor(model, record=True)
        for batch in batches:
            by_steps.run(batch)
        return by_steps.overflow_report()

    by_steps = found()
    monkeypatch.setattr("pipeline.emulate.onnx.executor._observe_steps", lambda *told: False)
    assert list(map(str, by_steps)) == list(map(str, found()))


def test_a_value_that_takes_the_place_of_a_step_is_what_is_recorded(make_model: MakeModel) -> None:
    body = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
    constants = {"s": np.array(1, np.float32), "z": np.array(0, np.int8)}
    executor = OnnxExecutor(make_model(body, (1, 2), constants), record=True)
    known = {"q": np.array([[-9, 5]], np.int8)}
    list(executor.trace({"x": np.array([[100, 3]], np.float32)}, known))
    largest = {entry.tensor: entry.largest for entry in executor.overflow_report()}
    assert largest == {"q": 100, "y": 9}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_what_is_not_finite(make_model: MakeModel, approximate: str) -> None:
    model = make_model(f'y = Gelu<approximate="{approximate}">(x)', (1, 4))
    run = OnnxExecutor(model).run
    inf, nan = math.inf, math.nan
    assert run(np.array([[inf, 2, 0, 9]], np.float32))[0, [0, 2]].tolist() == [inf, 0]
    for value in (-inf, nan):
        found = run(np.array([[value, 2, 0, 9]], np.float32))
        assert np.isnan(found).tolist() == [[True, False, False, False]]
    x = torch.tensor([[-3e38, 2, 0, 3e38]])
    assert np.array_equal(run(x.numpy()), F.gelu(x, approximate=approximate).numpy())


PUBLISHED = """
    q0, k0, v = Split<axis=1, num_outputs=3>(x)
    q1 = Elu(q0) q = Add(q1, one) k1 = Elu(k0) k = Add(k1, one)
    mean_k = ReduceMean(k, tokens) mean_kt = Transpose<perm=[0,1,3,2]>(mean_k)
    qk = MatMul(q, mean_kt) qk_eps = Add(qk, eps) z = Div(one, qk_eps)
    kt = Transpose<perm=[0,1,3,2]>(k) ktv = MatMul(kt, v) kv = Div(ktv, n)
    qkv = MatMul(q, kv) y = Mul(qkv, z)
"""

SCALE_FREE = """
    q0, k0, v = Split<axis=1, num_outputs=3>(x)
    q1 = Elu(q0) q = Add(q1, one) k1 = Elu(k0) k = Add(k1, one)
    mean_q = ReduceMean(q, channels) mean_q_eps = Add(mean_q, eps) qs = Div(q, mean_q_eps)
    mean_k = ReduceMean(k, tokens) head = ReduceMean(mean_k, channels) b = Add(head, eps)
    bn = Mul(b, n) ks = Div(k, bn) ms = Div(mean_k, b)
    kt = Transpose<perm=[0,1,3,2]>(ks) kv = MatMul(kt, v) qkv = MatMul(qs, kv)
    mt = Transpose<perm=[0,1,3,2]>(ms) qm = MatMul(qs, mt) qm_eps = Add(qm, eps)
    y = Div(qkv, qm_eps)
"""

BLOCK = "stages.2.blocks.5"


def attention(make_model: MakeModel, body: str, x: np.ndarray, kind: str) -> onnx.ModelProto:
    """One form of linear attention, node by node; x is (batch, 3 heads, tokens, channels)."""
    dtype = np.float16 if kind == "float16" else np.float32
    numbers = {"one": 1, "eps": 1e-6, "n": x.shape[2]}
    constants = {name: np.array(value, dtype=dtype) for name, value in numbers.items()}
    constants |= {"tokens": np.array([2]), "channels": np.array([3])}
    model = make_model(body, x.shape, constants, x=kind, y=kind)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        scopes = ["", "stages", BLOCK, f"{BLOCK}.token_mixer", node.output[0]]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
    return model


@pytest.fixture(scope="module")
def large_activations() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (60 * generator.standard_normal((2, 3 * 2, 64, 16))).astype(np.float32)


def report_of(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, list[TensorRange]]:
    executor = OnnxExecutor(model, record=True)
    return executor.run(x), executor.overflow_report()


def test_published_attention_overflows_and_the_block_is_named(
    make_model: MakeModel, large_activations: np.ndarray
) -> None:
    model = attention(make_model, PUBLISHED, large_activations, "float16")
    result, report = report_of(model, large_activations)
    assert not np.isfinite(result).all()
    origin = first_failure(report)
    assert origin is not None
    assert (origin.tensor, origin.node, origin.op_type) == ("ktv", "node_ktv", "MatMul")
    assert (origin.module, origin.block) == (f"{BLOCK}.token_mixer", BLOCK)
    assert (origin.dtype, origin.limit) == ("float16", 65504)
    assert origin.overflowed > 0
    assert origin.largest > 65504
    assert origin.headroom < 1
    # What reads infinities gives infinities and NaN without overflowing itself.
    last = report[-1]
    assert last.tensor == "y"
    assert last.infinite + last.nan > 0
    assert last.headroom == 0


def test_onnx_runtime_hides_that_overflow(
    make_model: MakeModel, large_activations: np.ndarray
) -> None:
    model = attention(make_model, PUBLISHED, large_activations, "float16")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert np.isfinite(session.run(None, {"x": large_activations.astype(np.float16)})[0]).all()


def test_scale_free_attention_stays_in_range(
    make_model: MakeModel, large_activations: np.ndarray
) -> None:
    model = attention(make_model, SCALE_FREE, large_activations, "float16")
    result, report = report_of(model, large_activations)
    assert first_failure(report) is None
    assert min(entry.headroom for entry in report) > 4
    exact = attention(make_model, PUBLISHED, large_activations, "float")
    expected = OnnxExecutor(exact).run(large_activations)
    assert np.abs(result - expected).max() / np.abs(expected).max() < 2e-3


def test_the_report_accumulates_over_batches(make_model: MakeModel) -> None:
    model = make_model("a = Relu(x) y = Add(a, a)", ("N", 2), x="float16", y="float16")
    executor = OnnxExecutor(model, record=True)
    executor.run(np.array([[1, 2]], dtype=np.float32))
    executor.run(np.array([[5, 40000], [1, 1]], dtype=np.float32))
    (entry,) = executor.overflow_report()  # Relu rounds nothing
    assert (entry.tensor, entry.values, entry.largest) == ("y", 6, 80000)
    assert entry.overflowed == 1


def test_values_lost_below_the_range_are_counted(make_model: MakeModel) -> None:
    body = "y = Mul(x, c)"
    model = make_model(body, (3,), {"c": half(1e-4)}, x="float16", y="float16")
    executor = OnnxExecutor(model, record=True)
    executor.run(np.array([1, 1e-2, 1e-5], dtype=np.float32))
    (entry,) = executor.overflow_report()
    assert (entry.subnormal, entry.flushed) == (1, 1)  # 1e-4 is normal, 1e-6 not, 1e-9 is lost


def test_weights_that_a_conversion_made_infinite(make_model: MakeModel) -> None:
    weight = numpy_helper.from_array(np.array([[np.inf]], dtype=np.float16), "w")
    model = make_model("y = MatMul(x, w)", (1, 1), {"w": weight}, x="float16", y="float16")
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "head.fc.weight"
    executor = OnnxExecutor(model, record=True)
    entry = executor.overflow_report()[0]
    assert (entry.tensor, entry.op_type, entry.block) == ("head.fc.weight", "Initializer", "head")
    assert entry.infinite == 1


def test_a_single_constant_that_is_infinite(make_model: MakeModel) -> None:
    constants = {"k": np.array(np.inf, np.float16)}
    model = make_model("y = Min(x, k)", (1, 2), constants, x="float16", y="float16")
    entry = OnnxExecutor(model, record=True).overflow_report()[0]
    assert (entry.tensor, entry.op_type) == ("k", "Initializer")
    assert (entry.values, entry.infinite, entry.subnormal) == (1, 1, 0)


def test_no_report_without_recording(make_model: MakeModel) -> None:
    executor = OnnxExecutor(make_model("y = Relu(x)", (1,)))
    with pytest.raises(PipelineError, match="record=True"):
        executor.overflow_report()


# ------------------------------------------------------------------ counting beside

WIDE = (40, 1024)
"""Enough values that they are counted in a thread of their own, where torch has several."""

MANY = """
    a = Mul(x, c) b = Exp(a) e = Mul(b, small) f = Transpose<perm=[1,0]>(e) g = Add(f, f)
    h = Transpose<perm=[1,0]>(g) i = Mul(h, a) q = QuantizeLinear(i, s, z)
    d = DequantizeLinear(q, s, z) y = Add(d, a)
"""


def many(make_model: MakeModel) -> onnx.ModelProto:
    constants = {"c": half(9000), "small": half(1e-4), "s": half(0.25), "z": np.array(0, np.int8)}
    return make_model(MANY, ("N", WIDE[1]), constants, x="float16", y="float16")


def wide_batches() -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    scales = (1e-3, 1e-2, 2e-3, 12.0, 1e-3)
    return [(scale * draw.standard_normal(WIDE)).astype(np.float32) for scale in scales]


def everything(model: onnx.ModelProto) -> tuple[list[bytes], list[TensorRange]]:
    executor = OnnxExecutor(model, record=True)
    return [executor.run(batch).tobytes() for batch in wide_batches()], executor.overflow_report()


@pytest.mark.usefixtures("two_threads")
def test_counting_beside_gives_what_counting_at_once_gives(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = many(make_model)
    beside: list[object] = []
    call = Beside.call

    def counted(*given: Any) -> None:
        beside.append(given)
        call(*given)

    monkeypatch.setattr(Beside, "call", counted)
    found = [everything(model) for _ in range(3)]
    assert len(beside) > 3 * 5 * 5
    monkeypatch.setattr(Beside, "call", None)
    torch.set_num_threads(1)
    alone = everything(model)
    assert all(each == alone for each in found)
    totals = {name: sum(getattr(entry, name) for entry in alone[1]) for name in _COUNTS}
    assert all(totals.values()), totals


@pytest.mark.usefixtures("two_threads")
def test_what_fails_beside_ends_the_run_with_its_message(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = OnnxExecutor(many(make_model), record=True)
    before = threading.active_count()

    def fail(*given: object) -> None:
        raise MemoryError("no memory to count")

    with monkeypatch.context() as patch:
        patch.setattr(TensorRange, "observe_bits", fail)
        with pytest.raises(MemoryError, match="no memory to count"):
            executor.run(wide_batches()[0])
    assert threading.active_count() == before
    executor.run(wide_batches()[0])
    assert threading.active_count() == before


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_is_left_where_a_node_fails(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    executor = OnnxExecutor(many(make_model), record=True)
    before = threading.active_count()
    execute = OnnxExecutor._execute

    def stop(self: OnnxExecutor, step: Step, values: dict[str, torch.Tensor]) -> None:
        if step.node.op_type == "QuantizeLinear":
            assert threading.active_count() == before + 1
            raise error("stop")
        execute(self, step, values)

    monkeypatch.setattr(OnnxExecutor, "_execute", stop)
    with pytest.raises(error, match="stop"):
        executor.run(wide_batches()[0])
    assert threading.active_count() == before
    monkeypatch.undo()
    assert executor.run(wide_batches()[0]).shape == WIDE
    assert threading.active_count() == before


@pytest.mark.usefixtures("two_threads")
def test_values_in_another_order_than_they_are_stored_in_are_counted_at_once(
    make_model: MakeModel,
) -> None:
    exact = torch.zeros(2, 1 << 15)
    assert _worth_a_thread(exact, exact.half())
    assert not _worth_a_thread(exact[:, ::2], exact[:, ::2].half())
    assert not _worth_a_thread(exact, exact)
    assert not _worth_a_thread(exact[:, :9], exact[:, :9].half())


# ------------------------------------------------------------------ images side by side

LAYERS = """
    a = Conv(x, wide, shift) b = Gelu(a) c = Conv<group=48, pads=[1,1,1,1]>(b, each, shift)
    q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) e = Conv(d, narrow)
    f = Tanh(e) g = Mul(f, f) h = Mul(g, small) i = ReduceMean<keepdims=0>(h, axes)
    j = MatMul(i, last) k = Mul(j, large) y = Mul(k, large)
"""
"""Kernels of one value with and without bias, of which torch has two forms, and values that are
lost in every way."""


def layers(make_model: MakeModel, batch: int | str = "N") -> onnx.ModelProto:
    draw = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float16)

    constants = {
        "wide": weights(48, 24, 1, 1), "shift": weights(48), "each": weights(48, 1, 3, 3),
        "narrow": weights(24, 48, 1, 1), "last": weights(24, 10), "small": half(2e-5),
        "s": half(0.06), "z": np.array(0, np.int8), "axes": np.array([2, 3]), "large": half(6e4),
    }  # fmt: skip
    return make_model(LAYERS, (batch, 24, 38, 38), constants, x="float16", y="float16")


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 24, 38, 38)).astype(np.float32)


def threads_seen(monkeypatch: pytest.MonkeyPatch, together: int = 1) -> list[tuple[int, int]]:
    """Which threads computed nodes, and how many of torch's each had; so many begin together."""
    seen: list[tuple[int, int]] = []
    execute, meet = OnnxExecutor._execute, threading.Barrier(together)

    def noted(self: OnnxExecutor, step: Step, values: dict[str, torch.Tensor]) -> None:
        if step is self.steps()[0]:
            meet.wait(10)
        seen.append((threading.get_ident(), torch.get_num_threads()))
        execute(self, step, values)

    monkeypatch.setattr(OnnxExecutor, "_execute", noted)
    return seen


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 17])
def test_images_side_by_side_have_the_bits_and_ranges_of_the_slow_form(
    make_model: MakeModel, count: int
) -> None:
    model = layers(make_model)
    slow, fast = OnnxExecutor(model, record=True), OnnxExecutor(model, record=True)
    for images in (pictures(count), 2 * pictures(count), pictures(count + 1)):
        assert fast.run_all(images).tobytes() == slow.run(images).tobytes()
    assert fast.overflow_report() == slow.overflow_report()


@pytest.mark.usefixtures("two_threads")
def test_every_thread_of_torch_has_images_of_its_own(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, before = OnnxExecutor(layers(make_model), record=True), threading.active_count()
    seen = threads_seen(monkeypatch, together=2)
    executor.run_all(pictures(8))
    assert {threads for _, threads in seen} == {1}
    assert len({thread for thread, _ in seen} - {threading.get_ident()}) == 2
    assert torch.get_num_threads() == 2
    assert threading.active_count() == before
    counts = {name: sum(getattr(e, name) for e in executor.overflow_report()) for name in _COUNTS}
    assert all(counts[name] for name in ("saturated", "flushed", "subnormal", "overflowed")), counts


@pytest.mark.usefixtures("two_threads")
def test_what_may_not_be_divided_runs_in_one_thread(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threads_seen(monkeypatch)
    OnnxExecutor(layers(make_model, 4)).run_all(pictures(10))
    OnnxExecutor(layers(make_model)).run_all(pictures(3))
    model = layers(make_model)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxExecutor, "_plain", False)
        OnnxExecutor(model).run_all(pictures(8))
    torch.set_num_threads(1)
    OnnxExecutor(model).run_all(pictures(8))
    assert {thread for thread, _ in seen} == {threading.get_ident()}


def test_images_run_in_even_parts(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = OnnxExecutor(make_model("y = Neg(x)", ("N", 3, 224, 224)))
    sizes: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return images[:, 0]

    monkeypatch.setattr(executor, "run", run)
    executor.run_all(np.zeros((8, 3, 224, 224), np.float32))
    executor.run_all(np.zeros((19, 3, 224, 224), np.float32))
    assert sizes == [8, 6, 6, 7]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("threads", "count", "sizes"),
    [(1, 300, [100, 100, 100]), (2, 256, [128, 128]), (2, 127, [127]), (8, 256, [64] * 4)],
)
def test_small_pictures_run_many_at_a_time(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    count: int,
    sizes: list[int],
) -> None:
    executor = OnnxExecutor(make_model("y = Neg(x)", ("N", 3, 8, 8)))
    seen: list[tuple[int, int]] = []

    def run(self: OnnxExecutor, images: np.ndarray) -> np.ndarray:
        seen.append((len(images), torch.get_num_threads()))
        return images[:, 0]

    monkeypatch.setattr(OnnxExecutor, "run", run)
    torch.set_num_threads(threads)
    executor.run_all(np.zeros((count, 3, 8, 8), np.float32))
    # A second thread is no help within a part, however many there are.
    assert seen == [(size, 1) for size in sizes]


@pytest.mark.usefixtures("two_threads")
def test_what_fails_side_by_side_ends_the_run_with_its_message(make_model: MakeModel) -> None:
    executor, before = OnnxExecutor(layers(make_model)), threading.active_count()
    with pytest.raises(DataError, match="do not fit the graph's input"):
        executor.run_all(pictures(8)[:, :5])
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------ plan


class Watched(OnnxExecutor):
    """Counts the tensors that are alive before each node."""

    def run(self, images: np.ndarray) -> np.ndarray:
        self.alive: list[int] = []
        return super().run(images)

    def _execute(self, step, values):  # type: ignore[no-untyped-def]
        if hasattr(self, "alive"):
            self.alive.append(len(values))
        super()._execute(step, values)


def test_tensors_are_freed_after_their_last_use(make_model: MakeModel) -> None:
    chain = "t0 = Exp(x) " + " ".join(f"t{i} = Tanh(t{i - 1})" for i in range(1, 50))
    executor = Watched(make_model(f"{chain} y = Add(t49, x)", (2, 2)))
    executor.run(np.ones((2, 2), dtype=np.float32))
    assert max(executor.alive) == 2  # the images and one tensor of the chain


def test_what_depends_on_constants_alone_is_computed_once(make_model: MakeModel) -> None:
    body = "d = DequantizeLinear(w, s) e = Transpose(d) y = MatMul(x, e)"
    constants = {"w": np.ones((3, 2), dtype=np.int8), "s": np.array(0.5, dtype=np.float32)}
    executor = Watched(make_model(body, (1, 2), constants))
    for _ in range(2):
        assert executor.run(np.ones((1, 2), dtype=np.float32)).tolist() == [[1, 1, 1]]
        assert executor.alive == [2]  # one node; x and e


def test_a_graph_of_constants_alone(make_model: MakeModel) -> None:
    model = make_model("y = Add(a, a)", (1,), {"a": np.ones(2, dtype=np.float32)})
    assert OnnxExecutor(model).run(np.zeros(1, dtype=np.float32)).tolist() == [2, 2]


# ------------------------------------------------------------------ mistakes


def test_unknown_operator(make_model: MakeModel) -> None:
    model = make_model("a = Relu(x) y = NonZero(a)", (2,))
    model.graph.node[1].name = "find"
    with pytest.raises(UnsupportedOperatorError, match=r"'find'.*NonZero.*'ai\.onnx'") as caught:
        OnnxExecutor(model)
    named = re.search(r"pipeline/\S+/", str(caught.value))
    assert named
    assert (Path(pipeline.__path__[0]).parent / named[0] / "__init__.py").is_file()


def test_outputs_that_are_not_computed(make_model: MakeModel) -> None:
    model = make_model("y, i = Relu(x)", (1, 1, 4))
    with pytest.raises(UnsupportedOperatorError, match="uses 2 outputs of the operator Relu"):
        OnnxExecutor(model).run(np.zeros((1, 1, 4), dtype=np.float32))


def test_training_mode(make_model: MakeModel) -> None:
    one = np.ones(2, dtype=np.float32)
    body = "y = BatchNormalization<training_mode=1>(x, a, a, a, a)"
    model = make_model(body, (1, 2, 2), {"a": one})
    with pytest.raises(UnsupportedOperatorError, match=r"'y'.*training_mode=1.*evaluation mode"):
        OnnxExecutor(model)
    constants = {"r": np.float32(0.5), "t": np.array(True)}
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    dropout = OnnxExecutor(make_model("y = Dropout(x, r, t)", (2,), arrays))
    with pytest.raises(UnsupportedOperatorError, match=r"'y'.*evaluation mode"):
        dropout.run(np.zeros(2, dtype=np.float32))


def test_a_division_that_python_cannot_do_names_the_node(make_model: MakeModel) -> None:
    model = make_model("y = Gather(c, i)", (1,), {"c": np.array(1.0), "i": INDEX})
    with pytest.raises(ArtifactError, match=r"'y' \(Gather\) cannot run"):
        OnnxExecutor(model)


def test_missing_operand(make_model: MakeModel) -> None:
    model = make_model("y = CastLike(x)", (1,))
    with pytest.raises(UnsupportedOperatorError, match=r"'y'.*lacks its input 1"):
        OnnxExecutor(model)


def test_images_that_do_not_fit(make_model: MakeModel) -> None:
    executor = OnnxExecutor(make_model("y = Relu(x)", ("N", 3, 8, 8)))
    assert executor.run(np.zeros((5, 3, 8, 8), dtype=np.float32)).shape == (5, 3, 8, 8)
    with pytest.raises(DataError, match=r"\(1, 3, 4, 4\) do not fit .*'x'.*\('any', 3, 8, 8\)"):
        executor.run(np.zeros((1, 3, 4, 4), dtype=np.float32))
    with pytest.raises(DataError, match="do not fit"):
        executor.run(np.zeros((3, 8, 8), dtype=np.float32))
    with pytest.raises(DataError, match="float32, these are float64"):
        executor.run(np.zeros((1, 3, 8, 8)))


def test_operations_that_do_not_fit_together(make_model: MakeModel) -> None:
    model = make_model("y = MatMul(x, w)", ("N", "M"), {"w": np.ones((3, 2), dtype=np.float32)})
    with pytest.raises(ArtifactError, match=r"'y' \(MatMul\).*\(1, 5\), \(3, 2\)"):
        OnnxExecutor(model).run(np.zeros((1, 5), dtype=np.float32))


def test_a_graph_with_two_inputs(make_model: MakeModel) -> None:
    model = make_model("y = Add(x, b)", (1,))
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "b"
    with pytest.raises(ArtifactError, match=r"one input.*x, b"):
        OnnxExecutor(model)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        OnnxExecutor(tmp_path / "model.onnx")


@pytest.mark.parametrize("zero", [0, 7])
def test_zero_points_count_unless_they_are_zero(zero: int) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 6]) for n in "xy"]
    stored = [
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        numpy_helper.from_array(np.array(zero, np.uint8), "zero"),
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    x = np.array([[-9.0, -1.0, -0.0, 0.25, 3.0, 200.0]], dtype=np.float32)
    expected = (np.clip(np.round(x / 0.5) + zero, 0, 255) - zero) * 0.5
    result = OnnxExecutor(model).run(x)
    assert np.array_equal(result, expected)
    assert not np.signbit(result[0, 2])


def test_results_that_need_no_rounding_are_recorded_if_that_is_asked_for(
    make_model: MakeModel,
) -> None:
    body = "a = Abs(x) b = Transpose(a) s = Shape(b) y = Min(b, limit)"
    model = make_model(body, X.shape, {"limit": np.array(1.5, np.float32)})
    seen = {}
    for moved in (False, True):
        executor = OnnxExecutor(model, record=True, moved=moved)
        executor.run(np.full_like(X, -7.0))
        seen[moved] = {entry.tensor: entry.largest for entry in executor.overflow_report()}
    assert seen[True] == {**seen[False], "a": 7.0, "b": 7.0, "y": 1.5}
    assert "b" not in seen[False]
