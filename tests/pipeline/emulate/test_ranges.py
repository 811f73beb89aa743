from __future__ import annotations

import math

import pytest
import torch

from pipeline.emulate import ranges, rounding
from pipeline.emulate.ranges import TensorRange, first_failure, tightest


def observed(x: torch.Tensor, dtype: torch.dtype, block: str = "b") -> TensorRange:
    entry = TensorRange(
        tensor="t",
        node="n",
        op_type="Add",
        module=block,
        block=block,
        dtype=rounding.name(dtype),
        limit=rounding.bounds(dtype)[1],
    )
    entry.observe(x, rounding.narrow(x, dtype), dtype)
    return entry


def test_counts_what_float16_does_to_values() -> None:
    x = torch.tensor([1.0, -7e4, 1e5, math.inf, math.nan, 1e-9, 1e-5, 0.0])
    entry = observed(x, torch.float16)
    assert entry.values == 8
    assert entry.largest == 1e5
    assert entry.headroom == pytest.approx(0.65504)
    assert (entry.overflowed, entry.infinite, entry.nan) == (2, 3, 1)
    assert (entry.flushed, entry.subnormal) == (1, 1)
    assert not entry.finite


def test_ranges_accumulate_over_batches() -> None:
    entry = observed(torch.tensor([2.0, -3.0]), torch.float16)
    again = torch.tensor([[1.0, -5.0, 1e-5]])
    entry.observe(again, again.half(), torch.float16)
    assert (entry.values, entry.largest, entry.subnormal) == (5, 5.0, 1)
    assert entry.headroom == 65504 / 5


def test_quantized_types_count_saturation() -> None:
    assert observed(torch.tensor([127.0, 128.0, -128.0, -129.0]), torch.int8).saturated == 2
    entry = observed(torch.tensor([448.0, 449.0, 1.0, 1e-5]), torch.float8_e4m3fn)
    assert (entry.saturated, entry.infinite, entry.flushed) == (1, 0, 1)
    assert entry.headroom == pytest.approx(448 / 449)


def test_headroom_without_values_or_with_infinities_from_elsewhere() -> None:
    assert observed(torch.zeros(3), torch.float16).headroom == math.inf
    assert observed(torch.zeros(0), torch.float16).values == 0
    assert observed(torch.tensor([1.0, math.nan]), torch.float16).headroom == 0
    assert observed(torch.full((2,), math.nan), torch.float32).headroom == 0


def test_tightest_and_first_failure() -> None:
    calm = observed(torch.tensor([1.0]), torch.float16, "a")
    tight = observed(torch.tensor([60000.0]), torch.float16, "a")
    broken = observed(torch.tensor([1e6]), torch.float16, "b")
    later = observed(torch.tensor([math.nan]), torch.float16, "c")
    quantized = observed(torch.tensor([1000.0]), torch.int8, "d")
    report = [calm, tight, quantized, broken, later]
    assert tightest(report) == {"a": tight, "b": broken, "c": later}
    assert first_failure(report) is broken
    assert first_failure([calm, quantized]) is None


def slow_counts(exact: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """What is saturated, flushed and subnormal, counted as the definitions say."""
    smallest, largest = rounding.bounds(dtype)
    rounded = rounding.narrow(exact, dtype).float()
    zero, small = rounded == 0, rounded.abs() < rounding.smallest_normal(dtype)
    saturated = (exact < smallest) | (exact > largest)
    counts = [part.sum().item() for part in (saturated, zero & (exact != 0), small & ~zero)]
    return int(counts[0]), int(counts[1]), int(counts[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("low", [-160, -138, -30, -27, -10, 0])
def test_counts_are_those_of_the_slow_form(dtype: torch.dtype, low: int) -> None:
    draw = torch.Generator().manual_seed(low + 200)
    powers = 2.0 ** torch.randint(low, 24, (7, 50, 9), generator=draw)
    exact = (torch.randn(7, 50, 9, generator=draw) * powers).transpose(0, 2)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    for values in (
        exact,
        exact.contiguous(),
        exact.relu(),
        torch.cat([exact.flatten(), special]),
        exact[0, 0, 0],
    ):
        entry = observed(values, dtype)
        saturated, flushed, subnormal = slow_counts(values, dtype)
        assert (entry.flushed, entry.subnormal) == (flushed, subnormal)
        if dtype in rounding.FLOAT8:
            assert entry.saturated == saturated


def slow_range(batches: list[torch.Tensor], dtype: torch.dtype) -> list[float]:
    """All figures of 16-bit values, as the definitions say."""
    exact = torch.cat([batch.flatten() for batch in batches])
    rounded = rounding.narrow(exact, dtype).float()
    finite = exact[exact.isfinite()].abs()
    infinite = rounded.isinf()
    counts = [infinite & exact.isfinite(), infinite, rounded.isnan()]
    largest = finite.max().item() if len(finite) else 0.0
    numbers = [len(exact), *(int(count.sum()) for count in counts)]
    return [largest, *numbers, *slow_counts(exact, dtype)[1:]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "batches",
    [
        [[1.0, -2.0], [2.0001, 1.0], [-2.0005], [2.0009, 0.0], [-2.0]],  # equal once rounded
        [[1.0, -7.0], [6.0, -8.0], [7.0], [-9.0], [3.0]],
        [[0.0, -0.0], [1e-9], [2.0**-24], [1e-6, -1e-7], [0.0]],
        [[65504.0], [-65519.0, 65510.0], [65520.0], [65505.0]],
        [[70000.0], [-69000.0], [math.inf, 71000.0], [70500.0], [-math.inf]],
        [[math.nan], [1.0], [math.nan, 2.0], [-math.inf, 3.0], [2.5]],
        [[3e38, -3.4e38], [3.39e38], [3.4028e38], [1.0]],
        [[1e-41, 2.0**-133, 2.0**-134, 1.0], [-(2.0**-126), 2.0**-127], []],
    ],
)
def test_all_figures_of_batches_are_those_of_the_slow_form(
    dtype: torch.dtype, batches: list[list[float]]
) -> None:
    entry = observed(torch.zeros(0), dtype)
    seen = []
    for values in batches:
        seen.append(torch.tensor(values))
        entry.observe(seen[-1], rounding.narrow(seen[-1], dtype), dtype)
        found = [entry.largest, entry.values, entry.overflowed, entry.infinite, entry.nan]
        assert [*found, entry.flushed, entry.subnormal] == slow_range(seen, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_bits_stand_for_less_than_fewer(dtype: torch.dtype) -> None:
    kind = ranges._BITS[dtype]
    bits = torch.arange(0x8000, dtype=torch.int32)
    values = bits.to(torch.int16).view(dtype).float()
    values[bits > kind.infinity] = math.inf  # NaN
    assert [kind.above(number - 1) for number in range(0x8001)] == [*values.tolist(), math.inf]
    assert values[kind.normal] == rounding.smallest_normal(dtype)
