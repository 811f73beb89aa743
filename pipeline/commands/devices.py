"""`bench --device`, `bench --import`: measurements on devices that this machine is not.

What the target measures or reads is kept as its measurement, so that reports show it, until the
artifact or the configuration changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.artifacts import bench_step, log_of
from pipeline.commands.console import QuietConsole
from pipeline.config import Config
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.figures import Number
from pipeline.scheduler.plan import make_context
from pipeline.stages.build import in_precisions
from pipeline.stages.context import RunContext
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import locked
from pipeline.targets.base import DeviceJob
from pipeline.targets.registry import TARGETS, able

if TYPE_CHECKING:
    from pipeline.core.network import Logits
    from pipeline.core.preprocess import Pictures
    from pipeline.stages.bench import BenchStep
    from pipeline.targets.base import DeviceMeasurement

COMPARED = 256
"""Validation images on which a device's answers are compared with PyTorch."""

Measured = dict[str, "DeviceMeasurement"]
"""By precision."""

Find = Callable[[RunContext, Mapping[str, Artifact]], Measured]


def import_measurements(
    config: Config,
    target: str,
    file: Path,
    *,
    precisions: Sequence[str] = (),
    device: str | None = None,
) -> str:
    """Take over what was measured on a device; returns what was taken.

    Args:
        config: The configuration of the run that built the model.
        target: The target that was measured.
        file: A result file of a kind that the target knows.
        precisions: Only of these artifacts; a file may fit several.
        device: Kind of device that it has to be from.

    Raises:
        InputError: The target imports nothing.
        DataError: The file is no measurement, or one of another kind of device.
        ArtifactError: It is one of a model that was not built here.
    """
    if target not in able("read_measurements"):
        known = ", ".join(able("read_measurements"))
        raise InputError(f"{target} imports no measurements; those that do are {known}")
    _refuse_unknown(target, device)

    def find(context: RunContext, artifacts: Mapping[str, Artifact]) -> Measured:
        return TARGETS[target].read_measurements(file, artifacts, device)

    return _take_over(config, target, precisions, find, f"from {file}")


def measure_on(
    config: Config,
    target: str,
    device: str,
    *,
    precisions: Sequence[str] = (),
    samples: int | None = None,
) -> str:
    """Measure on a device that is connected to this machine; returns what was measured.

    Args:
        config: The configuration of the run that built the models.
        target: The target to measure.
        device: A kind of device that the target knows.
        precisions: Only these artifacts.
        samples: Timed predictions; None for the configuration's.

    Raises:
        InputError: The target knows no such device.
        UnavailableError: The device, or what talks to it, is missing.
        BuildError: What measures cannot be built or started.
    """
    _refuse_unknown(target, device)
    options = config.target(target)
    if options is None:
        raise InputError(f"the configuration has no target {target}: add it under targets")

    def find(context: RunContext, artifacts: Mapping[str, Artifact]) -> Measured:
        @cache
        def pictures() -> Pictures:
            return context.source.first_pictures(COMPARED)

        job = DeviceJob(
            options=options,
            samples=samples or config.bench.samples,
            pictures=pictures,
            expected=cache(lambda: _reference(context, pictures())),
        )
        return TARGETS[target].measure_on(device, artifacts, job)

    return _take_over(config, target, precisions, find, f"measured on the {device}")


def _reference(context: RunContext, pictures: Pictures) -> Logits:
    import torch

    with torch.inference_mode():
        logits: Logits = context.source.fused()(torch.from_numpy(pictures.images)).numpy()
    return logits


def _refuse_unknown(target: str, device: str | None) -> None:
    known = TARGETS[target].devices
    if device is not None and device not in known:
        others = {name: kinds for name in TARGETS if (kinds := TARGETS[name].devices)}
        text = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in others.items())
        raise InputError(f"{target} is not measured on a device {device!r}; there are {text}")


def _take_over(
    config: Config, target: str, precisions: Sequence[str], find: Find, origin: str
) -> str:
    """Keep measurements as those of the target, beside earlier ones of artifacts unchanged."""
    with locked(config.folder), log_of(config) as log:
        context = make_context(config, log, QuietConsole(log.stream).progress)
        step = bench_step(context, target)
        unjudged = [judge for judge in step.judges.values() if not judge.folder.exists()]
        if unjudged:
            step.do_without(unjudged)
        chosen = {b.precision: b.verified() for b in in_precisions(step.builds, precisions)}
        new = find(context, chosen)
        measured = {**_earlier(step), **new}

        def write(folder: Path) -> Mapping[str, Any]:
            for precision, each in measured.items():
                (folder / _file(precision)).write_text(each.content)
            return _facts(step, measured)

        step.make(write)
    lines = [each.line for each in new.values()]
    return "\n".join([*lines, f"{origin}; python -m pipeline run shows it in the report"])


def _file(precision: str) -> str:
    return f"{precision}.json"


def _earlier(step: BenchStep) -> Measured:
    """Measurements that were taken over before, as far as they still belong to an artifact."""
    found: Measured = {}
    for build in step.builds:
        file = step.folder / _file(build.precision)
        if not file.is_file() or not build.folder.exists():
            continue
        try:
            found |= step.runtime.read_measurements(file, {build.precision: build.artifact()}, None)
        except ArtifactError:
            continue  # of an artifact that was built anew since
    return found


def _facts(step: BenchStep, measured: Measured) -> dict[str, Any]:
    """What the report says: the latency of each precision, and all that was measured."""
    why = "another precision was measured"
    latency = {}
    for build in step.builds:
        known = measured.get(build.precision)
        latency[build.precision] = known.latency if known else Number.not_measured(why, unit="ms")
    tables: dict[str, list[dict[str, Any]]] = {}
    for each in measured.values():
        for name, rows in each.tables.items():
            tables.setdefault(name, []).extend(rows)
    return {
        "target": step.runtime.name,
        "latency": {name: number.to_dict() for name, number in latency.items()},
        **tables,
    }
