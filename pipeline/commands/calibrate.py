"""`calibrate`: which ranges do the tensors have?"""

from __future__ import annotations

from pipeline.commands.artifacts import log_of
from pipeline.commands.console import RichConsole
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.scheduler.plan import make_context
from pipeline.stages.context import RunContext
from pipeline.stages.export import ExportStep
from pipeline.stages.ranges import RangesStep, read_ranges
from pipeline.stages.samples import CalibrationStep
from pipeline.stages.simplify import SimplifyStep
from pipeline.steps.folders import locked


def calibrate(config: Config, *, method: str | None, stored: str, limit: int | None) -> str:
    """Ranges of all tensors of the graph over the calibration set, as text.

    Args:
        config: The configuration; its `run` must have made the graph.
        method: How ranges are chosen; None for the configuration's.
        stored: "int8" (symmetric) or "uint8" (asymmetric).
        limit: Most tensors to show.

    Raises:
        InputError: The graph is not there yet.
    """
    from calibration.show import text

    with (
        locked(config.folder),
        log_of(config) as log,
        log.captured() as screen,
        RichConsole(screen) as console,
    ):
        context = make_context(config, log, console.progress)
        step = _ranges(context, method or config.calibration.method, stored)
        why = step.stale()
        log(f"{step.name}: {why or 'up to date'}")
        if why:
            step.run()
        else:
            step.restate()
        artifact = step.artifact()
    return text(read_ranges(artifact), limit)


def _ranges(context: RunContext, method: str, stored: str) -> RangesStep:
    """The step, with a graph and a calibration set that are up to date."""
    export = ExportStep(context)
    simplify, calibration = SimplifyStep(context, export), CalibrationStep(context)
    for step in (export, simplify):
        if why := step.stale():
            raise InputError(f"{step.folder}: {why}: run python -m pipeline run first")
    if calibration.stale():
        calibration.run()
    return RangesStep(context, simplify, calibration, method=method, stored=stored)
