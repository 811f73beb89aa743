"""Measurements from devices: the file that a measuring program writes, and reading it here.

A Mac writes it (`device`), or the Swift package that `export coreml-bench --target coreai` writes.
Both time the asset by every preference of compute units and compare their logits with those of the
CPU alone, since wrong numbers without an error are what people reported; the Swift package lets the
asset answer the golden images as well. Latencies are single calls in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.core import words
from pipeline.core.errors import ArtifactError, DataError, InputError
from pipeline.core.figures import Latency, Number, State
from pipeline.core.plain import read_json
from pipeline.steps.artifact import Artifact
from pipeline.targets.apple import Golden, Milliseconds, Part, Thermal
from pipeline.targets.base import DeviceMeasurement
from pipeline.targets.coreai.package import MODEL, digest

FORMAT: Literal["care-deploy/coreai-bench/1"] = "care-deploy/coreai-bench/1"
_MOST_BYTES = 100_000_000
_WRONG = 0.02
"""Relative difference to the CPU's logits from which on a device's are wrong, not rounded.

Two ways to round differ by up to 0.01 here; the wrong numbers that were reported of MobileNetV3, by
0.039 (https://github.com/apple/coreai-torch/issues/51).
"""


class Model(Part):
    """Which asset was measured."""

    name: str = Field(min_length=1, description="Name of the run and precision.")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of main.mlirb.")


class Device(Part):
    """What measured it."""

    model: str = Field(min_length=1, description="Hardware identifier, such as iPhone18,1.")
    os: str = Field(min_length=1, description="System and version, such as iOS 27.0.")

    @property
    def kind(self) -> str:
        """The class of device, by its identifier: "iphone", "ipad" or "mac"."""
        for kind in ("iphone", "ipad"):
            if self.model.lower().startswith(kind):
                return kind
        return "mac"


class Run(Part):
    """Measurements by one preference of compute units."""

    compute_unit: Literal["default", "cpu_only", "gpu", "neural_engine"]
    load_ms: tuple[Milliseconds, ...] = Field(min_length=1, description="Each load, in order.")
    first_ms: Milliseconds = Field(description="First prediction after the load.")
    predict_ms: tuple[Milliseconds, ...] = Field(min_length=1, description="Each call, in order.")
    difference_to_cpu_only: float | None = Field(
        default=None, ge=0, description="Of the logits, relative, Euclidean; null if not finite."
    )
    thermal_before: Thermal = "unknown"
    thermal_after: Thermal = "unknown"
    golden: Golden | None = Field(default=None, description="None where there was no golden kit.")


class Measurements(Part):
    """A result file."""

    format: Literal["care-deploy/coreai-bench/1"] = FORMAT
    source: str = Field(default="coreai-bench", description="What measured.")
    measured_at: datetime
    model: Model
    device: Device
    runs: tuple[Run, ...] = Field(min_length=1)


def read(path: Path) -> Measurements:
    """Read a result file.

    Raises:
        DataError: It cannot be read, or is no result file; the message says where it departs.
    """
    plain = read_json(path, DataError, _MOST_BYTES)
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise DataError(f"{path} is no result file: its format is not {FORMAT}")
    try:
        return Measurements.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}") from error


def read_measurements(
    file: Path, artifacts: Mapping[str, Artifact], kind: str | None
) -> dict[str, DeviceMeasurement]:
    """Read a result file and find the artifact that it belongs to; see `Target`."""
    measured = read(file)
    if kind is not None and measured.device.kind != kind:
        raise DataError(
            f"the result was measured on {measured.device.model}, a device of class "
            f"{measured.device.kind}, where {kind} was asked for"
        )
    for precision, artifact in artifacts.items():
        if digest(artifact.folder / MODEL) == measured.model.digest:
            return {precision: described(precision, measured)}
    if not artifacts:
        raise InputError("no Core AI artifact is built: run python -m pipeline run first")
    raise ArtifactError(
        f"{file} is of another model ({measured.model.name}, {measured.model.digest[:12]}) than "
        f"{', '.join(artifacts)}: export coreml-bench --target coreai again and measure that"
    )


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
    run = _standing(measured)
    latency = _median(run.predict_ms, measured, run)
    line = (
        f"coreai/{precision}: {latency.value:.3f} ms on {words.shown(measured.device.model)} "
        f"({run.compute_unit})"
    )
    wrong = [run.compute_unit for run in measured.runs if _is_wrong(run)]
    if wrong:
        line += f"; its logits are wrong by {', '.join(wrong)}: do not ship it with these"
    failed = [run.compute_unit for run in measured.runs if run.golden and not run.golden.holds]
    if failed:
        line += (
            f"; by {', '.join(failed)} it does not give what was built for the golden images: do "
            "not ship it with these"
        )
    return DeviceMeasurement(
        latency=latency,
        line=line,
        content=measured.model_dump_json(indent=1) + "\n",
        tables={
            "on_devices": [_row(precision, measured, run) for run in measured.runs],
            **(tables or {}),
        },
    )


def _standing(measured: Measurements) -> Run:
    """What stands for a measurement: the default, as apps have it."""
    default = [run for run in measured.runs if run.compute_unit == "default"]
    return (default or list(measured.runs))[0]


def _is_wrong(run: Run) -> bool:
    """Far from the CPU's logits, or not finite."""
    difference = run.difference_to_cpu_only
    return difference is None or difference > _WRONG


def _median(samples: tuple[float, ...], measured: Measurements, run: Run) -> Number:
    latency = Latency(samples)
    return Number(
        latency.p50,
        State.MEASURED,
        "ms",
        by=f"Core AI on {measured.device.model}, {measured.device.os} ({measured.source})",
        why=f"thermal state {run.thermal_before} before, {run.thermal_after} after",
        samples=len(samples),
        interval=latency.interval(),
    )


def _row(precision: str, measured: Measurements, run: Run) -> dict[str, Any]:
    return {
        "precision": precision,
        "compute_unit": run.compute_unit,
        "load_ms": Latency(run.load_ms).p50,
        "first_ms": run.first_ms,
        "predict_ms": Latency(run.predict_ms).p50,
        "samples": len(run.predict_ms),
        "difference_to_cpu_only": run.difference_to_cpu_only,
        "logits": "wrong" if _is_wrong(run) else "as by the CPU",
        "golden": run.golden.words if run.golden else None,
        "thermal": f"{run.thermal_before}, {run.thermal_after}",
        "device": f"{measured.device.model}, {measured.device.os}",
        "date": measured.measured_at.strftime("%Y-%m-%d"),
        "source": measured.source,
    }
