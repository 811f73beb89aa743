"""A plan on a machine without a GPU, of steps that run where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import machine
from pipeline.scheduler.orders import differences
from pipeline.scheduler.places import FleetPlaces
from pipeline.stages.context import StageStep
from pipeline.steps.step import Place, Step
from pipeline.targets.tensorrt.target import TrtTarget
from tests.pipeline.stages.test_keys import finish, steps_of, write_project

HERE, BOX, OTHER = "a CPU without a GPU beside it", "an RTX box", "another RTX box"
"""Stand-ins for classes of machines, by their CPUs."""

MEASURED = ("trt/fp16", "validate/trt-fp16", "bench/trt")
"""What runs on a worker with a GPU."""


@contextmanager
def standing_on(name: str, gpu: str | None) -> Iterator[None]:
    """Let this be another machine."""
    lacks = None if gpu else "no NVIDIA driver is installed on this machine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cpu_name", lambda: name)
        patch.setattr(TrtTarget, "missing", lambda self, artifact: lacks)
        patch.setattr(TrtTarget, "hardware", lambda self: {"gpu": gpu} if gpu else {})
        version = "1.3" if gpu else "missing"
        patch.setattr(TrtTarget, "versions", lambda self: {"tensorrt_rtx": version})
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def steps(project: Path) -> Iterator[dict[str, StageStep]]:
    """All steps, of which an RTX box made what runs there, planned without one."""
    with standing_on(HERE, None):
        finish(steps_of(project))
    with standing_on(BOX, "RTX 5090"):
        there = steps_of(project)
        for name in MEASURED:
            finish({name: there[name]})
    with standing_on(HERE, None):
        yield steps_of(project)


def fleet(resource: str, *machines: tuple[str, str | None]) -> FleetPlaces:
    """A fleet of such machines, of which `resource` runs what belongs to TensorRT."""
    told = []
    for name, gpu in machines:
        with standing_on(name, gpu):
            facts = {"cpu": machine.cpu_class(), "targets": {"trt": TrtTarget().hardware()}}
        told.append(facts)
    return FleetPlaces(lambda step: resource if step.target == "trt" else "cpu", lambda step: told)


def why(steps: Mapping[str, Step], places: FleetPlaces | None) -> dict[str, str | None]:
    return {name: steps[name].stale(elsewhere=places) for name in MEASURED}


def test_what_a_worker_measured_is_up_to_date_where_no_gpu_is(steps: dict[str, StageStep]) -> None:
    places = fleet("rtx", (HERE, None), (BOX, "RTX 5090"))
    assert why(steps, places) == dict.fromkeys(MEASURED)


def test_no_plain_run_takes_it_for_its_own(steps: dict[str, StageStep]) -> None:
    found = why(steps, None)
    assert all(found.values()), found
    assert "what this machine lacks" in str(found["validate/trt-fp16"])


@pytest.mark.parametrize("other", [(BOX, "RTX 4060"), (OTHER, "RTX 5090")])
def test_what_was_timed_on_a_machine_that_is_gone_is_measured_anew(
    steps: dict[str, StageStep], other: tuple[str, str]
) -> None:
    found = why(steps, fleet("rtx", (HERE, None), other))
    assert found == {
        "trt/fp16": None,
        "validate/trt-fp16": None,
        "bench/trt": "measured on a machine such as the fleet has none",
    }


def test_a_worker_of_which_nothing_is_known_vouches_for_nothing(
    steps: dict[str, StageStep],
) -> None:
    places = FleetPlaces(lambda step: "rtx", lambda step: [{}])
    assert why(steps, places)["bench/trt"] == "measured on a machine such as the fleet has none"


def test_nobody_is_asked_for_a_plan_alone(steps: dict[str, StageStep]) -> None:
    places = FleetPlaces(lambda step: "cpu", lambda step: None)
    assert why(steps, places) == dict.fromkeys(MEASURED)


def test_what_was_emulated_is_judged_on_hardware_that_came(project: Path) -> None:
    with standing_on(HERE, None):
        finish(steps_of(project))
        steps = steps_of(project)
        found = why(steps, fleet("rtx", (BOX, "RTX 5090")))
        told = "it did not run on its hardware, and the fleet has rtx"
        assert (found["validate/trt-fp16"], found["bench/trt"]) == (told, told)
        assert why(steps, fleet("cpu", (HERE, None))) == dict.fromkeys(MEASURED)


def test_all_else_still_counts(project: Path, steps: dict[str, StageStep]) -> None:
    path = project / "pipeline.yaml"
    path.write_text(path.read_text() + "bench: {samples: 77}\nvalidation: {batch: 3}\n")
    found = why(steps_of(project), fleet("rtx", (BOX, "RTX 5090")))
    assert found == {
        "trt/fp16": None,
        "validate/trt-fp16": "changed: settings validation.batch",
        "bench/trt": "changed: settings bench.samples",
    }


def test_a_judgement_that_changed_changes_what_was_measured_elsewhere(
    steps: dict[str, StageStep],
) -> None:
    """Which only a machine knows that runs the artifact."""

    def another(folder: Path) -> Mapping[str, Any]:
        (folder / "file").write_text("other logits")
        return {}

    assert "validate/trt-fp16" not in steps["bench/trt"].made_from()
    steps["validate/trt-fp16"].make(another)
    found = why(steps, fleet("rtx", (BOX, "RTX 5090")))
    assert found["bench/trt"] == "changed: validate/trt-fp16"


@pytest.mark.parametrize("name", MEASURED)
def test_a_worker_sees_what_a_run_without_a_gpu_asks_for(
    name: str, project: Path, steps: dict[str, StageStep]
) -> None:
    asked = steps[name].parts()
    with standing_on(BOX, "RTX 5090"):
        there = steps_of(project)[name]
        assert differences(asked, there.parts())
        with there.seen_from(Place(asked["inputs"], asked["tools"])):
            assert differences(asked, there.parts()) == ""


def test_other_tools_are_no_matter_of_the_machine(steps: dict[str, StageStep]) -> None:
    place = Place({}, {"torch": "2.14", "tensorrt_rtx": "1.3"})
    assert place.tools_there({"torch": "2.15", "tensorrt_rtx": "missing"}) == {
        "torch": "2.15",
        "tensorrt_rtx": "1.3",
    }
    assert place.tools_there({"torch": "2.15", "onnx": "1"}) == {
        "torch": "2.15",
        "tensorrt_rtx": "1.3",
    }
