from __future__ import annotations

import math

import pytest

from pipeline.report.compare import ChangedImage, Compared, Pair, mcnemar


def pair(**changes: object) -> Pair:
    values: dict[str, object] = {
        "name": "ort/int8",
        "only_in": "",
        "top1": (0.9, 0.8),
        "why_not": "",
        "drop": 0.1,
        "interval": (0.02, 0.18),
        "p_value": 0.01,
        "changed": (),
        "size": (2_000_000, 1_000_000),
        "latency": (None, None),
        "states": ("measured", "measured"),
    }
    return Pair(**{**values, **changes})  # type: ignore[arg-type]


def compared(*pairs: Pair, **changes: object) -> Compared:
    values: dict[str, object] = {
        "baseline": "engines/a",
        "new": "engines/b",
        "pairs": pairs,
        "versions": {},
        "machines": ("x", "x"),
    }
    return Compared(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (3, 9), (9, 3), (10, 10)])
def test_mcnemar_is_the_binomial_test_of_a_fair_coin(lost: int, won: int) -> None:
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_holds_for_a_whole_validation_set() -> None:
    assert mcnemar(20_000, 20_000) == pytest.approx(1.0)
    assert 0 < mcnemar(600, 500) < 0.01
    assert mcnemar(3000, 0) == 0.0


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "worse"),
        ({"interval": (-0.2, -0.01), "drop": -0.1}, "better"),
        ({"interval": (-0.01, 0.02)}, "the same"),
        (
            {"interval": (-0.01, 0.02), "changed": (ChangedImage(0, "a", "x", "x", "y"),)},
            "not proven",
        ),
        ({"drop": None, "interval": None}, "cannot be told"),
        ({"only_in": "new"}, "only in the new run"),
    ],
)
def test_only_what_is_proven_is_a_verdict(changes: dict[str, object], verdict: str) -> None:
    assert pair(**changes).verdict == verdict


def test_regressions_are_what_is_proven_worse_or_gone() -> None:
    found = compared(
        pair(),
        pair(name="trt/fp16", interval=(-0.01, 0.2)),
        pair(name="coreml/fp16", only_in="baseline", drop=None, interval=None),
        pair(name="ort/fp32", only_in="new", drop=None, interval=None),
    )
    assert found.regressions == [
        "ort/int8 lost 10.00 points of top-1 (2.00 to 18.00)",
        "coreml/fp16 is gone",
    ]


@pytest.mark.parametrize(
    ("before", "after", "effect"), [("x", "y", "lost"), ("y", "x", "won"), ("y", "z", "")]
)
def test_an_answer_is_won_lost_or_wrong_as_before(before: str, after: str, effect: str) -> None:
    assert ChangedImage(0, "a.png", "x", before, after).effect == effect
