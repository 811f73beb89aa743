from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.answers import Answers, Audit
from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Latency, Number, Ratio, State, Throughput
from pipeline.core.machine import Machine
from pipeline.core.runner import DeviceState
from pipeline.core.timing import Protocol
from pipeline.stages.bench import batch_latency
from pipeline.steps.facts.bench import BenchFacts, EndToEnd, Measured, Memory, Sustained


def calls(*milliseconds: float) -> dict[str, Latency]:
    return {"engine": Latency(milliseconds), "copies": Latency((9.0,))}


def lasting() -> Sustained:
    summary = Latency((1.0, 2.0)).summary()
    answers = Answers(why_not="nothing judged it")
    drift = Ratio(1.1, (1.05, 1.15))
    return Sustained(600.0, summary, 50.0, (1.0, 1.1), drift, answers, 0.1, "too hot")


@pytest.fixture
def measured() -> Measured:
    timed = {"fp16": calls(3.0, 1.0, 2.0), "pytorch": calls(6.0, 4.0, 5.0)}
    return Measured(
        protocol=Protocol(1, 3, 2.0),
        machine=Machine("CPU", 2, "OS", {"memory_gib": 4}),
        load_before=0.1,
        date="2026-01-02",
        batches={8: batch_latency(timed, "fp16"), 1: batch_latency(timed, "fp16")},
        end_to_end=EndToEnd(8, {"fp16": Latency((7.0,)).summary()}),
        cold_start_ms={"fp16": 12.5},
        throughput={"fp16": (Throughput(8, 1.0, None, 8000.0),)},
        device_state={"fp16": DeviceState(("heat",), {"memory": 3})},
        devices={"fp16": "a GPU", "pytorch": "a CPU"},
        distinct=64,
        load_during=0.2,
        rivals=1,
        answers={"fp16": Answers(32, 0, 1e-6)},
        repeated={"fp16": Audit(60, Ratio(1.0, (0.95, 1.05)))},
        memory={"fp16": Memory(Number(3e6, State.MEASURED, unit="bytes", by="a GPU"), 1000)},
        sustained={"fp16": lasting()},
    )


def read(facts: dict[str, Any]) -> BenchFacts:
    return BenchFacts.from_facts(json.loads(json.dumps(facts)), "bench/trt")


def test_a_measurement_survives_json(measured: Measured) -> None:
    facts = BenchFacts("trt", {"fp16": measured.headline("fp16")}, measured, {"tables": [1]})
    assert read(facts.to_facts()) == facts
    assert facts.to_facts()["tables"] == [1]
    assert set(facts.to_facts()["batches"]) == {"8", "1"}


def test_where_nothing_was_measured_the_reason_survives() -> None:
    facts = BenchFacts("trt", {"fp16": Number.not_measured("no GPU", unit="ms")})
    assert read(facts.to_facts()) == facts
    assert set(facts.to_facts()) == {"target", "latency"}


def test_the_first_batch_of_the_configuration_stands_for_an_artifact(measured: Measured) -> None:
    assert measured.first_batch == 8
    assert measured.samples_ms["fp16"] == (3.0, 1.0, 2.0)
    headline = measured.headline("fp16")
    assert (headline.value, headline.by, headline.samples) == (2.0, "a GPU", 3)
    assert headline.interval is not None


def test_ratios_are_of_the_engines_time(measured: Measured) -> None:
    latency = measured.batches[1]
    assert latency.ratio_to_pytorch["fp16"].value == pytest.approx(0.4)
    assert latency.ratio_to_baseline["pytorch"].value == pytest.approx(2.5)
    assert latency.phases["fp16"]["copies"].p50 == 9.0


def test_an_end_to_end_latency_without_its_batch_is_refused(measured: Measured) -> None:
    facts = BenchFacts("trt", {}, measured).to_facts()
    facts["end_to_end"] = facts["end_to_end"]["latency"]
    with pytest.raises(ArtifactError, match=r"bench/trt: measured\.end_to_end\."):
        read(facts)


def test_earlier_results_have_less_and_are_read(measured: Measured) -> None:
    facts = BenchFacts("trt", {}, measured).to_facts()
    for name in ("distinct", "load_during", "rivals", "answers", "repeated", "memory", "sustained"):
        del facts[name]
    found = read(facts).measured
    assert found is not None
    assert (found.distinct, found.load_during, found.answers, found.memory) == (1, None, {}, {})
    assert found.doubt("fp16") == "only 3 calls were timed, and 30 are needed"


def many(measured: Measured, calls: int) -> Measured:
    timed = {name: {"engine": Latency((1.0,) * calls)} for name in ("fp16", "pytorch")}
    return replace(measured, batches={1: batch_latency(timed, "fp16")})


WRONG = Answers(32, 3, 0.9)
REMEMBERED = Audit(60, Ratio(0.5, (0.4, 0.6)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"load_before": 1.1}, "other processes kept 1.1 of 2 CPUs busy"),
        ({"load_during": 1.2}, "other processes kept 1.2 of 2 CPUs busy"),
        ({"load_during": 1.0}, ""),
        (
            {"answers": {"fp16": WRONG}},
            "3 of 32 answers of timed calls are not those of the validation",
        ),
        (
            {"repeated": {"fp16": REMEMBERED}},
            "one image again and again takes 0.50 of the time of distinct ones: answers are "
            "remembered",
        ),
        ({"answers": {"pytorch": WRONG}, "repeated": {"pytorch": REMEMBERED}}, ""),
    ],
)
def test_what_is_against_a_measurement_is_against_its_percentiles(
    measured: Measured, changes: dict[str, Any], why: str
) -> None:
    found = replace(many(measured, 662), **changes)
    assert found.doubt("fp16") == why
    expected = f"invalid: {why}" if why else "valid"
    assert found.validity("fp16", 1) == {"p90": expected, "p99": expected}


@pytest.mark.parametrize(
    ("calls", "p90", "p99"),
    [
        (63, "invalid: 63 calls, and 64 are needed", "invalid: 63 calls, and 662 are needed"),
        (64, "valid", "invalid: 64 calls, and 662 are needed"),
        (662, "valid", "valid"),
    ],
)
def test_percentiles_need_calls(measured: Measured, calls: int, p90: str, p99: str) -> None:
    assert many(measured, calls).validity("fp16", 1) == {"p90": p90, "p99": p99}


def test_several_reasons_are_all_told(measured: Measured) -> None:
    found = replace(many(measured, 10), load_before=2.0)
    assert found.validity("pytorch", 1)["p90"] == (
        "invalid: 10 calls, and 64 are needed; other processes kept 2.0 of 2 CPUs busy"
    )
