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
