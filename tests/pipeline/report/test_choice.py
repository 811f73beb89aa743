"""Which artifact of a target to use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.figures import Latency, Number, State
from pipeline.report.choice import choose
from pipeline.report.model import BuiltArtifact, GateFailure, Run
from pipeline.stages.bench import batch_latency
from pipeline.steps.facts.bench import Measured
from tests.pipeline.report.changed import artifact_of, measured_of

LIMIT = ("top-1 drop", "max_top1_drop", 0.005, 0.2, State.MEASURED)


@pytest.fixture
def both(run: Run) -> list[BuiltArtifact]:
    return [artifact_of(run, "ort/fp32"), artifact_of(run, "ort/int8")]


def timed(run: Run, **medians: float) -> Measured:
    """Measurements with these medians at the first batch size, and others that do not count."""

    def calls(median: float) -> dict[str, Latency]:
        return {"engine": Latency(tuple(median * (1 + 0.01 * (i % 5)) for i in range(50)))}

    first = {name: calls(median) for name, median in medians.items()}
    second = {name: calls(1 / median) for name, median in medians.items()}
    for phases in (first, second):
        phases["pytorch"] = calls(3.0)
    batches = {4: batch_latency(first, "fp32"), 8: batch_latency(second, "fp32")}
    return replace(measured_of(run, "ort"), batches=batches)


def test_the_faster_one_is_chosen_and_says_by_how_much(run: Run, both: list[BuiltArtifact]) -> None:
    found = choose(both, timed(run, fp32=1.0, int8=0.7), [])
    assert found.precision == "int8"
    assert found.why["fp32"].startswith("int8 takes 0.70 (95 %: ")


def test_the_first_stays_where_another_is_slower_or_as_fast(
    run: Run, both: list[BuiltArtifact]
) -> None:
    slower = choose(both, timed(run, fp32=1.0, int8=1.2), [])
    assert (slower.precision, "takes 1.20" in slower.why["int8"]) == ("fp32", True)
    assert choose(both, timed(run, fp32=1.0, int8=1.0), []).precision == "fp32"


def test_nothing_measured_leaves_the_first_and_says_so(both: list[BuiltArtifact]) -> None:
    found = choose(both, None, [])
    assert found.precision == "fp32"
    assert found.why["int8"] == "not shown to be faster than fp32: latency was not measured"


def test_latency_that_is_not_to_be_trusted_decides_nothing(
    run: Run, both: list[BuiltArtifact]
) -> None:
    both = [replace(each, latency_doubt="only 6 calls were timed") for each in both]
    found = choose(both, timed(run, fp32=1.0, int8=0.5), [])
    assert found.precision == "fp32"
    assert found.why["int8"].endswith("latency is not to be trusted: only 6 calls were timed")


def test_calls_of_an_earlier_build_count_for_nothing(run: Run, both: list[BuiltArtifact]) -> None:
    latency = Number.not_measured("bench/ort is of an earlier build of ort/int8", unit="ms")
    both[1] = replace(both[1], latency=latency)
    found = choose(both, timed(run, fp32=1.0, int8=0.5), [])
    assert found.precision == "fp32"
    assert "latency was not measured" in found.why["int8"]


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        ({"failure": "no memory"}, "no memory"),
        ({"built": None}, "was not built"),
        ({"built": None, "selected": False}, "not selected in this run"),
        ({"why_not": "it loses 2 points"}, "and when its graph was made: it loses 2 points"),
    ],
)
def test_one_that_is_not_good_is_not_chosen_however_fast(
    run: Run, both: list[BuiltArtifact], spoiled: dict[str, Any], why: str
) -> None:
    both[1] = replace(both[1], **spoiled)
    found = choose(both, timed(run, fp32=1.0, int8=0.5), [])
    assert found.precision == "fp32"
    assert found.why["int8"].endswith(why)


def test_doubt_is_the_reason_where_nothing_was_measured(both: list[BuiltArtifact]) -> None:
    both[1] = replace(both[1], why_not="it loses 2 points")
    assert choose(both, None, []).why == {"int8": "it loses 2 points"}


def test_time_when_the_graph_was_made_counts_where_no_other_does(
    both: list[BuiltArtifact], run: Run
) -> None:
    both[1] = replace(both[1], why_slow="it takes 1.07 of the time of float32")
    assert choose(both, None, []).why == {"int8": "it takes 1.07 of the time of float32"}
    found = choose(both, timed(run, fp32=1.0, int8=0.9), [])
    assert found.precision == "int8"
    assert found.why["fp32"].startswith("int8 takes 0.90 (95 %: ")
    slower = choose(both, timed(run, fp32=1.0, int8=1.2), [])
    assert slower.why["int8"].endswith(") of the time of fp32")


def test_a_gate_that_does_not_hold_rules_out(run: Run, both: list[BuiltArtifact]) -> None:
    failure = GateFailure("ort", "fp32", *LIMIT)
    found = choose(both, timed(run, fp32=1.0, int8=1.2), [failure])
    assert found.precision == "int8"
    assert found.why == {
        "fp32": "a gate does not hold: top-1 drop is 0.2, max_top1_drop allows 0.005 (measured)"
    }
    assert choose(both[:1], None, [failure]).precision is None


def approximating(artifact: BuiltArtifact, agreement: float | None) -> BuiltArtifact:
    built = artifact.built
    assert built is not None
    facts = replace(built.facts, more={"approximates": "gelu: tanh"})
    number = (
        Number.not_measured("not run yet")
        if agreement is None
        else Number(agreement, State.MEASURED, by="x", samples=10_000)
    )
    accuracy = replace(artifact.accuracy, agreement=number)
    return replace(artifact, built=replace(built, facts=facts), accuracy=accuracy)


@pytest.mark.parametrize(
    ("agreement", "told"),
    [
        (1.0, ""),
        (0.9999, "gelu: tanh gives 1 of 10000 validation images another class than PyTorch"),
        (None, ""),
    ],
)
def test_a_form_that_approximates_has_to_keep_every_class(
    run: Run, both: list[BuiltArtifact], agreement: float | None, told: str
) -> None:
    slower, faster = timed(run, fp32=1.0, int8=1.2), timed(run, fp32=1.0, int8=0.5)
    first = [approximating(both[0], agreement), both[1]]
    found = choose(first, slower, [])
    assert (found.precision, found.why.get("fp32", "")) == ("fp32", told)
    found = choose(first, faster, [])
    assert found.precision == "int8"
    assert found.why["fp32"].startswith("int8 takes 0.50")
    assert found.why["fp32"].endswith(told)
    second = choose([both[0], approximating(both[1], agreement)], faster, [])
    assert second.precision == ("fp32" if told else "int8")
    assert told in "".join(second.why.values())


def test_gates_of_others_rule_out_nothing(run: Run, both: list[BuiltArtifact]) -> None:
    others = [GateFailure("ort", "fp32-more", *LIMIT), GateFailure("trt", "fp32", *LIMIT)]
    assert choose(both, timed(run, fp32=1.0, int8=1.2), others).precision == "fp32"


def test_a_build_without_files_was_not_built(both: list[BuiltArtifact], run: Run) -> None:
    assert both[0].built is not None
    both[0] = replace(both[0], built=replace(both[0].built, files={}))
    found = choose(both, timed(run, fp32=0.5, int8=1.0), [])
    assert (found.precision, found.why) == ("int8", {"fp32": "was not built"})


def test_a_precision_without_calls_was_not_measured(both: list[BuiltArtifact], run: Run) -> None:
    measured = timed(run, fp32=1.0, int8=0.5)
    first = measured.batches[4]
    calls = {**first.samples_ms, "int8": ()}
    batches = {**measured.batches, 4: replace(first, samples_ms=calls)}
    found = choose(both, replace(measured, batches=batches), [])
    assert found.precision == "fp32"
    assert "latency was not measured" in found.why["int8"]


def test_a_doubt_that_is_slower_says_both(both: list[BuiltArtifact], run: Run) -> None:
    both[1] = replace(both[1], why_not="it loses 2 points")
    found = choose(both, timed(run, fp32=1.0, int8=1.2), [])
    why = found.why["int8"]
    assert why.startswith("takes 1.20 (95 %: ")
    assert why.endswith(") of the time of fp32, and when its graph was made: it loses 2 points")
