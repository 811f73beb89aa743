"""The stage that makes the graph in the form that a precision needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.sample import CalibrationSet
from pipeline.stages.export import GRAPH
from pipeline.stages.samples import CalibrationStep, read_calibration
from pipeline.stages.simplify import SimplifyStep
from pipeline.steps.step import Context, Step
from pipeline.targets.forms import Form, FormJob

if TYPE_CHECKING:
    pass


class PrecisionStep(Step):
    """The graph in the form that a precision needs."""

    stage = "precision"

    def __init__(
        self, context: Context, form: Form, simplify: SimplifyStep, calibration: CalibrationStep
    ) -> None:
        self.form = form
        needed = [simplify, calibration] if self.form.calibrated else [simplify]
        super().__init__(context, f"precision/{form.name}", needed)
        self.simplify, self.calibration = simplify, calibration
        own = (type(self.form).__module__, *self.form.code)
        self.code = (*own, "calibration") if self.form.calibrated else own

    def inputs(self) -> Mapping[str, Any]:
        """Settings of the calibration, for forms that need it."""
        return {"options": self._options()}

    def _options(self) -> dict[str, Any]:
        if not self.form.calibrated:
            return {}
        return self.context.config.calibration.model_dump(mode="json")

    def tools(self) -> dict[str, str]:
        """What the form says."""
        return self.form.versions()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Convert the graph."""
        self.context.progress(0, None, f"making the {self.form.name} graph")
        source, step = self.simplify.artifact(), self.calibration

        def calibration() -> CalibrationSet:
            return read_calibration(step.artifact(), self.context.source)

        job = FormJob(
            source=source.path(GRAPH),
            network=self.context.source.network,
            options=self._options(),
            calibration=calibration,
            log=self.context.log,
        )
        return {**self.form.convert(job, folder / GRAPH), "network": source.facts["network"]}
