from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, Gates
from pipeline.core.figures import Number, State
from pipeline.core.runner import Numerics
from pipeline.report.gates import Limit, judge_all, limits_of
from pipeline.report.model import BuiltArtifact, Run
from pipeline.steps.facts.accuracy import Accuracy, ByClass, ModuleRange
from tests.pipeline.report.changed import artifact_of
from tests.pipeline.report.making import configured


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configured(tmp_path, "min_agreement: 0.9, max_top1_drop: 0.1, max_latency_ms: 0.8")


def measured(value: float, unit: str = "") -> Number:
    return Number(value, State.MEASURED, unit=unit, by="x")


@pytest.fixture
def artifact(run: Run) -> BuiltArtifact:
    fp32 = artifact_of(run, "ort/fp32")
    accuracy = replace(fp32.accuracy, agreement=measured(0.95), top1_drop=measured(0.05))
    return replace(fp32, accuracy=accuracy, latency=measured(0.7, "ms"))


def test_limits_that_hold(config: Config, artifact: BuiltArtifact) -> None:
    found = judge_all(config, [artifact])
    assert (found.limits, found.judged, found.failures) == (3, 3, ())


def test_latency_that_is_not_to_be_trusted_is_not_judged(
    config: Config, artifact: BuiltArtifact
) -> None:
    slow = replace(artifact, latency=measured(9.0, "ms"), latency_doubt="only 6 calls were timed")
    found = judge_all(config, [slow])
    assert (found.limits, found.judged, found.failures) == (3, 2, ())


def test_limits_hold_where_they_are_met_exactly(config: Config, artifact: BuiltArtifact) -> None:
    accuracy = replace(artifact.accuracy, agreement=measured(0.9), top1_drop=measured(0.1))
    exact = replace(artifact, accuracy=accuracy, latency=measured(0.8, "ms"))
    assert judge_all(config, [exact]).failures == ()


def test_every_limit_that_does_not_hold_is_told(config: Config, artifact: BuiltArtifact) -> None:
    accuracy = replace(artifact.accuracy, agreement=measured(0.89), top1_drop=measured(0.11))
    bad = replace(artifact, accuracy=accuracy, latency=measured(0.81, "ms"))
    found = judge_all(config, [artifact, bad])
    assert (found.limits, found.judged) == (6, 6)
    assert [str(failure) for failure in found.failures] == [
        "ort/fp32: top-1 drop is 0.11, max_top1_drop allows 0.1 (measured)",
        "ort/fp32: agreement is 0.89, min_agreement allows 0.9 (measured)",
        "ort/fp32: latency in ms is 0.81, max_latency_ms allows 0.8 (measured)",
    ]
    failure = found.failures[2]
    assert (failure.target, failure.precision, failure.limit, failure.value, failure.state) == (
        "ort",
        "fp32",
        0.8,
        0.81,
        State.MEASURED,
    )


@pytest.mark.parametrize("gates", [Gates(max_top1_drop=0.5), Gates(min_agreement=0.5)])
def test_a_figure_that_is_no_number_fails(artifact: BuiltArtifact, gates: Gates) -> None:
    accuracy = replace(
        artifact.accuracy, agreement=measured(math.nan), top1_drop=measured(math.nan)
    )
    (limit,) = limits_of(gates, replace(artifact, accuracy=accuracy))
    assert not limit.holds


def test_what_was_not_measured_fails_nothing_and_counts_as_unjudged(
    config: Config, artifact: BuiltArtifact
) -> None:
    unknown = replace(artifact, latency=Number.not_measured("no GPU", unit="ms"))
    found = judge_all(config, [unknown])
    assert (found.limits, found.judged, found.failures) == (3, 2, ())
    assert all(limit.holds for limit in limits_of(Gates(max_latency_ms=1), unknown))


def test_a_limit_that_is_not_set_is_none(artifact: BuiltArtifact) -> None:
    assert list(limits_of(Gates(), artifact)) == []
    (limit,) = limits_of(Gates(max_latency_ms=1), artifact)
    assert (limit.gate, limit.allowed, limit.number) == ("max_latency_ms", 1, artifact.latency)


def test_a_network_that_leaves_float16_itself_is_the_cause(
    config: Config, artifact: BuiltArtifact
) -> None:
    layers = ModuleRange(1e14, "stem", "stem", 32)
    accuracy = replace(artifact.accuracy, agreement=measured(0.0))
    bad = replace(artifact, accuracy=accuracy, latency=measured(9, "ms"))
    overflowed = replace(bad, numerics=Numerics(3, ("stem",)))
    lines = [str(failure) for failure in judge_all(config, [bad, overflowed], layers).failures]
    told = "the network itself leaves the range of float16: 1e+14 at stem, first at stem"
    assert [told in line for line in lines] == [False, False, True, False]
    inside = replace(layers, largest=60_000.0, first_beyond="")
    assert told not in str(judge_all(config, [overflowed], inside).failures)


def test_an_overflow_that_nothing_explains_is_told_without_a_cause(
    config: Config, artifact: BuiltArtifact
) -> None:
    accuracy = replace(artifact.accuracy, agreement=measured(0.0))
    overflowed = replace(artifact, accuracy=accuracy, numerics=Numerics(3, ("stem",)))
    (failure,) = judge_all(config, [overflowed]).failures
    assert str(failure) == "ort/fp32: agreement is 0, min_agreement allows 0.9 (measured)"


def within(value: float, low: float, high: float, samples: int = 100) -> Number:
    return Number(value, State.MEASURED, by="x", samples=samples, interval=(low, high))


@pytest.mark.parametrize(
    ("drop", "in_doubt"),
    [
        (within(0.004, 0.001, 0.0049), False),
        (within(0.004, -0.01, 0.02), True),
        (within(0.006, -0.01, 0.02), True),
        (within(0.006, 0.0051, 0.02), False),
        (within(math.nan, -0.01, 0.02), False),
        (measured(0.006), False),
    ],
)
@pytest.mark.parametrize("undecided", ["point", "fail", "pass"])
def test_a_limit_inside_of_the_interval_cannot_be_told(
    undecided: Any, drop: Number, in_doubt: bool, artifact: BuiltArtifact
) -> None:
    """Half a point on 100 images was a coin toss that looked like a verdict."""
    odd = replace(artifact, accuracy=replace(artifact.accuracy, top1_drop=drop))
    (limit,) = limits_of(Gates(max_top1_drop=0.005, undecided=undecided), odd)
    assert bool(limit.doubt) == in_doubt
    if in_doubt:
        assert limit.doubt == "cannot be told with 100 images (95 %: -0.01 to 0.02)"
        assert limit.passes == {"point": limit.holds, "fail": False, "pass": True}[undecided]
    else:
        assert limit.passes == limit.holds


def test_the_figure_itself_counts_where_nothing_else_is_said() -> None:
    for drop, passes in ((0.004, True), (0.006, False)):
        limit = Limit("top-1 drop", "max_top1_drop", 0.005, True, within(drop, -0.01, 0.02))
        assert limit.doubt
        assert limit.passes == passes


def test_a_lower_limit_in_doubt_is_told_and_fails_by_choice(
    tmp_path: Path, artifact: BuiltArtifact
) -> None:
    odd = replace(
        artifact, accuracy=replace(artifact.accuracy, agreement=within(0.95, 0.88, 0.98, 64))
    )
    lenient = judge_all(configured(tmp_path, "min_agreement: 0.9"), [odd])
    assert lenient.failures == ()
    (doubt,) = lenient.doubts
    assert not doubt.fails
    assert str(doubt) == (
        "ort/fp32: agreement is 0.95, min_agreement allows 0.9; cannot be told with 64 images "
        "(95 %: 0.88 to 0.98)"
    )
    strict = judge_all(configured(tmp_path, "min_agreement: 0.9, undecided: fail"), [odd])
    assert "cannot be told with 64 images" in str(strict.failures[0])
    assert strict.doubts[0].fails


def with_own(artifact: BuiltArtifact) -> BuiltArtifact:
    worst = ByClass("oak", within(0.6, 0.5, 0.7, 20), {"oak": 0.6, "fir": 0.9})
    metrics = {"f1": within(0.8, 0.79, 0.81), "cost": measured(3.0)}
    return replace(artifact, accuracy=replace(artifact.accuracy, by_class=worst, metrics=metrics))


@pytest.mark.parametrize(
    ("gates", "told"),
    [
        ({"min_worst_class": 0.75}, "top-1 of oak is 0.6, min_worst_class allows 0.75 (measured)"),
        ({"metrics": {"f1": {"min": 0.82}}}, "f1 is 0.8, metrics.f1.min allows 0.82 (measured)"),
        ({"metrics": {"cost": {"max": 2}}}, "cost is 3, metrics.cost.max allows 2 (measured)"),
        ({"metrics": {"f1": {"min": 0.1, "max": 0.7}}}, "metrics.f1.max allows 0.7"),
        (
            {"metrics": {"f2": {"min": 0.1}}},
            "f2 (validation.metrics gives no such number; known are f1, cost) is nan",
        ),
    ],
)
def test_own_measures_are_judged_like_ours(
    gates: dict[str, Any], told: str, artifact: BuiltArtifact
) -> None:
    failing = [
        x for x in limits_of(Gates.model_validate(gates), with_own(artifact)) if not x.passes
    ]
    assert len(failing) == 1
    assert told in str(failing[0].failure(artifact))


def limited(**limits: Any) -> Gates:
    """Gates as a configuration states them."""
    return Gates.model_validate(limits)


def test_own_measures_that_hold(artifact: BuiltArtifact) -> None:
    gates = limited(min_worst_class=0.4, metrics={"f1": {"min": 0.7}, "cost": {"min": 1, "max": 3}})
    limits = list(limits_of(gates, with_own(artifact)))
    assert len(limits) == 4
    assert all(limit.passes and not limit.doubt for limit in limits)


def test_own_measures_are_in_doubt_like_ours(artifact: BuiltArtifact) -> None:
    gates = limited(min_worst_class=0.55, metrics={"f1": {"min": 0.8}}, undecided="fail")
    worst, f1 = limits_of(gates, with_own(artifact))
    assert "cannot be told with 20 images" in worst.doubt
    assert f1.doubt
    assert not worst.passes
    assert worst.in_doubt(artifact).figure == "top-1 of oak"


def test_what_was_not_validated_has_no_own_measures_to_judge(artifact: BuiltArtifact) -> None:
    unknown = replace(artifact, accuracy=Accuracy.not_measured("no GPU"))
    gates = limited(min_worst_class=0.5, metrics={"f1": {"min": 0.8}})
    assert list(limits_of(gates, unknown)) == []
