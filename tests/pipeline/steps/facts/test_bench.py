from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Latency, Number, Throughput
from pipeline.core.machine import Machine
from pipeline.core.runner import DeviceState
from pipeline.core.timing import Protocol
from pipeline.stages.bench import batch_latency
from pipeline.steps.facts.bench import BenchFacts, EndToEnd, Measured


def calls(*milliseconds: float) -> dict[str, Latency]:
    return {"engine": Latency(milliseconds), "copies": Latency((9.0,))}


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
