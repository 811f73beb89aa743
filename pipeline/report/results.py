"""All that a run knows, gathered from what its artifacts say of themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.config import Config
from pipeline.core.errors import ArtifactError, GateFailedError
from pipeline.core.figures import Number
from pipeline.core.machine import Machine
from pipeline.core.plain import Facts
from pipeline.core.published import PUBLISHED
from pipeline.core.replacing import is_set_aside
from pipeline.report.choice import choose
from pipeline.report.gates import judge_all, judge_class
from pipeline.report.model import FORMAT, NOT_SELECTED, BuiltArtifact, Part, Run, StepEnd
from pipeline.scheduler.execute import Outcome
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.accuracy import Accuracy, ReferenceFacts, ValidationFacts
from pipeline.steps.facts.bench import PYTORCH, BenchFacts
from pipeline.steps.facts.cpu_class import ClassFacts
from pipeline.steps.facts.graphs import (
    BuildFacts,
    CalibrationFacts,
    ExportFacts,
    FormFacts,
    RepairFacts,
    SimplifyFacts,
)
from pipeline.steps.facts.resizes import ResizesFacts
from pipeline.steps.keys import versions
from pipeline.steps.library import Library
from pipeline.steps.step import State
from pipeline.targets.registry import TARGETS

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "coremltools", "tensorrt-rtx-cu13", "tensorrt")

FactsT = TypeVar("FactsT", bound=Facts)


def collect(config: Config, path: Path, outcome: Outcome) -> Run:
    """Gather what lies in the results' folder, judge the gates, and say how the run ended.

    Args:
        config: The configuration.
        path: Its file.
        outcome: How the run ended.
    """
    shelf = _Shelf(config.folder, outcome)
    forms = {
        folder.name: form
        for folder in sorted((config.folder / "precision").glob("[!.]*"))
        if not is_set_aside(folder.relative_to(config.folder))
        and (form := shelf.part(f"precision/{folder.name}", FormFacts))
    }
    bench = {
        name: shelf.part(f"bench/{name}", BenchFacts) for name in TARGETS if config.target(name)
    }
    artifacts = tuple(
        _built(
            shelf,
            target,
            precision,
            forms.get(TARGETS[target].form(precision, config.target(target))),
            measured,
        )
        for target, measured in bench.items()
        for precision in config.precisions(target)
    )
    reference = shelf.part("validate/pytorch", ReferenceFacts)
    gates = judge_all(config, artifacts, reference.facts.range if reference else None)
    choice = {}
    for target, measured in bench.items():
        of_target = [artifact for artifact in artifacts if artifact.target == target]
        here = measured.facts.measured if measured else None
        choice[target] = choose(of_target, here, gates.failures)
    classes = _classes(config, shelf)
    return Run(
        format=FORMAT,
        name=config.name,
        config=str(path),
        folder=str(config.folder),
        date=time.strftime("%Y-%m-%d %H:%M"),
        exit_code=outcome.exit_code or (GateFailedError.exit_code if gates.failures else 0),
        steps=tuple(
            StepEnd(end.stage, end.name, end.state, end.why, end.seconds) for end in outcome.results
        ),
        not_selected=tuple(outcome.not_selected),
        gates=gates,
        machine=Machine.here(),
        versions=versions(*PACKAGES),
        export=shelf.part("export", ExportFacts),
        simplified=shelf.part("onnx", SimplifyFacts),
        forms=forms,
        calibration=shelf.part("calibration", CalibrationFacts),
        reference=reference,
        seals=shelf.seals(),
        artifacts=artifacts,
        bench=bench,
        choice=choice,
        published=PUBLISHED,
        cpu_classes=classes,
        class_failures={part.name: judge_class(config, part.facts) for part in classes},
        resizes=_resizes(shelf, [artifact.name for artifact in artifacts]),
        problems=tuple(shelf.problems.values()),
    )


def _classes(config: Config, shelf: _Shelf) -> tuple[Part[ClassFacts], ...]:
    """Artifacts as on CPUs of the classes that the configuration names."""
    found = []
    for target in TARGETS:
        options = config.target(target)
        for name in options.classes() if options else ():
            part = shelf.part(f"cpu-class/{target}-{name}", ClassFacts)
            if part:
                found.append(part)
    return tuple(found)


def _resizes(shelf: _Shelf, artifacts: Sequence[str]) -> tuple[Part[ResizesFacts], ...]:
    """What `resizes` measured of the network and of what the configuration builds."""
    names = (PYTORCH, *artifacts)
    parts = (shelf.part(f"resizes/{name.replace('/', '-')}", ResizesFacts) for name in names)
    return tuple(part for part in parts if part)


class _Shelf:
    """What lies in the results' folder after a run.

    Attributes:
        problems: By artifact, why it cannot be read.
    """

    def __init__(self, folder: Path, outcome: Outcome) -> None:
        self._library = Library(folder)
        self._stated = self._library.stated
        self._ended = {end.name: end for end in outcome.results}
        self.problems: dict[str, str] = {}

    def part(self, name: str, facts: type[FactsT]) -> Part[FactsT] | None:
        """One artifact; None where there is none, or none that can be read."""
        if name not in self._library.places:
            return None
        try:
            artifact = self._library.artifact(name)
            artifact.require_seal()
            if not self.is_current(name):
                self._stated.require(name, artifact.seal)
            return Part(
                name=artifact.name,
                earlier=not self.is_current(name),
                size=artifact.size,
                digest=artifact.digest,
                key=artifact.key,
                files=artifact.files,
                made_from=artifact.made_from,
                tools=artifact.tools,
                build_seconds=artifact.made().seconds,
                facts=facts.from_facts(artifact.facts, name),
            )
        except ArtifactError as error:
            again = "" if str(error).endswith("again") else ": run it again"
            self.problems[name] = f"{name} cannot be read: {error}{again}"
            return None

    def _counts(self, artifact: Artifact) -> bool:
        """Whether an artifact was looked at in this run, or is what was stated before."""
        return self.is_current(artifact.name) or self._stated.allows(artifact.name, artifact.seal)

    def seals(self) -> dict[str, str]:
        """Seals of all that lies there; of what was changed behind our back, the one stated."""
        found = {}
        for name, artifact in self._library.artifacts.items():
            if artifact.seal and self._counts(artifact):
                found[name] = artifact.seal
            elif name in self._stated.reported:
                found[name] = self._stated.reported[name]
        return found

    def is_selected(self, name: str) -> bool:
        """Whether this run looked at the step."""
        return name in self._ended

    def is_current(self, name: str) -> bool:
        """Whether this run made the step's artifact, or found it up to date."""
        end = self._ended.get(name)
        return end is not None and end.state in (State.DONE, State.UP_TO_DATE)

    def failure(self, name: str) -> str:
        """Why a step failed in this run; "" if it did not."""
        end = self._ended.get(name)
        return end.why if end is not None and end.error is not None else ""

    def why_missing(self, name: str, otherwise: str) -> str:
        """Why there is no artifact of a step."""
        if name in self.problems:
            return self.problems[name]
        end = self._ended.get(name)
        if end is None:
            return NOT_SELECTED
        return end.why or otherwise


def _built(
    shelf: _Shelf,
    target: str,
    precision: str,
    form: Part[FormFacts] | None,
    measured: Part[BenchFacts] | None,
) -> BuiltArtifact:
    """One artifact with its figures; where there are none, why."""
    name, validation = f"{target}/{precision}", f"validate/{target}-{precision}"
    built = shelf.part(name, BuildFacts)
    validated = shelf.part(validation, ValidationFacts)
    why_no_accuracy = _why_not(shelf, name, built, validation, validated)
    if validated is None or why_no_accuracy:
        accuracy, numerics, narrow = Accuracy.not_measured(why_no_accuracy), None, None
        emulation, photo = None, None
    else:
        seen = validated.facts
        accuracy, numerics, narrow = seen.numbers, seen.numerics, seen.narrow_sums
        emulation, photo = seen.emulation, seen.photo
    why_no_latency = _why_not(shelf, name, built, f"bench/{target}", measured)
    if measured is None or why_no_latency:
        latency = Number.not_measured(why_no_latency, unit="ms")
    else:
        unknown = Number.not_measured("not measured yet", unit="ms")
        latency = measured.facts.latency.get(precision, unknown)
    timed = measured.facts.measured if measured and not why_no_latency else None
    return BuiltArtifact(
        target=target,
        title=TARGETS[target].title,
        precision=precision,
        selected=shelf.is_selected(name),
        failure=shelf.failure(name),
        why_not=form.facts.why_not if form else "",
        why_slow=form.facts.why_slow if form else "",
        repair=_repair(form, built),
        built=built,
        accuracy=accuracy,
        accuracy_earlier=not why_no_accuracy and not shelf.is_current(validation),
        numerics=numerics,
        latency=latency,
        narrow_sums=narrow,
        emulation=emulation,
        photo=photo,
        latency_doubt=timed.doubt(precision) if timed and precision in timed.devices else "",
        latency_earlier=not why_no_latency and not shelf.is_current(f"bench/{target}"),
    )


def _repair(form: Part[FormFacts] | None, built: Part[BuildFacts] | None) -> RepairFacts | None:
    """What was raised, in the graph or by the target itself."""
    in_graph = form.facts.repair if form else None
    return in_graph or (built.facts.repair if built else None)


def _why_not(
    shelf: _Shelf,
    name: str,
    built: Part[BuildFacts] | None,
    step: str,
    judged: Part[ValidationFacts] | Part[BenchFacts] | None,
) -> str:
    """Why the figures of a step are none of the artifact; "" if they are its own."""
    if built is None:
        return shelf.failure(name) or shelf.why_missing(name, "not built")
    if judged is None:
        return shelf.failure(name) or shelf.why_missing(step, "not run yet")
    # A step that was not selected may have judged what was built before.
    if judged.made_from.get(name, built.digest) != built.digest:
        return f"{step} is of an earlier build of {name}: run it again"
    return ""
