"""The plain form of a pair, node by node, is the judge of the short one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch

from pipeline.emulate.onnx import pairs
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.onnx.saturating import SaturatingExecutor

MakeModel = Callable[..., onnx.ModelProto]

BODY = """
    a, b = Split<axis=1, num_outputs=2>(x)
    q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
    r = QuantizeLinear(b, s, z) e = DequantizeLinear(r, s, z)
    y = Add(d, e)
"""


def half(value: float) -> np.ndarray:
    return np.array(value, np.float16)


def model_of(make_model: MakeModel, scale: float, body: str = BODY) -> onnx.ModelProto:
    constants = {"s": half(scale), "z": np.array(0, np.int8), "t": half(2 * scale)}
    return make_model(body, ("N", 22), constants, x="float16", y="float16", opset=21)


def every_half() -> np.ndarray:
    """All finite values in half precision, and some rows of other length than vectors have."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = values[np.isfinite(values)]
    return np.resize(finite, (-(-len(finite) // 22), 22))


def slow(model: onnx.ModelProto) -> OnnxExecutor:
    executor = OnnxExecutor(model, record=True)
    executor._pairs = {}
    return executor


SCALES = [1.0, 0.25, 0.1, 0.0123, 3.0, 0.7, 1.7e-3, 6e-8, 900.0, 1e-4]


@pytest.mark.parametrize("scale", SCALES)
def test_short_and_plain_form_give_the_same_bits_and_ranges(
    make_model: MakeModel, scale: float
) -> None:
    model = model_of(make_model, scale)
    fast, plain = OnnxExecutor(model, record=True), slow(model)
    step = float(half(scale))
    within = every_half()
    within = within[(np.abs(within) < 127.4 * step).all(1)]
    ties = (np.arange(-127, 127, dtype=np.float32) + 0.5) * step
    ties = np.resize(ties[np.abs(ties) < 6e4].astype(np.float16), (7, 22)).astype(np.float32)
    for images in (within, ties, within[:0], -within[:9], every_half(), within):
        assert fast.run(images).tobytes() == plain.run(images).tobytes()
        assert fast.overflow_report() == plain.overflow_report()
    assert OnnxExecutor(model).run(within).tobytes() == plain.run(within).tobytes()


def test_the_short_form_runs_until_something_saturates(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    form = pairs.Pair.positions

    def noted(self: pairs.Pair, x: torch.Tensor) -> torch.Tensor:
        seen.append(self.quantized)
        return form(self, x)

    monkeypatch.setattr(pairs.Pair, "positions", noted)
    executor = OnnxExecutor(model_of(make_model, 0.1), record=True)
    small, large = np.full((3, 22), 12.0, np.float32), np.full((3, 22), 12.0, np.float32)
    large[1, 3] = 12.9
    for images in (small, large, small):
        executor.run(images)
    assert seen == ["q", "r", "q", "r", "r"]
    saturated = {entry.tensor: entry.saturated for entry in executor.overflow_report()}
    assert (saturated["q"], saturated["r"]) == (1, 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite(make_model: MakeModel, value: float) -> None:
    model = model_of(make_model, 0.1)
    fast, plain = OnnxExecutor(model, record=True), slow(model)
    images = np.linspace(-9, 9, 44, dtype=np.float32).reshape(2, 22)
    images[0, 5] = value
    assert fast.run(images).tobytes() == plain.run(images).tobytes()
    assert fast.overflow_report() == plain.overflow_report()


def test_a_zero_has_no_sign(make_model: MakeModel) -> None:
    fast = OnnxExecutor(model_of(make_model, 0.1))
    assert not np.signbit(fast.run(np.full((2, 22), -0.01, np.float32))).any()


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (BODY, {"q", "d", "r", "e"}),
        ("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", {"q", "y"}),
        ("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, t, z)", set()),
        ("y = QuantizeLinear(x, s, z) d = DequantizeLinear(y, s, z)", set()),
        (
            "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
            "e = DequantizeLinear(q, s, z) y = Add(d, e)",
            set(),
        ),
        (
            "w = Abs(s) q = QuantizeLinear(x, w, z) y = DequantizeLinear(q, w, z)",
            {"q", "y"},
        ),
        (
            "m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, z) "
            "y = DequantizeLinear(q, m, z)",
            set(),
        ),
    ],
)
def test_which_nodes_are_a_pair(make_model: MakeModel, body: str, names: set[str]) -> None:
    assert set(OnnxExecutor(model_of(make_model, 0.1, body))._pairs) == names


def test_other_types_zeros_and_executors_have_no_pairs(make_model: MakeModel) -> None:
    body = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
    single = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    assert not OnnxExecutor(make_model(body, ("N", 22), single))._pairs
    moved = {"s": half(0.1), "z": np.array(3, np.int8)}
    assert not OnnxExecutor(make_model(body, ("N", 22), moved, x="float16", y="float16"))._pairs
    wide = {"s": half(0.1), "z": np.array(0, np.int16)}
    model = make_model(body, ("N", 22), wide, x="float16", y="float16", opset=21)
    assert not OnnxExecutor(model)._pairs
    assert not SaturatingExecutor._plain


def test_where_the_short_form_differs_there_is_no_pair(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs._inverse.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_values", lambda x, scale: x * scale - pairs.ORIGIN * scale)
        assert not OnnxExecutor(model_of(make_model, 0.1))._pairs  # rounded twice
        pairs._inverse.cache_clear()
    assert OnnxExecutor(model_of(make_model, 0.1))._pairs


@pytest.mark.parametrize(("scale", "found"), [(1.0, True), (0.25, True), (0.0123, False)])
def test_a_factor_replaces_the_division_where_positions_stay(scale: float, found: bool) -> None:
    known, inverse = pairs._inverse(float(half(scale)))
    assert known
    assert (inverse is not None) == found


def test_a_wrong_factor_is_noticed() -> None:
    assert pairs._positions_are_right(0.25, 4.0)
    assert not pairs._positions_are_right(0.25, float(np.nextafter(np.float32(4), np.float32(9))))
    assert not pairs._positions_are_right(float(half(0.1)), 10.0)
    assert torch.equal(*pairs._both_ways(torch.arange(9.0)))
