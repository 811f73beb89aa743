"""The stage that builds an artifact for a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError
from pipeline.core.network import Images
from pipeline.stages.export import GRAPH
from pipeline.stages.precision import PrecisionStep
from pipeline.stages.samples import CalibrationStep, read_calibration
from pipeline.steps.step import Context, Step
from pipeline.targets.base import MODULE, BuildJob
from pipeline.targets.registry import TARGETS


class BuildStep(Step):
    """One target in one precision, from a graph or from the fused module."""

    stage = "build"

    def __init__(
        self,
        context: Context,
        target: str,
        precision: str,
        graph: PrecisionStep | None,
        calibration: CalibrationStep,
    ) -> None:
        self.runtime = TARGETS[target]
        self.precision, self.graph, self.calibration = precision, graph, calibration
        needs_images = precision in self.runtime.calibrated
        requires = ([graph] if graph else []) + ([calibration] if needs_images else [])
        super().__init__(context, f"{target}/{precision}", requires, target)
        module = type(self.runtime).__module__
        self.code = (module, *self.runtime.code)

    @property
    def from_module(self) -> bool:
        """Whether the target builds from the fused module rather than from a graph."""
        return self.runtime.precisions[self.precision] == MODULE

    def inputs(self) -> Mapping[str, Any]:
        """The target's options; for targets that build from the module, the network."""
        context = self.context
        options = context.config.target(self.runtime.name)
        assert options is not None
        return {
            "options": options.model_dump(
                mode="json", exclude={"precisions", "gates", *options.measuring}
            ),
            "batch": context.config.export.batch,
            "network": context.source.network_inputs(),
        }

    def made_from(self) -> dict[str, str]:
        """The graph, or the checkpoint."""
        digests = super().made_from()
        if self.from_module:
            digests["checkpoint"] = self.context.source.checkpoint_hash
        return digests

    def tools(self) -> dict[str, str]:
        """What the target says."""
        return self.runtime.versions()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Let the target build."""
        context = self.context
        context.progress(0, None, f"{self.runtime.title} {self.precision}")
        options = context.config.target(self.runtime.name)
        assert options is not None
        batch = context.config.export.batch

        def calibration(count: int) -> Images:
            return read_calibration(self.calibration.artifact(), context.source).images[:count]

        facts = self.runtime.build(
            BuildJob(
                network=context.source.network,
                precision=self.precision,
                options=options,
                graph=self.graph.artifact().path(GRAPH) if self.graph else None,
                module=context.source.fused,
                calibration=calibration,
                batch=None if batch == "dynamic" else batch,
                log=context.log,
            ),
            folder,
        )
        return {"target": self.runtime.name, "precision": self.precision, **facts}


def in_precisions(builds: Sequence[BuildStep], precisions: Sequence[str]) -> list[BuildStep]:
    """Those of one target's builds in the named precisions; all if none is named.

    Raises:
        InputError: A precision is not among them.
    """
    known = [build.precision for build in builds]
    if unknown := sorted(set(precisions) - set(known)):
        raise InputError(
            f"{builds[0].target} is not configured for {unknown[0]}: there are {', '.join(known)}"
        )
    return [build for build in builds if not precisions or build.precision in precisions]
