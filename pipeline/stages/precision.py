"""The stage that makes the graph in the form that a precision needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.kept import Kept
from pipeline.core import machine
from pipeline.stages.calibration_set import read_calibration
from pipeline.stages.context import RunContext
from pipeline.stages.names import GRAPH
from pipeline.stages.observing import Observed, ObservingStep
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import EVALUATIONS
from pipeline.steps.step import MACHINE
from pipeline.targets.forms import Form, FormJob

if TYPE_CHECKING:
    from calibration.sample import CalibrationSet
    from pipeline.stages.samples import CalibrationStep
    from pipeline.stages.simplify import SimplifyStep


class PrecisionStep(ObservingStep):
    """The graph in the form that a precision needs."""

    stage = "precision"

    def __init__(
        self, context: RunContext, form: Form, simplify: SimplifyStep, calibration: CalibrationStep
    ) -> None:
        self.form = form
        needed = [simplify, calibration] if self.form.calibrated else [simplify]
        super().__init__(context, f"precision/{form.name}", needed)
        self.simplify, self.calibration = simplify, calibration

    @property
    def observes(self) -> bool:
        """See `ObservingStep`: as the form says."""
        return self.form.observes

    def observed(self) -> Observed:
        """See `ObservingStep`."""
        return Observed(*self.form.observed(self.simplify.artifact().path(GRAPH)))

    def modules(self) -> list[str]:
        """The step's own, and the form's."""
        return [*super().modules(), type(self.form).__module__]

    @property
    def measures(self) -> bool:
        """See `Step.measures`."""
        return self.form.timed

    def inputs(self) -> Mapping[str, Any]:
        """Settings, preprocessing of calibration images, and the machine where it is timed."""
        found: dict[str, Any] = {"network": self.simplify.artifact().network().to_dict()}
        if self.form.calibrated:
            found["settings calibration"] = self._options()
        if self.form.timed:
            found[MACHINE] = machine.cpu_class()
            found["settings export.batch"] = self.context.config.export.batch
        return found

    def _options(self) -> dict[str, Any]:
        if not self.form.calibrated:
            return {}
        # A limit that is not stated is the form's own.
        settings = self.context.config.calibration
        return settings.model_dump(mode="json", exclude_none=True, exclude={"shard"})

    def tools(self) -> dict[str, str]:
        """What the form says."""
        return self.form.versions()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Convert the graph."""
        # The key holds all that decides an evaluation, but for the graph, which is told apart.
        place = self.context.folder / EVALUATIONS / f"{self.form.name}-{self.key()[:16]}.jsonl"
        facts = self.convert(self.simplify.artifact(), folder / GRAPH, place)
        Kept(place).forget()
        return {**facts, "measured_on": machine.cpu_class()} if self.form.timed else facts

    def convert(
        self, source: Artifact, destination: Path, evaluations: Path | None = None
    ) -> dict[str, Any]:
        """Write the form of an artifact's graph; returns the facts about it."""
        self.context.progress(0, None, f"making the {self.form.name} graph")
        network = source.network()

        def calibration() -> CalibrationSet:
            return read_calibration(self.calibration.artifact())

        job = FormJob(
            source=source.path(GRAPH),
            network=network,
            options=self._options(),
            calibration=calibration,
            log=self.context.log,
            batch=self.context.config.export.fixed_batch,
            evaluations=evaluations,
            look=self.look,
        )
        return {**self.form.convert(job, destination), "network": network.to_dict()}
