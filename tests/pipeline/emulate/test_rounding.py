from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from pipeline.emulate import rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_round_as_torch_does_and_overflow(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    x = torch.cat([torch.randn(1000) * 100, torch.tensor([limit, 1.01 * limit, -1.01 * limit])])
    rounded = rounding.round_to(x, dtype)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, x.to(dtype).float())
    assert rounded[-2:].tolist() == [math.inf, -math.inf]


def test_float16_boundary() -> None:
    x = torch.tensor([65519.9, 65520.0, 6e-8, 2e-8])
    assert rounding.round_to(x, torch.float16).tolist() == [65504.0, math.inf, 2.0**-24, 0.0]


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_float8_agrees_with_ml_dtypes(name: str) -> None:
    dtype, limit = getattr(torch, name), torch.finfo(getattr(torch, name)).max
    inside = torch.randn(5000) * limit / 4
    beyond = limit * torch.tensor(
        [1, 1.01, 1.03, 1.035715, 1.0358, 1.0667, 1.1428571, 1.15, 2, 1e9]
    )
    x = torch.cat([inside, beyond, -beyond])
    # ml_dtypes does not saturate, like ONNX's saturate=0.
    with np.errstate(over="ignore", invalid="ignore"):
        reference = x.numpy().astype(getattr(ml_dtypes, name)).astype(np.float32)
    free = rounding.round_to(x, dtype, saturate=False).numpy()
    np.testing.assert_array_equal(free, reference)
    limited = rounding.round_to(x, dtype).numpy()
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(limited[finite], reference[finite])
    assert set(np.abs(limited[~finite])) == {limit}


def test_tf32_keeps_ten_bits_and_rounds_half_to_even() -> None:
    ulp = 2.0**-10
    x = torch.tensor([1.0, 1 + ulp, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -3.0, 1e-40, 3e38])
    expected = torch.tensor([1.0, 1 + ulp, 1.0, 1 + 2 * ulp, 1 + ulp, -3.0])
    assert torch.equal(rounding.to_tf32(x)[:6], expected)
    random = torch.randn(1000)
    # What float16 holds, TF32 holds: they have the same significand.
    assert torch.equal(rounding.to_tf32(random.half().float()), random.half().float())
    assert torch.equal(rounding.to_tf32(random).half(), random.half())
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(rounding.to_tf32(special).isnan(), special.isnan())
    assert torch.equal(rounding.to_tf32(special)[:2], special[:2])
    columns = torch.randn(4, 3).T
    assert torch.equal(rounding.to_tf32(columns), rounding.to_tf32(columns.contiguous()))


def test_float8_keeps_nan_and_saturates_infinity() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = rounding.round_to(x, torch.float8_e4m3fn)
    assert rounded[:2].tolist() == [448.0, -448.0]
    assert rounded[2].isnan()


def test_tie_above_the_limit_of_e4m3_goes_to_the_limit() -> None:
    x = torch.tensor([464.0, 464.1])
    free = rounding.round_to(x, torch.float8_e4m3fn, saturate=False)
    assert free[0] == 448
    assert free[1].isnan()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int8, [-128, -2, 0, 2, 127]),
        (torch.uint8, [0, 0, 0, 2, 255]),
        (rounding.INT4, [-8, -2, 0, 2, 7]),
        (rounding.UINT4, [0, 0, 0, 2, 15]),
    ],
)
def test_small_integers_round_half_to_even_and_saturate(
    dtype: torch.dtype, expected: list[int]
) -> None:
    x = torch.tensor([-1000.0, -1.5, 0.5, 2.5, 1000.0])
    rounded = rounding.round_to(x, dtype)
    assert rounded.dtype == rounding.storage(dtype)
    assert rounded.tolist() == expected


def test_bounds_and_names() -> None:
    assert rounding.bounds(torch.float16) == (-65504.0, 65504.0)
    assert rounding.bounds(rounding.INT4) == (-8, 7)
    assert rounding.bounds(torch.uint8) == (0, 255)
    assert rounding.name(torch.float8_e4m3fn) == "float8_e4m3fn"
    assert rounding.smallest_normal(torch.float16) == 2.0**-14
    assert rounding.storage(torch.float64) == torch.float64
    assert rounding.storage(torch.uint16) == torch.int32


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, rounding.INT4, rounding.UINT4]


@pytest.mark.parametrize("dtype", INTEGERS, ids=rounding.name)
def test_numbers_saturate_in_small_integers_and_nan_becomes_zero(dtype: torch.dtype) -> None:
    low, high = rounding.bounds(dtype)
    exact = torch.tensor([math.nan, -1e6, 1e6, -math.inf, math.inf, 2.5, 3.5] * 5)
    stored = rounding.round_to(exact, dtype)
    assert stored.dtype == rounding.storage(dtype)
    assert stored.tolist() == [0, low, high, low, high, 2, 4] * 5


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint32], ids=rounding.name)
def test_integers_keep_their_lowest_bits(dtype: torch.dtype) -> None:
    low, high = (int(limit) for limit in rounding.bounds(dtype))
    exact = torch.tensor([low - 1, low, high, high + 1, high + 2])
    assert rounding.round_to(exact, dtype).tolist() == [high, low, high, low, low + 1]
