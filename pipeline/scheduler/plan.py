"""Which steps a configuration needs, in which order, and which of them to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.core import signals
from pipeline.core.hashes import HashCache
from pipeline.source import Source
from pipeline.stages.bench import BenchStep
from pipeline.stages.build import BuildStep
from pipeline.stages.context import RunContext
from pipeline.stages.cpu_class import ClassStep
from pipeline.stages.export import ExportStep
from pipeline.stages.golden import GoldenStep
from pipeline.stages.precision import PrecisionStep
from pipeline.stages.samples import CalibrationStep, SampleStep
from pipeline.stages.shards import place_of_shards
from pipeline.stages.simplify import SimplifyStep
from pipeline.stages.validate import ReferenceStep, ValidateStep
from pipeline.steps.facts.bench import PYTORCH
from pipeline.steps.folders import HASHES, IMPORTS
from pipeline.steps.keys import PROJECT, Code
from pipeline.steps.step import Progress, Step
from pipeline.targets.registry import TARGETS, form_of

if TYPE_CHECKING:
    from pipeline.store.shared import Shared

STAGES = ("export", "simplify", "calibrate", "precision", "build", "validate", "bench", "report")
"""The stages, in their order."""

ASKED_FOR = "asked for"
"""Why a step runs that is up to date."""


@dataclass(frozen=True)
class Selection:
    """Which steps to run.

    Attributes:
        only: These stages; empty for all.
        start: This stage and those after it run even if they are up to date.
        targets: These targets and what they are made from; empty for all.
        force: Everything that is selected runs even if it is up to date.
    """

    only: tuple[str, ...] = ()
    start: str | None = None
    targets: tuple[str, ...] = ()
    force: bool = False

    def select(self, steps: Sequence[Step]) -> list[Step]:
        """Those of the steps to look at, in their order."""
        needed = (
            set(steps)
            if not self.targets
            else with_requirements(step for step in steps if step.target in self.targets)
        )
        return [s for s in steps if s in needed and (not self.only or s.stage in self.only)]

    def forces(self, step: Step) -> bool:
        """Whether the step runs even if it is up to date."""
        after = self.start is not None and STAGES.index(step.stage) >= STAGES.index(self.start)
        return self.force or after


def with_requirements(steps: Iterable[Step]) -> set[Step]:
    """The steps and all that they are made from, directly or not."""
    found: set[Step] = set()
    waiting = list(steps)
    while waiting:
        step = waiting.pop()
        if step not in found:
            found.add(step)
            waiting.extend(step.requires)
    return found


def plan(context: RunContext) -> list[Step]:
    """All steps of a configuration, each after those that it requires."""
    config = context.config
    export = ExportStep(context)
    simplify = SimplifyStep(context, export)
    calibration = CalibrationStep(context)
    samples = SampleStep(context)
    reference = ReferenceStep(context, samples)
    golden = GoldenStep(context, samples, reference)
    forms: dict[str, PrecisionStep] = {}
    builds: list[BuildStep] = []
    for name in TARGETS:
        for precision in config.precisions(name):
            form = form_of(TARGETS[name], precision, config.target(name))
            if form and form.name not in forms:
                forms[form.name] = PrecisionStep(context, form, simplify, calibration)
            graph = forms[form.name] if form else None
            builds.append(BuildStep(context, name, precision, graph, calibration))
    validations = [ValidateStep(context, build, samples, reference, golden) for build in builds]
    by_build = {step.built: step for step in validations}
    benches: list[Step] = []
    for name in TARGETS:
        own = [build for build in builds if build.target == name]
        judges: dict[str, ReferenceStep | ValidateStep] = {PYTORCH: reference}
        judges |= {build.precision: by_build[build] for build in own}
        if config.target(name):
            benches.append(BenchStep(context, name, own, samples, judges))
    classes: list[Step] = []
    for name in TARGETS:
        options = config.target(name)
        own = [build for build in builds if build.target == name]
        for cpu_class in options.classes() if options else ():
            judged = [by_build[build] for build in own]
            classes.append(ClassStep(context, name, cpu_class, own, samples, reference, judged))
    steps: list[Step] = [export, simplify]
    if any(calibration in step.requires for step in (*forms.values(), *builds)):
        steps.append(calibration)
    judging = [samples, reference, golden, *validations, *benches, *classes]
    return [*steps, *forms.values(), *builds, *judging]


def step_named(steps: Sequence[Step], name: str) -> Step | None:
    """The step of a name, or the shard of one; None if there is none.

    Args:
        steps: See `plan`. What a shard is cut from has to be there.
        name: Of a step, or of a shard.
    """
    for step in steps:
        if step.name == name:
            return step
        if name.startswith(f"{place_of_shards(step)}/"):
            return next((shard for shard in step.shards() if shard.name == name), None)
    return None


def make_context(
    config: Config,
    log: Callable[[str], None],
    progress: Progress,
    source: Source | None = None,
    code: Code | None = None,
) -> RunContext:
    """What the steps of a configuration work with.

    Args:
        config: The configuration.
        log: Takes a line for the log file.
        progress: Is told how far the running step is.
        source: The network and the images, where something loaded them already.
        code: This project's own code, where something read it already.
    """

    def told(done: int, total: int | None = None, what: str = "") -> None:
        # Steps say often how far they are: the place to notice a signal that got lost.
        signals.raise_received()
        progress(done, total, what)

    if source is None:
        source = _kind_of_source(config)(config, HashCache(config.folder / HASHES), told)
    source.progress = told
    code = code or Code(PROJECT, config.folder / IMPORTS)
    return RunContext(config=config, source=source, log=log, progress=told, code=code)


def _kind_of_source(config: Config) -> type[Source]:
    if config.model.onnx is None:
        return Source
    from pipeline.graph_source import GraphSource  # loads onnx, of which others need nothing

    return GraphSource


def open_store(config: Config, warn: Callable[[str], object]) -> Shared | None:
    """The store that a configuration names, opened; None if it names none.

    Raises:
        StoreError: It does not answer, and is required.
    """
    stated = config.store
    if stated is None:
        return None
    from pipeline.store.shared import Shared  # here: few runs share anything

    return Shared.open(
        stated.address.get_secret_value(),
        {name: value.get_secret_value() for name, value in stated.options.items()},
        push=stated.push,
        required=stated.required,
        warn=warn,
        limit_s=stated.timeout_s,
    )
