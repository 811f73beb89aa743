"""Memory of an artifact: what a process of its own does, and what is told where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.core import cpu_classes, machine
from pipeline.core.errors import BuildError, UnavailableError
from pipeline.core.figures import State
from pipeline.core.network import Batch, Logits, Network
from pipeline.core.runner import Runner
from pipeline.stages import memory, memory_worker
from pipeline.stages.memory_worker import CALLS, FOUND, Found, Job
from pipeline.steps.artifact import Artifact

PREPROCESS = {
    "size": 4,
    "crop": 1.0,
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "channels": "rgb",
}
NETWORK = Network("toy", ("a", "b"), (3, 4, 4), PREPROCESS)


class Shapes(Runner):
    device = "toy runtime"

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def __call__(self, images: Batch) -> Logits:
        self.events.append(images.shape)
        return np.zeros((len(images), 2), np.float32)

    def close(self) -> None:
        self.events.append("closed")


class Target:
    def __init__(self, why: str | None = None) -> None:
        self.why, self.events = why, list[Any]()

    def restrict(
        self,
        cls: cpu_classes.CpuClass,
        purpose: cpu_classes.Purpose = cpu_classes.Purpose.BOTH,
    ) -> None:
        assert purpose is cpu_classes.Purpose.BOTH
        self.events.append(cls.name)

    def missing(self, artifact: Any) -> str | None:
        self.events.append("loads the runtime")
        return self.why

    def open(self, artifact: Any, *, threads: int | None) -> Runner:
        self.events.append(f"opens with {threads}")
        return Shapes(self.events)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What the process says of its peak, one after the other."""
    known: list[int | None] = [100, 250]
    monkeypatch.setattr(machine, "peak_memory", lambda: known.pop(0))
    artifact = SimpleNamespace(network=lambda: NETWORK)
    monkeypatch.setattr(Artifact, "read", lambda path: artifact)
    return known


def work(target: Target, monkeypatch: pytest.MonkeyPatch, cpu_class: str = "") -> Found:
    monkeypatch.setattr(memory_worker, "TARGETS", {"toy": target})
    return memory_worker.work(Job("toy", "somewhere", 2, 1, cpu_class))


def test_the_worker_looks_before_opening_and_after_some_calls(
    peaks: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target()
    assert work(target, monkeypatch, "avx2") == Found("toy runtime", before=100, peak=250)
    calls = [(2, 3, 4, 4)] * CALLS
    assert target.events == ["avx2", "loads the runtime", "opens with 1", *calls, "closed"]


def test_what_does_not_run_here_has_no_memory(
    peaks: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="no GPU"):
        work(Target("no GPU"), monkeypatch)


def test_a_system_that_does_not_tell(
    peaks: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks[1] = None
    with pytest.raises(UnavailableError, match="does not tell how much memory"):
        work(Target(), monkeypatch)


def test_the_figure_is_that_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def run(module: str, job: str, folder: str) -> None:
        assert module == memory.WORKER
        jobs.append(Job.from_dict(json.loads(Path(job).read_text()), job))
        found = Found("toy runtime", 100_000_000, 183_000_000)
        (Path(folder) / FOUND).write_text(json.dumps(found.to_dict()))

    monkeypatch.setattr(memory, "run_worker", run)
    artifact: Any = SimpleNamespace(folder=tmp_path)
    found = memory.memory_of("toy", artifact, 8, None)
    assert jobs == [Job("toy", str(tmp_path.resolve()), 8, None, "")]
    assert (found.peak.value, found.peak.state, found.peak.by) == (
        183e6,
        State.MEASURED,
        "toy runtime",
    )
    assert found.words == (
        "peak memory 183 MB in a process of its own, 100 MB of it before it was opened"
    )
    monkeypatch.setattr(cpu_classes, "_entered", [])
    cpu_classes.restrict(cpu_classes.CLASSES["avx2"])
    found = memory.memory_of("toy", artifact, 8, None)
    assert jobs[-1].cpu_class == "avx2"
    assert found.peak.state is State.RESTRICTED


def test_a_process_that_fails_leaves_the_measurement_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> None:
        raise BuildError("the worker was killed")

    monkeypatch.setattr(memory, "run_worker", run)
    artifact: Any = SimpleNamespace(folder=tmp_path)
    found = memory.memory_of("toy", artifact, 1, 1)
    assert (found.peak.value, found.peak.why) == (None, "the worker was killed")
    assert found.words == "peak memory not measured: the worker was killed"
