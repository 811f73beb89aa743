"""Squared errors of many ways to quantize, against those that are computed bin by bin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from calibration.histogram import Doubles, Histogram
from calibration.ranges import (
    ACTIVATIONS_INT8,
    ACTIVATIONS_UINT8,
    FLOAT8_E4M3,
    Range,
    Scheme,
    best_range,
    quantization,
)
from calibration.squares import SquaredErrors

Draw = Callable[[np.random.Generator], Doubles]

DRAWS: dict[str, Draw] = {
    "normal": lambda rng: rng.standard_normal(20000),
    "one side": lambda rng: np.maximum(rng.standard_normal(20000), 0),
    "heavy tails": lambda rng: rng.standard_t(2, 20000),
    "far from zero": lambda rng: rng.uniform(3, 5, 20000),
    "below zero": lambda rng: -rng.uniform(3, 5, 20000),
    "few values": lambda rng: rng.choice([-0.25, 0.0, 0.5, 1.0], 20000),
    "three values": lambda rng: rng.standard_normal(3),
    "tiny": lambda rng: 1e-30 * rng.standard_normal(20000),
    "too large to square": lambda rng: 1e200 * rng.standard_normal(20000),
}


def seen(draw: Draw) -> Histogram:
    histogram = Histogram()
    histogram.add(draw(np.random.default_rng(0)))
    return histogram


def ends_of(histogram: Histogram) -> Doubles:
    """Ranges that differ by much and by next to nothing."""
    shares = np.concatenate([np.linspace(1, 0.05, 24), np.linspace(0.5, 0.5001, 24)])
    ends = [(histogram.low * a, histogram.high * b) for a in shares[::2] for b in shares[1::2]]
    return np.array([each for each in ends if each[0] <= each[1]])


@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8, FLOAT8_E4M3])
@pytest.mark.parametrize("name", DRAWS)
def test_the_best_range_is_the_first_with_the_smallest_error(name: str, scheme: Scheme) -> None:
    histogram = seen(DRAWS[name])
    errors, ends = SquaredErrors(histogram), ends_of(histogram)

    def error(candidate: Range) -> float:
        rounded = quantization(candidate, scheme).round_trip(errors.centres)
        return float((errors.weights * (rounded - errors.centres) ** 2).sum())

    with np.errstate(over="ignore", invalid="ignore"):
        expected = min((Range(*each) for each in ends.tolist()), key=error)
        assert best_range(errors, scheme, ends) == expected


@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8])
@pytest.mark.parametrize("name", [name for name in DRAWS if name != "too large to square"])
def test_few_ways_are_left_and_the_best_is_among_them(name: str, scheme: Scheme) -> None:
    histogram = seen(DRAWS[name])
    errors = SquaredErrors(histogram)
    ways = [
        quantization(Range(histogram.low * share, histogram.high * share), scheme)
        for share in np.linspace(1, 0.05, 96)
    ]
    exact = [errors.exact(way.round_trip(errors.centres)) for way in ways]
    scales = np.array([way.scale for way in ways])
    zeros = np.array([float(way.zero_point) for way in ways])
    left = errors.may_be_best(scales, zeros, scheme.limits)
    assert int(np.argmin(exact)) in left
    assert len(left) <= 3


def test_a_function_is_applied_before_values_are_compared() -> None:
    histogram = seen(DRAWS["normal"])
    errors = SquaredErrors(histogram, np.exp)
    assert np.array_equal(errors.wanted, np.exp(errors.centres))
    rounded = np.round(errors.centres)
    expected = (errors.weights * (np.exp(rounded) - np.exp(errors.centres)) ** 2).sum()
    assert errors.exact(rounded) == expected
    ways = [quantization(Range(-high, high), ACTIVATIONS_UINT8) for high in np.linspace(1, 5, 40)]
    exact = [errors.exact(way.round_trip(errors.centres)) for way in ways]
    scales = np.array([way.scale for way in ways])
    zeros = np.array([float(way.zero_point) for way in ways])
    assert errors.may_be_best(scales, zeros, (0, 255)).tolist() == [int(np.argmin(exact))]


def test_ways_that_are_equally_good_all_stay() -> None:
    errors = SquaredErrors(seen(DRAWS["normal"]))
    scales, zeros = np.full(3, 0.02, np.float32), np.array([100.0, 100.0, 100.0])
    assert errors.may_be_best(scales, zeros, (0, 255)).tolist() == [0, 1, 2]
