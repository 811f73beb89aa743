"""Measurements on Apple's devices: taken from a Mac, or imported from elsewhere.

Either way the result is a file of the published format (`targets.coreml.results`), which belongs to
the artifact whose package has the digest that it names. It is kept as the target's measurement, so
that reports show it, until the artifact or the configuration changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.console import QuietConsole
from pipeline.config import Config
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.figures import Number
from pipeline.scheduler.plan import make_context, plan
from pipeline.stages.bench import BenchStep
from pipeline.stages.build import BuildStep, in_precisions
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import LOG_FILE, locked
from pipeline.steps.log import Log
from pipeline.steps.step import Context

if TYPE_CHECKING:
    from pipeline.targets.coreml.options import CoreMLOptions
    from pipeline.targets.coreml.results import DeviceClass, Measurements

PACKAGE = "model.mlpackage"
AGREEMENT = "agreement_by_compute_units"
_VALIDATED = 256
"""Images on which a Mac's compute units are compared with PyTorch."""

Measured = dict[str, "Measurements"]
"""By precision."""


def import_coreml(
    config: Config,
    file: Path,
    *,
    precisions: Sequence[str] = (),
    device: DeviceClass | None = None,
) -> str:
    """Take over what was measured on a device; returns what was taken.

    Args:
        config: The configuration of the run that built the model.
        file: A result file, or Xcode's performance report.
        precisions: Only of these artifacts; a report may fit several.
        device: Class of device that it has to be from.

    Raises:
        DataError: The file is no measurement, or one of another class of device.
        ArtifactError: It is one of a model that was not built here.
    """
    from pipeline.targets.coreml import results, xcode

    report = xcode.read(file) if xcode.is_report(file) else None
    measured = None if report else results.read(file)

    def find(context: Context, builds: Sequence[BuildStep]) -> Measured:
        chosen = in_precisions(builds, precisions)
        if report:
            fitting = [b for b in chosen if xcode.fits(report, b.artifact().folder / PACKAGE)]
            if len(fitting) != 1:
                raise _not_one(file, chosen, fitting)
            artifact = fitting[0].artifact()
            found = xcode.measurements(report, file, artifact, artifact.folder / PACKAGE)
            build = fitting[0]
        else:
            assert measured is not None
            found, build = measured, _measured_build(chosen, measured)
        artifact = build.artifact()
        results.check(found, artifact, artifact.folder / PACKAGE, device)
        return {build.precision: found}

    return _take_over(config, find, f"from {file}")


def measure_coreml(
    config: Config, device: DeviceClass, *, precisions: Sequence[str] = (), samples: int | None
) -> str:
    """Measure on this Mac, or on the iPhone or iPad that is connected to it.

    Args:
        config: The configuration of the run that built the models.
        device: "mac", "iphone" or "ipad".
        precisions: Only these artifacts.
        samples: Timed predictions on each set of compute units; None for the configuration's.

    Raises:
        UnavailableError: This is no Mac, or the device or Xcode is missing.
        BuildError: The measuring app cannot be built, signed or started.
    """
    from pipeline.targets.coreml import device as devices

    devices.require_mac()
    count = samples or config.bench.samples
    agreement: list[dict[str, Any]] = []

    def measure(context: Context, builds: Sequence[BuildStep]) -> Measured:
        found = {}
        for build in in_precisions(builds, precisions):
            artifact = build.artifact()
            package = artifact.folder / PACKAGE
            if device == "mac":
                found[build.precision] = devices.measure_mac(artifact, package, samples=count)
                agreement.extend(_compare_units(context, artifact, build.precision))
            else:
                found[build.precision] = devices.measure_connected(
                    artifact, package, kind=device, signing=_signing(config), samples=count
                )
        return found

    return _take_over(config, measure, "by coremltools", {AGREEMENT: agreement})


def _compare_units(context: Context, artifact: Artifact, precision: str) -> list[dict[str, Any]]:
    """How predictions on each set of compute units agree with PyTorch."""
    import torch

    from pipeline.targets.coreml.device import compare_units

    images = context.source.first_images(_VALIDATED)
    with torch.inference_mode():
        expected = context.source.fused()(torch.from_numpy(images)).numpy()
    found = compare_units(artifact, images, expected)
    return [{"precision": precision, "compute_units": u, **row} for u, row in found.items()]


def _signing(config: Config) -> Any:
    from pipeline.targets.coreml.device import Signing

    options: CoreMLOptions = config.target("coreml")  # type: ignore[assignment]
    return Signing(options.signing_team, options.signing_profile, options.signing_bundle)


def _not_one(file: Path, chosen: Sequence[BuildStep], fitting: Sequence[BuildStep]) -> Exception:
    if fitting:
        names = ", ".join(build.precision for build in fitting)
        return InputError(
            f"{file} fits several artifacts ({names}), which have the same operations: say which "
            "was measured with --precision"
        )
    names = ", ".join(build.precision for build in chosen)
    return ArtifactError(
        f"{file} is of another model: its operations are those of none of {names}; measure the "
        f"{PACKAGE} that lies here"
    )


def _measured_build(builds: Sequence[BuildStep], measured: Measurements) -> BuildStep:
    """The build of the artifact that was measured."""
    from pipeline.targets.coreml import results

    problem: ArtifactError | None = None
    for build in builds:
        artifact = build.artifact()
        try:
            results.check(measured, artifact, artifact.folder / PACKAGE)
        except ArtifactError as error:
            problem = error
        else:
            return build
    raise problem or InputError("no Core ML artifact is built: run python -m pipeline run first")


def _take_over(
    config: Config,
    find: Callable[[Context, Sequence[BuildStep]], Measured],
    origin: str,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Keep measurements as those of the target, beside earlier ones of artifacts unchanged."""
    with locked(config.folder):
        log = Log(config.folder / LOG_FILE)
        try:
            context = make_context(config, log, QuietConsole(log.stream).progress)
            step = _bench_step(plan(context))
            new = find(context, step.builds)
            measured = {**_earlier(step), **new}

            def write(folder: Path) -> Mapping[str, Any]:
                for precision, each in measured.items():
                    each.write(folder / _file(precision))
                return {**_facts(step, measured), **(facts or {})}

            step.make(write)
        finally:
            log.close()
    lines = [_line(precision, each) for precision, each in new.items()]
    return "\n".join([*lines, f"{origin}; python -m pipeline run shows it in the report"])


def _bench_step(steps: Sequence[Any]) -> BenchStep:
    found = [s for s in steps if isinstance(s, BenchStep) and s.runtime.name == "coreml"]
    if not found:
        raise InputError("the configuration has no target coreml: add it under targets")
    return found[0]


def _file(precision: str) -> str:
    return f"{precision}.json"


def _earlier(step: BenchStep) -> Measured:
    """Measurements that were taken over before, as far as they still belong to an artifact."""
    from pipeline.targets.coreml import results

    found = {}
    for build in step.builds:
        file = step.folder / _file(build.precision)
        if file.is_file() and build.folder.exists():
            measured, artifact = results.read(file), build.artifact()
            try:
                results.check(measured, artifact, artifact.folder / PACKAGE)
            except ArtifactError:
                continue  # of an artifact that was built anew since
            found[build.precision] = measured
    return found


def _facts(step: BenchStep, measured: Measured) -> dict[str, Any]:
    """What the report says: the latency of each precision, and all that was measured."""
    why = "another precision was measured"
    latency = {
        build.precision: _steady(measured[build.precision])
        if build.precision in measured
        else Number.not_measured(why, unit="ms")
        for build in step.builds
    }
    return {
        "target": step.runtime.name,
        "latency": {name: number.to_dict() for name, number in latency.items()},
        "on_devices": [row for name, each in measured.items() for row in _rows(name, each)],
        "outside_the_neural_engine": [
            {
                "precision": name,
                "compute_units": run.compute_units,
                **operation.model_dump(mode="json"),
            }
            for name, each in measured.items()
            for run in each.runs
            for operation in run.operations
            if operation.device != "neural_engine" and "neural" in run.compute_units
        ],
    }


def _units(measured: Measurements) -> str:
    """The compute units that stand for a measurement: all, as apps have it."""
    units = [run.compute_units for run in measured.runs]
    return "all" if "all" in units else units[0]


def _steady(measured: Measurements) -> Number:
    from pipeline.targets.coreml import results

    return results.numbers(measured)[_units(measured)]["predict"]


def _rows(precision: str, measured: Measurements) -> list[dict[str, Any]]:
    from pipeline.targets.coreml import results

    numbers = results.numbers(measured)
    return [
        {
            "precision": precision,
            "compute_units": run.compute_units,
            **{f"{phase}_ms": number.value for phase, number in numbers[run.compute_units].items()},
            "samples": len(run.predict_ms) or None,
            "thermal": f"{run.thermal_before}, {run.thermal_after}",
            "on_neural_engine": results.placement(run).get("share_on_neural_engine"),
            "device": f"{measured.device.model}, {measured.device.os}",
            "date": measured.measured_at.strftime("%Y-%m-%d"),
            "source": measured.source,
        }
        for run in measured.runs
    ]


def _line(precision: str, measured: Measurements) -> str:
    units = _units(measured)
    median = _steady(measured).value
    return f"coreml/{precision}: {median:.3f} ms on {measured.device.model} ({units})"
