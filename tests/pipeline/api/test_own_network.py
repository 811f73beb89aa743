"""A network of the user's own, from a module in the working directory, through a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from care import checkpoint
from pipeline.core.errors import ConfigError
from pipeline.steps.step import StageResult, State

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, branches=False, classes=10):
        super().__init__()
        self.branches = branches
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.body(x)).mean((2, 3))
        if self.branches and x.sum() > 0:
            x = -x
        return self.head(x)
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    (tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield {
        "name": "mine",
        "output": tmp_path / "engines",
        "model": {"module": "own_nets:Net", "checkpoint": "own"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "preprocess": {"size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
        "targets": {"ort": {"precisions": ["fp32"]}},
        "validation": {"images": 8},
    }
    sys.modules.pop("own_nets", None)


class Ended(pipeline.Observer):
    def __init__(self) -> None:
        self.results: dict[str, StageResult] = {}

    def finished(self, result: StageResult) -> None:
        self.results[result.name] = result


STAGES = ("export", "simplify", "precision", "build", "validate")


def test_a_module_goes_through_a_run_and_its_code_is_part_of_the_key(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    results = pipeline.run(settings, only=STAGES)
    (row,) = results.table()
    assert row["failure"] == ""
    assert row["agreement"] == 1.0

    weights = {k: -v for k, v in _net().state_dict().items()}
    checkpoint.save(tmp_path / "mine.safetensors", weights)
    other = {**settings, "model": {**settings["model"], "checkpoint": "mine.safetensors"}}
    ended = Ended()
    pipeline.run(other, only=("export",), observer=ended)
    assert ended.results["export"].state is State.DONE

    ended = Ended()
    pipeline.run(other, only=("export",), observer=ended)
    assert ended.results["export"].state is State.UP_TO_DATE
    (tmp_path / "own_nets.py").write_text(NETS + "\n# another version\n")
    pipeline.run(other, only=("export",), observer=ended)
    assert "the code of model.module" in ended.results["export"].why


METRICS = """
import own_parts

def measure(logits, labels):
    return {"right": own_parts.FACTOR * (logits.argmax(1) == labels).mean(), "images": len(labels)}
"""


def test_measures_of_ones_own_are_judged_and_part_of_the_key(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "own_metrics.py").write_text(METRICS)
    (tmp_path / "own_parts.py").write_text("FACTOR = 1\n")
    gates = {"metrics": {"images": {"min": 9}}, "min_worst_class": 0.0}
    validation = {"images": 8, "metrics": "own_metrics:measure", "gates": gates}
    own = {**settings, "validation": validation}
    results = pipeline.run(own, only=STAGES)
    (row,) = results.table()
    assert results.exit_code == 1
    assert [failure.gate for failure in results.run.gates.failures] == ["metrics.images.min"]
    assert results.run.gates.limits == 2
    assert row["metrics.images"] == 8.0
    assert row["metrics.right"] == row["top1"]
    reference = results.run.pytorch
    assert reference.metrics["right"].value == reference.top1.value
    assert row["worst_class"] in reference.by_class.classes  # type: ignore[union-attr]
    report = (tmp_path / "engines/mine/report.md").read_text()
    assert "worst class: " in report

    (tmp_path / "own_parts.py").write_text("FACTOR = 2\n")
    ended = Ended()
    for name in ("own_metrics", "own_parts"):
        sys.modules.pop(name, None)
    (row,) = pipeline.run(own, only=STAGES, observer=ended).table()
    assert ended.results["export"].state is State.UP_TO_DATE
    for name in ("validate/pytorch", "validate/ort-fp32"):
        assert "the code of validation.metrics" in ended.results[name].why
    assert row["metrics.right"] == 2 * row["top1"]


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"metrics": "nothing:measure"}, "validation.metrics: there is no module nothing"),
        ({"metrics": "nothing"}, "validation.metrics"),
        ({"gates": {"metrics": {"x": {"min": 1}}}}, "validation.gates.metrics: there are no such"),
        ({"gates": {"metrics": {"x": {"least": 1}}}}, "unknown key.*min"),
    ],
)
def test_measures_that_are_not_there_are_told_before_the_run(
    settings: dict[str, Any], validation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.run({**settings, "validation": validation}, only=("export",))
    assert not (tmp_path / "engines").exists()


def _net() -> torch.nn.Module:
    from care.modules import create

    return create("own_nets:Net")


def test_control_flow_on_values_is_explained(settings: dict[str, Any]) -> None:
    settings["model"] = {**settings["model"], "kwargs": {"branches": True}}
    ended = Ended()
    pipeline.run(settings, only=("export",), observer=ended)
    why = ended.results["export"].why
    assert "depends on the values of its images (Could not guard on data-dependent" in why
    assert "\x1b" not in why
    assert "torch.where" in why
    assert len(why) < 600


def test_a_head_of_another_size_is_refused(settings: dict[str, Any]) -> None:
    settings["model"] = {**settings["model"], "kwargs": {"classes": 3}}
    with pytest.raises(ConfigError, match="gives 1x3 for an image, not 10 logits"):
        pipeline.run(settings, only=("export",))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"checkpoint": "own"}, "give the network's name, a module"),
        ({"name": "care_s0", "module": "a:b", "checkpoint": "own"}, "one of them"),
        ({"name": "care_s0", "checkpoint": "own"}, "is for a network that a module makes"),
        ({"module": "a:b", "checkpoint": "embedded"}, "name a file, or 'own'"),
        ({"module": "a:b", "checkpoint": "random"}, "name a file, or 'own'"),
        ({"module": "a.b", "checkpoint": "own"}, "model.module"),
    ],
)
def test_a_network_is_stated_once(
    settings: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.run({**settings, "model": model})
