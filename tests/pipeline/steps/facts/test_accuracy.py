from __future__ import annotations

import dataclasses
import json

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Number, State
from pipeline.core.runner import Numerics
from pipeline.steps.facts.accuracy import Accuracy, ReferenceFacts, ValidationFacts

HALF = Number(0.5, State.MEASURED, by="x", samples=10, interval=(0.2, 0.8))


def test_facts_survive_json() -> None:
    numerics = Numerics(3, ("head: Div y",), {"headroom": 0.5})
    facts = ValidationFacts("trt", "fp16", Accuracy(HALF, HALF, agreement=HALF), numerics)
    assert ValidationFacts.from_facts(json.loads(json.dumps(facts.to_facts())), "x") == facts
    reference = ReferenceFacts(Accuracy(HALF, HALF))
    assert ReferenceFacts.from_facts(json.loads(json.dumps(reference.to_facts())), "x") == reference


def test_what_was_not_measured_has_one_reason_for_every_figure() -> None:
    accuracy = Accuracy.not_measured("no GPU")
    found = {field.name: getattr(accuracy, field.name) for field in dataclasses.fields(accuracy)}
    assert (found.pop("by_class"), found.pop("metrics")) == (None, {})
    assert {figure.why for figure in found.values()} == {"no GPU"}


def test_facts_without_an_accuracy_are_refused() -> None:
    with pytest.raises(ArtifactError, match="validate/x: numbers: Field required"):
        ValidationFacts.from_facts({"target": "trt", "precision": "fp16"}, "validate/x")
