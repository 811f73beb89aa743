"""Measurements on Apple's devices, as the pipeline takes them: from a Mac, or from a result file.

Either way the result is a file of the published format (`results`), which belongs to the artifact
whose package has the digest that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core import words
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.figures import Number
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import DeviceJob, DeviceMeasurement
from pipeline.targets.coreml import device as devices
from pipeline.targets.coreml import results, xcode
from pipeline.targets.coreml.options import CoreMLOptions
from pipeline.targets.coreml.package import MODEL
from pipeline.targets.coreml.results import Measurements

AGREEMENT = "agreement_by_compute_units"


def measure_on(
    kind: str, artifacts: Mapping[str, Artifact], job: DeviceJob
) -> dict[str, DeviceMeasurement]:
    """Measure on this Mac, or on the iPhone or iPad that is connected to it; see `Target`."""
    devices.require_mac()
    options = job.options
    assert isinstance(options, CoreMLOptions)
    signing = devices.Signing(options.signing_team, options.signing_profile, options.signing_bundle)
    found = {}
    for precision, artifact in artifacts.items():
        package = artifact.folder / MODEL
        if kind == "mac":
            measured = devices.measure_mac(artifact, package, samples=job.samples)
            compared = devices.compare_units(artifact, job.pictures(), job.expected())
        else:
            measured = devices.measure_connected(
                artifact,
                package,
                kind="iphone" if kind == "iphone" else "ipad",
                signing=signing,
                samples=job.samples,
            )
            compared = {}
        agreement = [
            {"precision": precision, "compute_units": units, **row}
            for units, row in compared.items()
        ]
        found[precision] = described(precision, measured, {AGREEMENT: agreement})
    return found


def read_measurements(
    file: Path, artifacts: Mapping[str, Artifact], kind: str | None
) -> dict[str, DeviceMeasurement]:
    """Read a result file or Xcode's performance report; see `Target`."""
    if xcode.is_report(file):
        precision, measured = _of_report(file, artifacts)
    else:
        measured = results.read(file)
        precision = _measured_artifact(artifacts, measured)
    artifact = artifacts[precision]
    results.check(measured, artifact, artifact.folder / MODEL, kind)
    return {precision: described(precision, measured)}


def _of_report(file: Path, artifacts: Mapping[str, Artifact]) -> tuple[str, Measurements]:
    report = xcode.read(file)
    fitting = [
        precision
        for precision, artifact in artifacts.items()
        if xcode.fits(report, artifact.folder / MODEL)
    ]
    if len(fitting) > 1:
        raise InputError(
            f"{file} fits several artifacts ({', '.join(fitting)}), which have the same "
            "operations: say which was measured with --precision"
        )
    if not fitting:
        raise ArtifactError(
            f"{file} is of another model: its operations are those of none of "
            f"{', '.join(artifacts)}; measure the {MODEL} that lies here"
        )
    artifact = artifacts[fitting[0]]
    return fitting[0], xcode.measurements(report, file, artifact, artifact.folder / MODEL)


def _measured_artifact(artifacts: Mapping[str, Artifact], measured: Measurements) -> str:
    """Precision of the artifact that was measured."""
    problem: ArtifactError | None = None
    for precision, artifact in artifacts.items():
        try:
            results.check(measured, artifact, artifact.folder / MODEL)
        except ArtifactError as error:
            problem = error
        else:
            return precision
    raise problem or InputError("no Core ML artifact is built: run python -m pipeline run first")


def described(
    precision: str,
    measured: Measurements,
    tables: Mapping[str, list[dict[str, Any]]] | None = None,
) -> DeviceMeasurement:
    """A result file as the pipeline keeps and shows it.

    Args:
        precision: Of the artifact that it belongs to.
        measured: The result file.
        tables: Further tables for the report.
    """
    latency = _steady(measured)
    shown = {
        "on_devices": _rows(precision, measured),
        "outside_the_neural_engine": _elsewhere(precision, measured),
        **(tables or {}),
    }
    line = (
        f"coreml/{precision}: {latency.value:.3f} ms on {words.shown(measured.device.model)} "
        f"({_units(measured)})"
    )
    wrong = [run.compute_units for run in measured.runs if run.golden and not run.golden.holds]
    if wrong:
        line += (
            f"; by {', '.join(wrong)} it does not give what was built for the golden images: do "
            "not ship it with these"
        )
    return DeviceMeasurement(
        latency=latency,
        line=line,
        content=measured.model_dump_json(indent=1) + "\n",
        tables={name: rows for name, rows in shown.items() if rows},
    )


def _units(measured: Measurements) -> str:
    """The compute units that stand for a measurement: all, as apps have it."""
    units = [run.compute_units for run in measured.runs]
    return "all" if "all" in units else units[0]


def _steady(measured: Measurements) -> Number:
    return results.numbers(measured)[_units(measured)]["predict"]


def _elsewhere(precision: str, measured: Measurements) -> list[dict[str, Any]]:
    """Operations that ran outside the Neural Engine where it was allowed."""
    return [
        {
            "precision": precision,
            "compute_units": run.compute_units,
            **operation.model_dump(mode="json"),
        }
        for run in measured.runs
        if "neural" in run.compute_units
        for operation in run.operations
        if operation.device != "neural_engine"
    ]


def _rows(precision: str, measured: Measurements) -> list[dict[str, Any]]:
    numbers = results.numbers(measured)
    return [
        {
            "precision": precision,
            "compute_units": run.compute_units,
            **{f"{phase}_ms": number.value for phase, number in numbers[run.compute_units].items()},
            "samples": len(run.predict_ms) or None,
            "golden": run.golden.words if run.golden else None,
            "thermal": f"{run.thermal_before}, {run.thermal_after}",
            "on_neural_engine": results.placement(run).get("share_on_neural_engine"),
            "device": f"{measured.device.model}, {measured.device.os}",
            "date": measured.measured_at.strftime("%Y-%m-%d"),
            "source": measured.source,
        }
        for run in measured.runs
    ]
