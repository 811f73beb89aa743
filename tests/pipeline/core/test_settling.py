"""A measurement ends by a rule that knows the width of intervals and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.core.figures import SAMPLES_FOR_P90, SAMPLES_FOR_P99, bootstrap
from pipeline.core.settling import GROWTH, Settling, first_look, spread

SETTLED = 0.03


def test_the_spread_is_half_an_interval_of_the_median() -> None:
    samples = [float(n) for n in range(1, 101)]
    # 50 - 2.576 * 5 = 37.1: from the 37th to the 64th of a hundred.
    assert spread(samples) == pytest.approx((64 - 37) / 2 / 50.5)
    assert spread(samples[::-1]) == spread(samples)
    assert spread([2 * n for n in samples]) == spread(samples)


def test_few_samples_have_no_such_interval() -> None:
    assert spread([1.0] * 8) == math.inf
    assert spread([1.0] * 11) == 0.0


def test_the_interval_of_the_rule_holds_the_median_of_whatever_distribution() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        samples = np.sort(rng.exponential(1.0, 66))
        low = math.floor(33 - 2.5758 * math.sqrt(66) / 2)
        held += samples[low - 1] <= math.log(2) <= samples[66 - low]
        assert spread(list(samples)) == pytest.approx(
            (samples[66 - low] - samples[low - 1]) / 2 / np.median(samples)
        )
    assert held >= 0.985 * 500


def test_the_first_look_leaves_every_percentile_that_all_calls_would_give() -> None:
    assert first_look(300) == SAMPLES_FOR_P90
    assert first_look(SAMPLES_FOR_P99 - 1) == SAMPLES_FOR_P90
    assert first_look(SAMPLES_FOR_P99) == SAMPLES_FOR_P99


def looks(rule: Settling, samples: list[list[float]], most: int) -> list[int]:
    """After how many calls a rule that never ends looks at the samples."""
    seen = []

    class Watched(list[float]):
        def __len__(self) -> int:
            seen.append(done)
            return super().__len__()

    for done in range(1, most + 1):
        rule.ends(done, [Watched(times) for times in samples])
    return sorted(set(seen))


def test_looks_depend_on_the_number_of_calls_alone() -> None:
    wide = [list(np.linspace(1, 9, 100))]
    assert looks(Settling(SETTLED, 300), wide, 300) == [64, 96, 144, 216]
    assert looks(Settling(SETTLED, 1000), wide, 1000) == [662, 993]
    assert looks(Settling(SETTLED, 60, 30), wide, 60) == [30, 45]
    assert GROWTH == 1.5


def test_it_ends_once_all_medians_are_settled() -> None:
    still, moving = [1.0] * 99, list(np.linspace(1, 2, 99))
    assert not Settling(SETTLED, 300).ends(63, [still, still])
    assert Settling(SETTLED, 300).ends(64, [still, still])
    assert not Settling(SETTLED, 300).ends(64, [still, moving])
    assert not Settling(SETTLED, 300).ends(64, [moving, still])


def test_the_limit_itself_is_settled_and_zero_never_ends() -> None:
    samples = list(np.linspace(1, 1.2, 99))
    assert Settling(spread(samples), 300).ends(99, [samples])
    assert not Settling(spread(samples) * 0.999, 300).ends(99, [samples])
    assert not Settling(0.0, 300).ends(99, [[1.0] * 99])


def test_intervals_of_measurements_that_end_early_still_hold_the_median() -> None:
    rng = np.random.default_rng(1)
    held, ended, errors = 0, 0, []
    for _ in range(300):
        samples = np.exp(0.1 * rng.standard_normal(300))  # the median is 1
        rule, calls = Settling(SETTLED, 300), 3
        while calls < 300 and not rule.ends(calls, [samples[:calls].tolist()]):
            calls += 3
        low, high = bootstrap(samples[:calls], rounds=200)
        held += low <= 1 <= high
        ended += calls < 300
        errors.append(float(np.median(samples[:calls])) - 1)
    assert ended > 200
    assert held >= 0.91 * 300
    assert abs(np.mean(errors)) < 0.002
