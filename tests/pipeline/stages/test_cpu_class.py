"""Artifacts as on CPUs of another class: what a process of its own measures, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import BenchConfig
from pipeline.core import machine, timing
from pipeline.core.answers import Answers
from pipeline.core.cpu_classes import CpuClass, Purpose, named
from pipeline.core.errors import BuildError, UnavailableError
from pipeline.core.figures import Latency, State
from pipeline.core.timing import ENGINE, Protocol
from pipeline.stages import class_worker, cpu_class
from pipeline.stages.class_worker import Figures, Job
from pipeline.stages.cpu_class import ClassStep
from pipeline.stages.names import LOGITS
from pipeline.stages.target_step import code_beside
from pipeline.steps.facts.cpu_class import ClassFacts
from pipeline.steps.keys import PROJECT, Code
from pipeline.targets.registry import TARGETS

LABELS = np.array([0, 1, 1, 0])
PYTORCH = np.array([[2.0, 1], [1, 2], [1, 2], [2, 1]], np.float32)


class Stored:
    """An artifact of one array."""

    def __init__(self, path: Any, values: np.ndarray) -> None:
        np.save(path, values)
        self.files, self._path = {LOGITS: 1}, path

    def path(self, name: str) -> Any:
        return self._path


def stored(path: Any, values: np.ndarray, **more: Any) -> Any:
    artifact = Stored(path, values)
    return SimpleNamespace(artifact=lambda: artifact, folder=path.parent, **more)


@pytest.fixture
def step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> ClassStep:
    """A step whose artifacts were judged here, of which one changes an image elsewhere."""
    made: Any = ClassStep.__new__(ClassStep)
    made.cls = named("avx2")
    made.runtime = SimpleNamespace(
        name="ort",
        title="ONNX Runtime",
        why_not_as=lambda cls, purpose=Purpose.BOTH: None,
        missing=lambda artifact: None,
        missing_on=lambda artifact, cls: None,
    )
    made.context = SimpleNamespace(
        progress=lambda *arguments: None,
        config=SimpleNamespace(validation=SimpleNamespace(metrics=None)),
    )
    made.machine = lambda: {"cpu": "x"}
    made.builds = [
        SimpleNamespace(precision=name, folder=tmp_path, artifact=lambda: None)
        for name in ("fp32", "int8")
    ]
    images = SimpleNamespace(network=lambda: SimpleNamespace(labels=("bag", "shirt")))
    made.samples = SimpleNamespace(artifact=lambda: images, folder=tmp_path)
    made.reference = stored(tmp_path / "reference.npy", PYTORCH)
    made.validations = {
        name: stored(tmp_path / f"{name}-here.npy", PYTORCH) for name in ("fp32", "int8")
    }
    monkeypatch.setattr(cpu_class, "read_labels", lambda artifact: LABELS)
    return made  # type: ignore[no-any-return]


def test_accuracy_agreement_and_ratio_of_every_precision(
    step: ClassStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = PYTORCH.copy()
    changed[0] = [1, 2]

    def work(self: ClassStep, builds: Any, folder: Any, purpose: Purpose) -> Figures:
        assert purpose is Purpose.BOTH
        np.save(folder / "fp32.npy", PYTORCH)
        np.save(folder / "int8.npy", changed)
        devices = dict.fromkeys(("fp32", "int8"), "ort, restricted to AVX2")
        answers = {"int8": Answers(9, 1, 0.5)}
        return Figures(devices, 0.1, {"fp32": (2.0,) * 9, "int8": (1.0,) * 9}, answers)

    monkeypatch.setattr(ClassStep, "_run", work)
    monkeypatch.setattr("pipeline.stages.cpu_class.granted", lambda: 6)
    told = step.build(step.builds[0].folder)
    found = ClassFacts.from_facts(told, "test")
    assert found.cpus == 6
    plain, int8 = found.artifacts["fp32"], found.artifacts["int8"]
    assert (found.cpu_class, found.title, found.why_not, found.busy) == ("avx2", "AVX2", "", 0.1)
    assert found.answers["int8"].wrong == 1
    assert plain.ratio is None
    assert plain.same_as_here.value == 1.0
    assert int8.ratio is not None
    assert int8.ratio.value == 0.5
    assert int8.accuracy.top1.value == 0.75
    worst = int8.accuracy.by_class
    assert worst is not None
    assert (worst.worst, worst.top1.value, worst.top1.state) == ("bag", 0.5, State.RESTRICTED)
    assert int8.same_as_here.value == 0.75
    for number in (int8.accuracy.top1, int8.same_as_here, int8.latency):
        assert number.state is State.RESTRICTED
        assert number.by == "ort, restricted to AVX2"


def test_the_class_is_measured_by_the_protocol_of_the_configuration(
    step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step.context.config
    config.bench = BenchConfig(warmup=7, samples=80, max_seconds=9.0, settled=0.25)
    config.validation.batch = 4

    def worker(module: str, job: str, folder: str) -> None:
        asked = Job.from_dict(json.loads(Path(job).read_text()), job)
        assert asked.protocol == Protocol(7, 80, 9.0, 0.25)
        assert asked.purpose is Purpose.BOTH
        raise UnavailableError("seen")

    monkeypatch.setattr(cpu_class, "run_worker", worker)
    with pytest.raises(UnavailableError, match="seen"):
        step._run(step.builds, step.builds[0].folder, Purpose.BOTH)


def test_the_users_own_measures_are_taken_there_too(
    step: Any, monkeypatch: pytest.MonkeyPatch, own_modules: Any
) -> None:
    (own_modules / "on_class.py").write_text(
        "def right(logits, labels):\n"
        "    return {'right': float((logits.argmax(1) == labels).sum())}\n"
    )
    step.context.config.validation.metrics = "on_class:right"

    def work(self: ClassStep, builds: Any, folder: Any, purpose: Purpose) -> Figures:
        for name in ("fp32", "int8"):
            np.save(folder / f"{name}.npy", PYTORCH)
        devices = dict.fromkeys(("fp32", "int8"), "ort, restricted to AVX2")
        return Figures(devices, 0.1, {"fp32": (2.0,) * 9, "int8": (1.0,) * 9})

    monkeypatch.setattr(ClassStep, "_run", work)
    found = ClassFacts.from_facts(step.build(step.builds[0].folder), "test")
    number = found.artifacts["int8"].accuracy.metrics["right"]
    assert (number.value, number.state) == (4.0, State.RESTRICTED)
    step.context.config.bench = SimpleNamespace(model_dump=lambda mode: {})
    step.context.config.validation.batch = 8
    step.runtime.why_not_as = lambda cls, purpose=Purpose.BOTH: None
    key = step.inputs()
    assert key["settings validation.metrics"] == "on_class:right"
    assert "the code of validation.metrics" in key


@pytest.mark.parametrize("asked", ["missing", "missing_on"])
def test_what_cannot_run_on_the_class_is_left_out_with_a_reason(
    step: Any, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    step.builds[0].artifact, step.builds[1].artifact = lambda: "wide", lambda: "narrow"

    def why(artifact: str, *cls: Any) -> str | None:
        return "no bfloat16" if artifact == "narrow" else None

    def work(self: ClassStep, builds: Any, folder: Any, purpose: Purpose) -> Figures:
        assert [each.precision for each in builds] == ["fp32"]
        np.save(folder / "fp32.npy", PYTORCH)
        return Figures({"fp32": "ort"}, 0.1, {"fp32": (2.0,) * 9})

    setattr(step.runtime, asked, why)
    monkeypatch.setattr(ClassStep, "_run", work)
    found = ClassFacts.from_facts(step.build(step.builds[0].folder), "test")
    assert (list(found.artifacts), found.left_out) == (["fp32"], {"int8": "no bfloat16"})
    setattr(step.runtime, asked, lambda artifact, *cls: f"{artifact} needs another CPU")
    nothing = ClassFacts.from_facts(step.build(step.builds[0].folder), "test")
    assert nothing.why_not == "wide needs another CPU"


@pytest.mark.parametrize("reason", ["this CPU has no avx_vnni", "needs a C compiler"])
def test_what_cannot_be_measured_is_no_failure(step: Any, tmp_path: Any, reason: str) -> None:
    step.runtime.why_not_as = lambda cls, purpose=Purpose.BOTH: reason
    found = ClassFacts.from_facts(step.build(tmp_path), "test")
    assert found.why_not == reason
    assert not found.artifacts


class Toy:
    """A runner that notes in which order things happen."""

    smallest, largest, device = 1, None, "toy"

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def __enter__(self) -> Toy:
        return self

    def __exit__(self, *error: object) -> None:
        self.done.append("closed")


def test_the_worker_enters_the_class_before_it_opens_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []

    def opened(artifact: Any, threads: int | None) -> Toy:
        done.append(f"open {artifact} with {threads}")
        return Toy(done)

    def restrict(cls: CpuClass, purpose: Purpose) -> None:
        done.append(f"as {cls.name} for {purpose}")

    target = SimpleNamespace(restrict=restrict, open=opened)
    monkeypatch.setattr(class_worker, "TARGETS", {"toy": target})
    monkeypatch.setattr(class_worker, "Artifact", SimpleNamespace(read=lambda place: place.name))
    monkeypatch.setattr(class_worker, "_logits", lambda runner, samples, batch: PYTORCH)
    judged: list[Any] = []

    def timed(runners: Any, samples: str, asked: Protocol, known: Any) -> Figures:
        assert (samples, asked) == ("samples", protocol)
        judged.append(known)
        return Figures({"int8": "timed"}, 0.0, {"int8": (1.0,)})

    monkeypatch.setattr(class_worker, "_timed", timed)
    protocol = Protocol(1, 3, 1.0)
    job = Job("avx2", "toy", {"int8": "built"}, "samples", 8, 2, protocol)
    for purpose, by, times in (
        (Purpose.BOTH, "timed", {"int8": (1.0,)}),
        (Purpose.ANSWERS, "toy", {}),
        (Purpose.TIMES, "timed", {"int8": (1.0,)}),
    ):
        done.clear()
        (tmp_path / "int8.npy").unlink(missing_ok=True)
        class_worker.work(replace(job, purpose=purpose), tmp_path)
        assert done == [f"as avx2 for {purpose}", "open built with 2", "closed"]
        told = Figures.from_dict(json.loads((tmp_path / "figures.json").read_text()), "test")
        assert (told.devices, told.samples_ms) == ({"int8": by}, times)
        assert (tmp_path / "int8.npy").exists() == (purpose is not Purpose.TIMES)
        if purpose is not Purpose.TIMES:
            assert (np.load(tmp_path / "int8.npy") == PYTORCH).all()
    assert [set(known) for known in judged] == [{"int8"}, set()]


@pytest.mark.parametrize(("before", "meanwhile"), [(1.2, 0.1), (0.1, 1.2)])
def test_the_worker_tells_how_busy_it_was_before_and_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: float, meanwhile: float
) -> None:
    monkeypatch.setattr(machine, "load", lambda: before)
    monkeypatch.setattr(machine.Watch, "others", lambda self: meanwhile)
    calls: dict[str, dict[str, Latency]] = {"int8": {ENGINE: Latency((1.0, 2.0))}}
    monkeypatch.setattr(timing, "interleaved", lambda *_, hear: calls)
    drawn = SimpleNamespace(batches=lambda size: [], compare=lambda *_: Answers(2, 0, 0.0))
    monkeypatch.setattr(class_worker, "draw", lambda samples, judged: drawn)
    runners: Any = {"int8": Toy([])}
    for judged in ({"int8": PYTORCH}, {}):
        found = class_worker._timed(runners, Any, Protocol(1, 3, 1.0), judged)  # type: ignore[arg-type]
        assert (found.busy, found.samples_ms["int8"]) == (1.2, (1.0, 2.0))
        assert set(found.answers) == set(judged), "what nothing judged is compared with nothing"


def test_what_restricts_a_process_is_in_the_key(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step.context.code, step.runtime = Code(PROJECT), TARGETS["ort"]
    ours = {f"pipeline/targets/ort/{name}" for name in ("as_cpu.py", "as_cpu.c", "avx_vnni.c")}
    assert ours | {"pipeline/stages/class_worker.py"} <= set(step.code())
    assert not ours & set(code_beside(step.context, step.runtime, step.modules()))
    monkeypatch.setattr(cpu_class, "file_hash", lambda path: f"changed {path.name}")
    assert step.code()["pipeline/targets/ort/avx_vnni.c"] == "changed avx_vnni.c"


REASON = "this CPU has no avx_vnni"


@pytest.mark.parametrize("failure", ["", "it was killed"])
def test_where_instructions_are_lacking_answers_are_emulated_and_times_estimated(
    step: Any, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    config = step.context.config
    config.bench, config.validation.batch = BenchConfig(), 4
    step.runtime.why_not_as = lambda cls, purpose=Purpose.BOTH: (
        REASON if purpose is Purpose.BOTH else None
    )
    purposes = []

    def worker(module: str, job: str, folder: str) -> None:
        purpose = Job.from_dict(json.loads(Path(job).read_text()), job).purpose
        purposes.append(purpose)
        if purpose is Purpose.ANSWERS:
            told = Figures(dict.fromkeys(("fp32", "int8"), "ort, emulating"))
            for name in ("fp32", "int8"):
                np.save(Path(folder, f"{name}.npy"), PYTORCH)
        else:
            times = {"fp32": (2.0,) * 9, "int8": (1.0,) * 9}
            told = Figures(dict.fromkeys(times, "ort, imitating"), 0.1, times)
            if failure:
                raise BuildError(failure)
        Path(folder, "figures.json").write_text(json.dumps(told.to_dict()))

    monkeypatch.setattr(cpu_class, "run_worker", worker)
    found = ClassFacts.from_facts(step.build(step.builds[0].folder), "test")
    assert purposes == [Purpose.ANSWERS, Purpose.TIMES]
    assert (found.why_not, found.lacks, found.untimed) == ("", REASON, failure)
    assert found.state is State.EMULATED
    for one in found.artifacts.values():
        for number in (one.accuracy.top1, one.same_as_here):
            assert (number.value, number.state) == (1.0, State.EMULATED)
            assert number.by == "ort, emulating"
    latency, share = found.artifacts["int8"].latency, found.artifacts["int8"].ratio
    if failure:
        assert found.time_state is State.NOT_MEASURED
        assert (latency.value, latency.why, share) == (None, failure, None)
        assert found.samples_ms == {}
    else:
        assert found.time_state is State.ESTIMATED
        assert (latency.value, latency.state, latency.why) == (1.0, State.ESTIMATED, REASON)
        assert latency.by == "ort, imitating"
        assert share is not None
        assert share.value == 0.5
        assert found.busy == 0.1
        assert found.artifacts["fp32"].ratio is None


def test_a_worker_that_lacks_something_says_so(
    step: ClassStep, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(self: ClassStep, builds: Any, folder: Any, purpose: Purpose) -> Figures:
        raise UnavailableError("as avx2 not measured: needs objdump")

    monkeypatch.setattr(ClassStep, "_run", work)
    assert "needs objdump" in ClassFacts.from_facts(step.build(tmp_path), "test").why_not
