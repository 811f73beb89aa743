from __future__ import annotations

import pytest

from pipeline.core.figures import Number, State
from pipeline.report import text

MISSING = Number.not_measured("no GPU")


def measured(value: float, interval: tuple[float, float] | None = None) -> Number:
    return Number(value, State.MEASURED, by="x", interval=interval)


def test_shares() -> None:
    number = measured(0.98765, (0.98, 0.9912))
    assert text.percent(number) == "98.77 %"
    assert text.percent(number, 0) == "99 %"
    assert text.percent_interval(number) == "98.00 to 99.12 %"
    assert text.percent(MISSING) == "not measured"
    assert text.percent_interval(MISSING) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0125, "1.25 points"),
        (-0.0125, "\N{MINUS SIGN}1.25 points"),
        (-0.00001, "0.00 points"),
        (0.0, "0.00 points"),
    ],
)
def test_differences_have_a_true_minus_and_none_before_zero(value: float, words: str) -> None:
    assert text.points(measured(value)) == words


def test_intervals_of_differences() -> None:
    interval = text.points_interval(measured(0.0, (-0.01, 0.02)))
    assert interval == "\N{MINUS SIGN}1.00 to 2.00 points"
    assert text.points_interval(measured(0.0)) == ""
    assert text.points(MISSING) == "not measured"


def test_latencies() -> None:
    number = measured(1.236, (1.2, 1.3))
    assert text.milliseconds(number) == "1.24 ms"
    assert text.milliseconds_interval(number) == "1.20 to 1.30 ms"
    assert text.milliseconds(MISSING) == "not measured"
    assert text.milliseconds_interval(MISSING) == ""


def test_sizes() -> None:
    assert text.size(2_345_678) == "2.35 MB"
    assert text.size(0) == "-"
