"""`calibrate`: which ranges do the tensors have?"""

from __future__ import annotations

from pipeline.commands.artifacts import log_of
from pipeline.commands.console import RichConsole
from pipeline.config import Config
from pipeline.core.errors import InputError
from pipeline.scheduler.plan import make_context
from pipeline.stages.calibration_set import read_calibration
from pipeline.stages.export import ExportStep
from pipeline.stages.names import GRAPH
from pipeline.stages.samples import CalibrationStep
from pipeline.stages.simplify import SimplifyStep
from pipeline.steps.folders import locked
from pipeline.steps.step import Context


def calibrate(config: Config, *, method: str | None, stored: str, limit: int | None) -> str:
    """Ranges of all tensors of the graph over the calibration set, as text.

    Args:
        config: The configuration; its `run` must have made the graph and the calibration set.
        method: How ranges are chosen; None for the configuration's.
        stored: "int8" (symmetric) or "uint8" (asymmetric).
        limit: Most tensors to show.

    Raises:
        InputError: The graph or the calibration set is not there yet.
    """
    from calibration.cache import CacheKey, cached
    from calibration.observe import observe
    from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method
    from calibration.show import text
    from calibration.table import Table as Ranges
    from calibration.table import make_table

    chosen = Method(method or config.calibration.method)
    scheme = ACTIVATIONS_INT8 if stored == "int8" else ACTIVATIONS_UINT8
    with locked(config.folder), log_of(config) as log, log.captured() as screen:
        with RichConsole(screen) as console:
            context = make_context(config, log, console.progress)
            simplify, step = _calibration_steps(context)
            graph = simplify.artifact().path(GRAPH)
            images = read_calibration(step.artifact())
        key = CacheKey.of(graph, images.hashes, context.source.preprocess.to_dict(), chosen, scheme)

        def make() -> Ranges:
            return make_table(
                observe(graph, images.images), chosen, scheme, images=len(images.images)
            )

        path = config.folder / f"ranges-{chosen}-{stored}.json"
        table, note = cached(path, key, make)
        log(note)
    return text(table, limit)


def _calibration_steps(context: Context) -> tuple[SimplifyStep, CalibrationStep]:
    """The graph and the calibration set, both up to date."""
    export = ExportStep(context)
    simplify, calibration = SimplifyStep(context, export), CalibrationStep(context)
    for step in (export, simplify):
        if why := step.stale():
            raise InputError(f"{step.folder}: {why}: run python -m pipeline run first")
    if calibration.stale():
        calibration.run()
    return simplify, calibration
