"""Built artifacts of a configuration, for the commands that look at them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from pipeline.commands.console import RichConsole
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.core.preprocess import Pictures
from pipeline.scheduler.plan import make_context, plan
from pipeline.stages.bench import BenchStep
from pipeline.stages.build import BuildStep, in_precisions
from pipeline.stages.context import RunContext
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import LOG_FILE, locked
from pipeline.steps.log import Log
from pipeline.steps.step import Step


@contextlib.contextmanager
def log_of(config: Config, *, required: bool = True) -> Iterator[Log]:
    """The log file of a configuration's results, closed at the end.

    Args:
        config: The configuration.
        required: Whether it has to be written; commands that only look work on read-only results.
    """
    log = Log(config.folder / LOG_FILE, required=required)
    try:
        yield log
    finally:
        log.close()


def builds_of(context: RunContext, target: str, precisions: Sequence[str]) -> list[BuildStep]:
    """The target's built artifacts, verified; only those of the named precisions, if any."""
    path = "python -m pipeline run"
    steps = [s for s in plan(context) if isinstance(s, BuildStep) and s.target == target]
    if not steps:
        raise InputError(f"the configuration has no target {target}: add it under targets")
    chosen = in_precisions(steps, precisions)
    for step in chosen:
        if not step.folder.exists():
            raise InputError(f"{step.folder} is not built yet: run {path} --target {target}")
        step.verified()
    return chosen


def bench_step(context: RunContext, target: str) -> BenchStep:
    """The step that measures a target.

    Raises:
        InputError: The configuration does not build it.
    """
    for step in plan(context):
        if isinstance(step, BenchStep) and step.runtime.name == target:
            return step
    raise InputError(f"the configuration has no target {target}: add it under targets")


def made(config: Config, step_of: Callable[[RunContext], Step]) -> Artifact:
    """The artifact of one step that no run needs, made now if it is not up to date.

    Args:
        config: The configuration.
        step_of: Makes the step; what it needs has to be there then.
    """
    with (
        locked(config.folder),
        log_of(config) as log,
        log.captured() as screen,
        RichConsole(screen) as console,
    ):
        step = step_of(make_context(config, log, console.progress))
        why = step.stale()
        log(f"{step.name}: {why or 'up to date'}")
        if why:
            step.run()
        else:
            step.restate()
        return step.artifact()


@contextlib.contextmanager
def one_artifact(
    config: Config, target: str, precision: str | None, images: int
) -> Iterator[tuple[RunContext, BuildStep, Pictures]]:
    """One built artifact of a target, the first if none is named, and some validation images."""
    with (
        log_of(config, required=False) as log,
        log.captured() as screen,
        RichConsole(screen) as console,
    ):
        context = make_context(config, log, console.progress)
        step = builds_of(context, target, (precision,) if precision else ())[0]
        yield context, step, context.source.first_pictures(images)
