"""The stage that judges and measures artifacts as on CPUs of another class.

A machine that builds is seldom the one that runs: kernels, and with 8 bits even answers, depend on
what a CPU can do. The real runtime runs in a process that sees a lesser CPU. Where this CPU lacks
instructions of the class that can be emulated, answers are judged alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import cpu_classes, figures, timing
from pipeline.core.errors import UnavailableError
from pipeline.core.figures import Latency, Number, State, ratio
from pipeline.core.machine import granted
from pipeline.core.plain import read_json
from pipeline.stages.context import RunContext
from pipeline.stages.images import read_labels
from pipeline.stages.metrics import metrics_inputs
from pipeline.stages.names import LOGITS
from pipeline.stages.own_process import run_worker
from pipeline.stages.target_step import TargetStep
from pipeline.stages.validate import batch_inputs, judge, measured
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass
from pipeline.steps.step import LACKS, MACHINE
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
        untimed = self._lacks()
        why = self.runtime.why_not_as(self.cls, answers=True) or self._not_here()
        if why is None:
            try:
                return {**self._measure(untimed or "").to_facts(), "measured_on": self.machine()}
            except UnavailableError as error:
                why = str(error)
        return self._facts(why_not=why).to_facts()

    def _lacks(self) -> str | None:
        """Why nothing is timed here; None if it is."""
        return self.runtime.why_not_as(self.cls)

    def _not_here(self) -> str | None:
        """Why artifacts do not run on this machine at all; None if they do."""
        reasons = (self.runtime.missing(step.artifact()) for step in self.builds)
        return next(filter(None, reasons), None)

    def _facts(self, **more: Any) -> ClassFacts:
        cls = self.cls
        return ClassFacts(self.runtime.name, cls.name, cls.title, cls.examples, **more)

    def _measure(self, untimed: str) -> ClassFacts:
        self.context.progress(0, None, f"{self.runtime.title} as on {self.cls.title}")
        with tempfile.TemporaryDirectory(prefix="cpu-class-") as name:
            folder = Path(name)
            found = self._run(folder, timed=not untimed)
            logits = {step.precision: self._read(folder, step.precision) for step in self.builds}
        artifacts = {
            precision: self._judged(precision, logits[precision], found, untimed)
            for precision in logits
        }
        return self._facts(
            untimed=untimed,
            artifacts=artifacts,
            busy=found.busy,
            cpus=granted(),
            samples_ms=found.samples_ms,
            answers=found.answers,
        )

    def _read(self, folder: Path, precision: str) -> Logits:
        logits: Logits = np.load(folder / f"{precision}.npy")
        return logits

    def _run(self, folder: Path, *, timed: bool) -> Figures:
        from pipeline.stages.class_worker import FIGURES, Figures, Job

        settings = self.context.config.bench
        job = Job(
            cpu_class=self.cls.name,
            target=self.runtime.name,
            artifacts={step.precision: str(step.folder.resolve()) for step in self.builds},
            samples=str(self.samples.folder.resolve()),
            batch=self.context.config.validation.batch,
            threads=settings.threads,
            protocol=timing.Protocol.of(settings) if timed else None,
        )
        (folder / "job.json").write_text(json.dumps(job.to_dict()))
        run_worker(WORKER, str(folder / "job.json"), str(folder))
        return Figures.from_dict(read_json(folder / FIGURES), FIGURES)

    def _judged(self, precision: str, logits: Logits, found: Figures, untimed: str) -> OnClass:
        state = State.EMULATED if untimed else State.RESTRICTED
        reference = np.load(self.reference.artifact().path(LOGITS))
        labels, device = read_labels(self.samples.artifact()), found.devices[precision]
        accuracy = judge(logits, reference, labels, state, device, "")
        accuracy = measured(self, accuracy, logits, labels)
        same = self._same(precision, logits, state, device)
        if untimed:
            return OnClass(accuracy, same, Number.not_measured(untimed, unit="ms"))
        first = next(iter(found.samples_ms))
        times = found.samples_ms[precision]
        summary = Latency(times).summary()
        latency = Number(
            summary.p50,
            state,
            unit="ms",
            by=device,
            samples=summary.samples,
            interval=summary.p50_interval,
        )
        return OnClass(
            accuracy,
            same,
            latency,
            None if precision == first else ratio(times, found.samples_ms[first]),
        )

    def _same(self, precision: str, logits: Logits, state: State, device: str) -> Number:
        """Share of images with the same class as on this CPU."""
        validated = self.validations[precision].artifact()
        if LOGITS not in validated.files:
            return Number.not_measured(f"{precision} was not judged on this CPU")
        share = figures.compare(logits, np.load(validated.path(LOGITS))).agreement
        return Number(share, state, by=device, samples=len(logits))
