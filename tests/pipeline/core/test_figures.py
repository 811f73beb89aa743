from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline.core import figures
from pipeline.core.figures import Latency, Number, State


def test_numbers_survive_json() -> None:
    for number in (
        Number(0.91, State.MEASURED, unit="", by="x", samples=10, interval=(0.9, 0.92)),
        Number(1.0, State.EMULATED, unit="ms", by="executor", why="no GPU"),
        Number.not_measured("no Mac", unit="ms"),
    ):
        assert Number.from_dict(json.loads(json.dumps(number.to_dict())), "x") == number


def test_numbers_without_origin_are_refused() -> None:
    with pytest.raises(ValueError, match="says why"):
        Number(None, State.NOT_MEASURED)
    with pytest.raises(ValueError, match="says by what"):
        Number(1.0, State.MEASURED)
    with pytest.raises(ValueError, match="has the value None"):
        Number(None, State.MEASURED, by="x")
    with pytest.raises(ValueError, match="has the value 1"):
        Number(1.0, State.NOT_MEASURED, why="x")


def test_top_k() -> None:
    logits = np.array([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [np.nan, 1, 2]])
    labels = np.array([0, 2, 0, 2])
    assert figures.top_k(logits, labels) == 1
    assert figures.top_k(logits, labels, 2) == 2
    # More than there are classes: all but the row that is no result at all.
    assert figures.top_k(logits, labels, 5) == 3
    assert figures.top_k(logits[:0], labels[:0]) == 0


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_among_a_thousand_classes(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((500, 1000)), rng.integers(0, 1000, 500)
    labels[:100] = logits[:100].argsort(1)[:, -k]  # just among them
    labels[100:200] = logits[100:200].argsort(1)[:, -k - 1]  # just not
    best = logits.argsort(1)[:, ::-1][:, :k]
    assert figures.top_k(logits, labels, k) == (best == labels[:, None]).any(1).sum()


def test_relative_errors_are_of_each_image() -> None:
    reference = np.array([[3.0, 4], [0, 10], [0, 0]], np.float32)
    logits = reference + np.array([[0, 1], [3, 4], [0, 0]], np.float32)
    assert np.allclose(figures.relative_errors(logits, reference), [0.2, 0.5, 0])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_against_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert figures.wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="no share"):
        figures.wilson(1, 0)
    with pytest.raises(ValueError, match="no share"):
        figures.wilson(3, 2)


def test_compare_counts_flips_and_sees_broken_logits() -> None:
    reference = np.array([[1.0, 0], [0, 1], [2, 1]])
    same = figures.compare(reference, reference)
    assert (same.agreement, same.flips, same.max_difference, same.finite) == (1, 0, 0, True)
    assert same.cosine == pytest.approx(1)
    other = reference.copy()
    other[0] = [0, 1]
    assert figures.compare(other, reference).flips == 1
    other[1, 0] = np.inf
    broken = figures.compare(other, reference)
    assert not broken.finite
    assert broken.flips == 2
    with pytest.raises(ValueError, match="do not compare"):
        figures.compare(reference[:2], reference)


def test_paired_drop_counts_only_images_on_which_the_two_differ() -> None:
    labels = np.zeros(100, dtype=np.int64)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    reference = np.array([right] * 90 + [wrong] * 10)
    logits = np.array([wrong] * 3 + [right] * 87 + [right] + [wrong] * 9)
    drop = figures.paired_drop(logits, reference, labels)
    assert (drop.lost, drop.won) == (3, 1)
    assert drop.value == pytest.approx(0.02)
    # Agresti and Min: (b - c) / n ± z sqrt(b + c - (b - c)² / n) / n with half a count added.
    spread = 1.96 * math.sqrt(3.5 + 1.5 - 4 / 102) / 102
    assert drop.interval == pytest.approx((2 / 102 - spread, 2 / 102 + spread), abs=1e-5)
    identical = figures.paired_drop(reference, reference, labels)
    assert identical.value == 0
    assert identical.interval[0] < 0 < identical.interval[1]


def test_percentiles_need_enough_samples() -> None:
    assert Latency((1.0,) * 63).p90 is None
    assert Latency((1.0,) * 64).p90 == 1
    assert Latency((1.0,) * 661).p99 is None
    assert Latency(tuple(float(i) for i in range(662))).p99 == pytest.approx(654.39)
    with pytest.raises(ValueError, match="no call"):
        Latency(())


def test_latency_summary_drops_no_outlier() -> None:
    latency = Latency((1.0, 2.0, 3.0, 1000.0))
    assert latency.p50 == 2.5
    assert latency.mean == 251.5
    plain = latency.to_dict()
    assert plain["max"] == 1000
    assert plain["samples"] == 4
    low, high = latency.interval()
    assert 1 <= low <= 2.5 <= high <= 1000
    assert latency.interval() == (low, high)


def test_ratio_has_an_interval_that_says_which_is_faster() -> None:
    rng = np.random.default_rng(1)
    slow = rng.normal(10, 0.5, 200).tolist()
    fast = rng.normal(7, 0.5, 200).tolist()
    faster = figures.ratio(fast, slow)
    assert faster.value == pytest.approx(0.7, abs=0.02)
    assert faster.faster
    assert not faster.slower
    assert figures.ratio(slow, fast).slower
    alike = figures.ratio(slow, rng.permutation(slow).tolist())
    assert not alike.faster
    assert not alike.slower


def test_states_are_written_as_people_read_them() -> None:
    told = ["measured", "measured here, restricted", "emulated", "estimated", "not measured"]
    assert [str(state) for state in State] == told


def test_what_is_empty_is_not_written() -> None:
    plain = Number(0.0, State.MEASURED, by="x").to_dict()
    assert plain == {"value": 0.0, "state": "measured", "by": "x"}
    nothing = Number.not_measured("no GPU").to_dict()
    assert nothing == {"value": None, "state": "not measured", "why": "no GPU"}


def test_no_image_of_no_class_is_right() -> None:
    assert figures.top_k(np.empty((0, 0)), np.empty(0, dtype=np.int64)) == 0


def test_a_share_lies_within_nothing_and_all() -> None:
    for total in range(1, 200):
        low, high = figures.wilson(0, total)
        assert 0 <= low < 1e-15 < high < 1
        low, high = figures.wilson(total, total)
        assert 0 < low < 1 - 1e-15 < high <= 1


def test_wilson_takes_all_and_nothing_but_no_less() -> None:
    figures.wilson(0, 1)
    figures.wilson(1, 1)
    for correct, total in ((-1, 2), (0, -1), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            figures.wilson(correct, total)


def test_compare_by_hand() -> None:
    reference = np.array([[3.0, 4], [1, 0]])
    logits = np.array([[4.0, 3], [2, 0]])
    found = figures.compare(logits, reference)
    assert (found.agreement, found.flips) == (0.5, 1)
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.max_difference == 1
    assert found.relative_error == pytest.approx(math.sqrt(3 / 26))
    zero = np.zeros((1, 2))
    assert figures.compare(zero, zero).cosine == 0
    assert figures.compare(zero, zero).relative_error == 0
    with pytest.raises(ValueError, match="do not compare"):
        figures.compare(reference[:0], reference[:0])


def test_infinite_logits_compare_as_very_large_ones() -> None:
    reference = np.array([[1.0, 0]])
    for value, expected in ((np.inf, 1e30), (-np.inf, 1e30), (np.nan, 1)):
        found = figures.compare(np.array([[value, 0]]), reference)
        assert found.max_difference == pytest.approx(expected)


def test_logits_that_are_no_numbers_are_wrong() -> None:
    labels = np.zeros(2, dtype=np.int64)
    broken = np.array([[np.nan, 0], [2, 1]])
    whole = np.array([[2.0, 1], [2, 1]])
    assert figures.paired_drop(broken, whole, labels).lost == 1
    assert figures.paired_drop(whole, broken, labels).won == 1


def test_the_median_is_a_figure_with_its_interval() -> None:
    summary = Latency((1.0, 2.0, 3.0)).summary()
    assert summary.median("a runtime") == Number(
        2.0,
        State.MEASURED,
        unit="ms",
        by="a runtime",
        samples=3,
        interval=summary.p50_interval,
    )
    assert (summary.min, summary.max, summary.mean, summary.samples) == (1, 3, 2, 3)
    assert (summary.p90, summary.p99) == (None, None)
    many = Latency(tuple(float(i) for i in range(700))).summary()
    assert many.p90 == pytest.approx(629.1)
    assert many.p99 == pytest.approx(692.01)


def test_intervals_are_of_resampled_medians() -> None:
    values = np.random.default_rng(5).lognormal(size=61)
    latency = Latency(tuple(values.tolist()))
    assert figures.bootstrap(values) == figures.bootstrap(values, rounds=1000, seed=0)
    assert latency.interval() == figures.bootstrap(values, seed=0)
    assert latency.interval(3) == figures.bootstrap(values, seed=3) != latency.interval()
    # Of 61 values sorted, the median's binomial interval of 95 % is from the 23rd to the 39th.
    ordered = np.sort(values)
    low, high = latency.interval()
    assert ordered[20] <= low <= ordered[24]
    assert ordered[36] <= high <= ordered[40]
    rng = np.random.default_rng(9)
    assert len(figures._resampled_medians(values, 7, rng)) == 7


def test_a_ratio_of_one_is_neither_faster_nor_slower() -> None:
    assert not figures.Ratio(0.9, (0.8, 1.0)).faster
    assert not figures.Ratio(1.1, (1.0, 1.2)).slower
    same = figures.ratio([2.0] * 5, [4.0] * 5)
    assert (same.value, same.interval) == (0.5, (0.5, 0.5))


def test_the_inverse_of_a_ratio_turns_its_interval_round() -> None:
    assert figures.Ratio(0.5, (0.25, 0.8)).inverse == figures.Ratio(2.0, (1.25, 4.0))


def test_ratios_that_were_measured_independently_are_multiplied() -> None:
    """Simulated: products of medians lie within the interval as often as it says."""
    wide, exact = figures.Ratio(0.8, (0.6, 1.0)), figures.Ratio(0.5, (0.5, 0.5))
    product = wide.times(exact)
    assert product.value == 0.4
    np.testing.assert_allclose(product.interval, (0.3, 0.5))
    square = wide.times(wide)
    np.testing.assert_allclose(np.log(square.interval[1] / 0.64), 2**0.5 * np.log(1.25))
    np.testing.assert_allclose(np.log(0.64 / square.interval[0]), 2**0.5 * np.log(4 / 3))
    rng = np.random.default_rng(0)
    of_one, of_other = np.exp(0.1 * rng.standard_normal((2, 100_000)))
    ends = 0.1 * 1.96 * np.array([-1, 1])
    one = figures.Ratio(1.0, tuple(np.exp(ends)))
    low, high = one.times(one).interval
    drawn = of_one * of_other
    assert abs(float(np.mean((drawn > low) & (drawn < high))) - 0.95) < 0.003


def test_the_interval_of_a_ratio_holds_most_of_what_chance_gives() -> None:
    rng = np.random.default_rng(2)
    times, base = rng.lognormal(0, 0.3, 101), rng.lognormal(0, 0.3, 101)
    found = figures.ratio(times.tolist(), base.tolist())
    assert found.value == np.median(times) / np.median(base)
    low, high = found.interval
    # The spread of a median of n values is about 1.253 sigma / sqrt(n), of two sqrt(2) times that.
    spread = 1.96 * 1.253 * 0.3 * math.sqrt(2 / 101)
    assert math.log(high / low) == pytest.approx(2 * spread, rel=0.35)


def test_a_bound_of_a_percentile_needs_mlperfs_number_of_calls() -> None:
    for share, needed in ((0.9, figures.SAMPLES_FOR_P90), (0.99, figures.SAMPLES_FOR_P99)):
        assert figures.percentile_bound([1.0] * (needed - 1), share) is None
        # One longer call lies above the bound.
        calls = [float(i) for i in range(needed)]
        assert figures.percentile_bound(calls, share) == needed - 2


def test_a_bound_comes_closer_with_more_calls() -> None:
    for total, bound in ((100, 96), (300, 286), (1000, 922)):
        calls = [float(i) for i in reversed(range(total))]  # any order
        found = figures.percentile_bound(calls, 0.9)
        assert found is not None
        assert 0.9 * total < found <= bound + 1
    large = figures.percentile_bound([float(i) for i in range(50_000)], 0.99)
    assert large is not None
    assert 49_500 < large < 49_560


def test_a_bound_holds_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    held = sum(
        (figures.percentile_bound(rng.exponential(size=200).tolist(), 0.9) or 0) >= -np.log(0.1)
        for _ in range(1000)
    )
    assert held >= 985


def test_a_summary_carries_bounds_and_earlier_ones_are_read_without() -> None:
    summary = Latency(tuple(float(i) for i in range(64))).summary()
    assert (summary.p90_bound, summary.p99_bound) == (62.0, None)
    plain = summary.to_dict()
    del plain["p90_bound"], plain["p99_bound"]
    assert figures.LatencySummary.from_dict(plain, "before").p90_bound is None
