"""The stage that builds an artifact for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.kept import Kept
from pipeline.core.errors import BuildError, InputError
from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.stages.context import RunContext
from pipeline.stages.images import read_pictures
from pipeline.stages.names import GRAPH, OWN_GRAPH
from pipeline.stages.target_step import TargetStep
from pipeline.steps.folders import EVALUATIONS
from pipeline.steps.step import MACHINE, Step
from pipeline.targets.base import MODULE, BuildJob
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from torch import nn

    from pipeline.stages.precision import PrecisionStep
    from pipeline.stages.samples import CalibrationStep


class BuildStep(TargetStep):
    """One target in one precision, from a graph or from the fused module."""

    stage = "build"

    def __init__(
        self,
        context: RunContext,
        target: str,
        precision: str,
        graph: PrecisionStep | None,
        calibration: CalibrationStep,
    ) -> None:
        self.runtime = TARGETS[target]
        self.precision, self.graph, self.calibration = precision, graph, calibration
        options = context.config.target(target)
        needs_images = self.runtime.calibrates(precision, options)
        requires: list[Step] = [graph, graph.simplify.export] if graph else []
        requires += [calibration] if needs_images else []
        super().__init__(context, f"{target}/{precision}", requires, target)
        # From the fused module rather than from a graph.
        self.from_source = self.runtime.precisions[self.precision] == MODULE

    @property
    def measures(self) -> bool:
        """See `Step.measures`."""
        return self.runtime.timed

    def differs(self) -> str:
        """See `Step.differs`: the target says it."""
        return super().differs() or self.runtime.builds_differ

    def inputs(self) -> Mapping[str, Any]:
        """The target's options, the network, and the machine where something is timed."""
        options = self.context.config.target(self.runtime.name)
        assert options is not None
        found: dict[str, Any] = {
            f"settings targets.{self.runtime.name}": options.model_dump(
                mode="json", exclude={"precisions", "gates", *options.measuring}
            ),
            "settings export.batch": self.context.config.export.batch,
        }
        if self.takes_photos:
            found["settings export.preprocessing"] = "graph"
        if self.graph is None:
            found |= self.source.network_inputs()
        else:
            found["network"] = self.graph.artifact().network().to_dict()
        if self.runtime.timed:
            found[MACHINE] = self.machine()
        return found

    def made_from(self) -> dict[str, str]:
        """The graph, or the checkpoint."""
        digests = super().made_from()
        if self.from_source:
            digests["checkpoint"] = self.source.checkpoint_hash
        return digests

    def tools(self) -> dict[str, str]:
        """What the target says; for one that builds from the module, PyTorch too."""
        own = self.runtime.versions()
        return {**self.source.tools(), **own} if self.from_source else own

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Let the target build."""
        context = self.context
        context.progress(0, None, f"{self.runtime.title} {self.precision}")
        options = context.config.target(self.runtime.name)
        assert options is not None

        def calibration(count: int) -> Pictures:
            return read_pictures(self.calibration.artifact())[:count]

        name = f"{self.name.replace('/', '-')}-{self.key()[:16]}.jsonl"
        place = context.folder / EVALUATIONS / name
        job = BuildJob(
            network=self._network(),
            precision=self.precision,
            options=options,
            graph=self.graph.artifact().path(GRAPH) if self.graph else None,
            module=self._module,
            calibration=calibration,
            batch=context.config.export.fixed_batch,
            log=context.log,
            evaluations=place,
            photo=self.takes_photos,
        )
        try:
            facts = self.runtime.build(job, folder)
        except BuildError as refusal:
            if self.graph is None or not self.graph.simplify.artifact().facts["simplified"]:
                raise
            facts = self._build_from_exported(self.graph, job, folder, refusal)
        Kept(place).forget()
        if self.runtime.timed:
            facts["measured_on"] = self.machine()
        stated = {"target": self.runtime.name, "precision": self.precision}
        return {**stated, "network": job.network.to_dict(), **facts}

    def _build_from_exported(
        self, graph: PrecisionStep, job: BuildJob, folder: Path, refusal: BuildError
    ) -> dict[str, Any]:
        """Build from the graph before onnxsim; the artifact then holds its own graph.

        Some runtimes take it where they refuse the simplified one.

        Raises:
            BuildError: This graph is refused too: the first refusal.
        """
        for left in folder.iterdir():
            left.unlink()  # of the build that was refused
        self.context.log(f"{self.name}: {refusal}; trying the graph before onnxsim")
        own = folder / OWN_GRAPH
        graph.convert(graph.simplify.export.artifact(), own)
        try:
            facts = self.runtime.build(dataclasses.replace(job, graph=own), folder)
        except BuildError:
            raise refusal from None
        told = (
            f"{self.runtime.title} refused the graph that onnxsim made, and took the one before it"
        )
        self.notes.append(told)
        workarounds = [told, *facts.get("workarounds", ())]
        return {**facts, "workarounds": workarounds, "refused_simplified_graph": str(refusal)}

    def own_graph(self) -> Path | None:
        """The graph that the artifact was built from; None where it was built from the module."""
        built = self.artifact()
        if OWN_GRAPH in built.files:
            return built.path(OWN_GRAPH)
        return self.graph.artifact().path(GRAPH) if self.graph else None

    def graphs(self) -> tuple[Path | None, Path | None]:
        """The graph that the artifact was built from, and the float32 graph that that came from.

        None where it was built from the module.
        """
        if self.graph is None:
            return None, None
        simplify = self.graph.simplify
        # A graph of its own was made from what was exported: the target refused the simplified one.
        source = simplify.export if OWN_GRAPH in self.artifact().files else simplify
        return self.own_graph(), source.artifact().path(GRAPH)

    def _network(self) -> Network:
        """As the graph states it: a target that builds from it needs nothing else."""
        return self.source.network if self.graph is None else self.graph.artifact().network()

    def _module(self) -> nn.Module:
        if not self.from_source:
            raise BuildError(
                f"{self.name} is built from a graph, and asks for the module, which is no part of "
                f"its key: let {self.runtime.title} build {self.precision} from {MODULE!r}"
            )
        return self.source.fused()


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
