"""The stage that judges and measures artifacts as on CPUs of another class.

A machine that builds is seldom the one that runs: kernels, and with 8 bits even answers, depend on
what a CPU can do. The real runtime runs in a process that sees a lesser CPU. Where this CPU lacks
instructions of the class, two processes stand in for them if that can be done: one for answers,
which are emulated then, and one for times, which are estimated.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import cpu_classes, figures, timing
from pipeline.core.cpu_classes import Purpose
from pipeline.core.errors import PipelineError, UnavailableError
from pipeline.core.figures import Latency, Number, State, ratio
from pipeline.core.files import file_hash
from pipeline.core.machine import granted
from pipeline.core.plain import read_json
from pipeline.stages.context import RunContext
from pipeline.stages.images import read_labels
from pipeline.stages.metrics import metrics_inputs
from pipeline.stages.names import LOGITS
from pipeline.stages.own_process import run_worker
from pipeline.stages.target_step import TargetStep, code_beside
from pipeline.stages.validate import batch_inputs, judge, measured
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass
from pipeline.steps.keys import PROJECT
from pipeline.steps.step import LACKS, MACHINE
from pipeline.targets.base import LOOKING, RESTRICTING
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.core.network import Logits
    from pipeline.stages.build import BuildStep
    from pipeline.stages.class_worker import Figures
    from pipeline.stages.samples import SampleStep
    from pipeline.stages.validate import ReferenceStep, ValidateStep

WORKER = "pipeline.stages.class_worker"


class ClassStep(TargetStep):
    """All precisions of a target on CPUs of one class."""

    stage = "bench"

    def __init__(
        self,
        context: RunContext,
        target: str,
        cpu_class: str,
        builds: Sequence[BuildStep],
        samples: SampleStep,
        reference: ReferenceStep,
        validations: Sequence[ValidateStep],
    ) -> None:
        super().__init__(
            context,
            f"cpu-class/{target}-{cpu_class}",
            [*builds, samples, reference, *validations],
            target,
        )
        self.runtime, self.cls = TARGETS[target], cpu_classes.named(cpu_class)
        self.builds, self.samples, self.reference = builds, samples, reference
        self.validations = {step.built.precision: step for step in validations}

    @property
    def measures(self) -> bool:
        """See `Step.measures`."""
        return True

    def modules(self) -> list[str]:
        """The step's own, and those of the process that it starts."""
        return [*super().modules(), WORKER]

    def code(self) -> dict[str, str]:
        """See `Step.code`: with what lets the runtime see another CPU, be it in C."""
        aside = LOOKING - RESTRICTING
        found = code_beside(self.context, self.runtime, self.modules(), aside)
        files = self.runtime.restricting()
        return found | {str(file.relative_to(PROJECT)): file_hash(file) for file in files}

    def inputs(self) -> Mapping[str, Any]:
        """The protocol, the machine, and what it lacks."""
        return {
            "settings bench": self.context.config.bench.model_dump(mode="json"),
            **batch_inputs(self.context.config),
            **metrics_inputs(self.context.config.validation.metrics),
            MACHINE: self.machine(),
            LACKS: self._lacks(),
        }

    def tools(self) -> dict[str, str]:
        """What runs the artifacts."""
        return self.runtime.versions()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Run the artifacts in a process that sees the class."""
        why = self.runtime.why_not_as(self.cls, Purpose.ANSWERS)
        if why is None:
            try:
                return {**self._measure().to_facts(), "measured_on": self.machine()}
            except UnavailableError as error:
                why = str(error)
        return self._facts(why_not=why).to_facts()

    def _lacks(self) -> str | None:
        """Why not both answers and times can be measured here; None if they can."""
        return self.runtime.why_not_as(self.cls)

    def _left_out(self) -> dict[str, str]:
        """Why artifacts run on this machine, or on the class, not at all; by precision."""
        found = {}
        for step in self.builds:
            artifact = step.artifact()
            why = self.runtime.missing(artifact) or self.runtime.missing_on(artifact, self.cls)
            if why is not None:
                found[step.precision] = why
        return found

    def _facts(self, **more: Any) -> ClassFacts:
        cls = self.cls
        return ClassFacts(self.runtime.name, cls.name, cls.title, cls.examples, **more)

    def _measure(self) -> ClassFacts:
        left_out = self._left_out()
        builds = [step for step in self.builds if step.precision not in left_out]
        if not builds:
            raise UnavailableError(next(iter(left_out.values())))
        self.context.progress(0, None, f"{self.runtime.title} as on {self.cls.title}")
        lacks, untimed = self._lacks() or "", ""
        with tempfile.TemporaryDirectory(prefix="cpu-class-") as name:
            folder = Path(name)
            answered = self._run(builds, folder, Purpose.ANSWERS if lacks else Purpose.BOTH)
            logits = {step.precision: self._read(folder, step.precision) for step in builds}
            timed = answered
            if lacks:
                try:
                    timed = self._run(builds, folder, Purpose.TIMES)
                except PipelineError as error:
                    untimed = str(error)
        facts = self._facts(
            left_out=left_out,
            lacks=lacks,
            untimed=untimed,
            busy=timed.busy,
            cpus=granted(),
            samples_ms=timed.samples_ms,
            answers=timed.answers,
        )
        artifacts = {
            precision: self._judged(precision, logits[precision], answered, timed, facts)
            for precision in logits
        }
        return replace(facts, artifacts=artifacts)

    def _read(self, folder: Path, precision: str) -> Logits:
        logits: Logits = np.load(folder / f"{precision}.npy")
        return logits

    def _run(self, builds: Sequence[BuildStep], folder: Path, purpose: Purpose) -> Figures:
        from pipeline.stages.class_worker import FIGURES, Figures, Job

        settings = self.context.config.bench
        job = Job(
            cpu_class=self.cls.name,
            target=self.runtime.name,
            artifacts={step.precision: str(step.folder.resolve()) for step in builds},
            samples=str(self.samples.folder.resolve()),
            batch=self.context.config.validation.batch,
            threads=settings.threads,
            protocol=timing.Protocol.of(settings),
            purpose=purpose,
        )
        (folder / "job.json").write_text(json.dumps(job.to_dict()))
        run_worker(WORKER, str(folder / "job.json"), str(folder))
        return Figures.from_dict(read_json(folder / FIGURES), FIGURES)

    def _judged(
        self, precision: str, logits: Logits, answered: Figures, timed: Figures, facts: ClassFacts
    ) -> OnClass:
        """What one artifact did, by the processes that answered and that were timed."""
        reference = np.load(self.reference.artifact().path(LOGITS))
        labels, device = read_labels(self.samples.artifact()), answered.devices[precision]
        accuracy = judge(logits, reference, labels, facts.state, device, "")
        accuracy = measured(self, accuracy, logits, labels)
        same = self._same(precision, logits, facts.state, device)
        if facts.untimed:
            return OnClass(accuracy, same, Number.not_measured(facts.untimed, unit="ms"))
        first = next(iter(timed.samples_ms))
        times = timed.samples_ms[precision]
        summary = Latency(times).summary()
        latency = Number(
            summary.p50,
            facts.time_state,
            unit="ms",
            by=timed.devices[precision],
            why=facts.lacks,
            samples=summary.samples,
            interval=summary.p50_interval,
        )
        return OnClass(
            accuracy,
            same,
            latency,
            None if precision == first else ratio(times, timed.samples_ms[first]),
        )

    def _same(self, precision: str, logits: Logits, state: State, device: str) -> Number:
        """Share of images with the same class as on this CPU."""
        validated = self.validations[precision].artifact()
        if LOGITS not in validated.files:
            return Number.not_measured(f"{precision} was not judged on this CPU")
        share = figures.compare(logits, np.load(validated.path(LOGITS))).agreement
        return Number(share, state, by=device, samples=len(logits))
