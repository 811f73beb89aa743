from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import RangeRow
from pipeline.core.network import Network
from pipeline.core.plain import Facts
from pipeline.steps.facts.graphs import (
    BuildFacts,
    CalibrationFacts,
    ExportFacts,
    FormFacts,
    SimplifyFacts,
    TriedCompression,
)

NETWORK = Network("net", ("a", "b"), (3, 8, 8), {"size": 8})
ROW = RangeRow("conv", (-1.0, 2.0), (-1.0, 1.0), 0.3, False, (1, 2))
MIX = TriedCompression(900, 0.01, {"int8": 4})


@pytest.mark.parametrize(
    "facts",
    [
        ExportFacts(240, 20, 3e-7, NETWORK, "care.safetensors"),
        SimplifyFacts(False, "onnxsim crashed", 240, 240, NETWORK),
        CalibrationFacts(512, "ab", ("few images",)),
        FormFacts(NETWORK, "too slow", (ROW,), {"casts": 2}),
        BuildFacts("trt", "fp16", ("w",), (ROW,), (MIX, MIX), MIX, ("line",), (), {"library": "x"}),
        BuildFacts("trt", "fp16", workarounds=("took the graph before onnxsim",)),
    ],
)
def test_facts_survive_json(facts: Facts) -> None:
    plain = json.loads(json.dumps(facts.to_facts()))
    assert type(facts).from_facts(plain, "x") == facts


def test_what_a_target_tells_beside_is_kept() -> None:
    told: dict[str, Any] = {"target": "ort", "precision": "fp32", "passes": [{"name": "elu"}]}
    assert BuildFacts.from_facts(told, "ort/fp32").more == {"passes": [{"name": "elu"}]}


def test_a_fact_of_another_type_is_refused() -> None:
    plain = {**ExportFacts(240, 20, 3e-7, NETWORK).to_facts(), "nodes": "many"}
    with pytest.raises(ArtifactError, match="export: nodes: Input should be a valid integer"):
        ExportFacts.from_facts(plain, "export")


def test_a_network_is_stated_with_its_description() -> None:
    network = Network("net", ("a",), (3, 8, 8), {}, {"licence": "Apache-2.0"})
    stated = ExportFacts(1, 20, 0.0, network).to_facts()["network"]
    assert stated["description"] == {"licence": "Apache-2.0"}
