"""`calibrate`: which ranges do the tensors have?"""

from __future__ import annotations

from pipeline.commands.artifacts import made
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.stages.context import RunContext
from pipeline.stages.export import ExportStep
from pipeline.stages.ranges import RangesStep, read_ranges
from pipeline.stages.samples import CalibrationStep
from pipeline.stages.simplify import SimplifyStep


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

    chosen = method or config.calibration.method
    artifact = made(config, lambda context: _ranges(context, chosen, stored))
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
