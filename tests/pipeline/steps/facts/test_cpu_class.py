"""Facts of a class of CPUs survive being written down, and are read strictly."""

from __future__ import annotations

import json

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Number, Ratio, State
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass

TOP1 = Number(0.9, State.RESTRICTED, by="ort, restricted to AVX2", samples=10)
FACTS = ClassFacts(
    "ort",
    "avx2",
    "AVX2",
    "Intel i9-9900",
    artifacts={"int8": OnClass(Accuracy(TOP1, TOP1), TOP1, TOP1, Ratio(0.5, (0.4, 0.6)))},
    busy=0.2,
    cpus=4,
    samples_ms={"int8": (1.0, 2.0)},
)


def test_what_is_written_is_read_back() -> None:
    written = json.loads(json.dumps(FACTS.to_facts()))
    assert written["artifacts"]["int8"]["accuracy"]["top1"]["state"] == "measured here, restricted"
    assert ClassFacts.from_facts(written, "test") == FACTS


def test_another_state_is_refused() -> None:
    written = FACTS.to_facts()
    written["artifacts"]["int8"]["latency"]["state"] = "guessed"
    with pytest.raises(ArtifactError, match=r"artifacts\.int8\.latency\.state"):
        ClassFacts.from_facts(written, "test")
