"""Measurements from other machines: the file that a phone or a Mac writes, and reading it here.

The format is JSON; `json_schema()` publishes it. Latencies are single calls in milliseconds, so
that percentiles are computed here, by the protocol that everything else follows. Who has summary
figures only gives `median_ms` and says in `source` where they come from. `xcode` reads Xcode's
performance reports.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.figures import Latency, Number, State
from pipeline.core.inputs import read_input
from pipeline.core.plain import MOST_BYTES, parse_json
from pipeline.steps.artifact import Artifact
from pipeline.targets.apple import Golden, Milliseconds, Part, Thermal
from pipeline.targets.coreml import package as saved

FORMAT: Literal["care-deploy/coreml-bench/1"] = "care-deploy/coreml-bench/1"
Units = Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_neural_engine"]
DeviceClass = Literal["iphone", "ipad", "mac", "appletv", "vision", "watch"]

_CLASSES: dict[str, DeviceClass] = {
    "iPhone": "iphone",
    "iPad": "ipad",
    "AppleTV": "appletv",
    "RealityDevice": "vision",
    "Watch": "watch",
}


class Model(Part):
    """Which package was measured."""

    name: str = Field(min_length=1, description="Name of the run and precision.")
    digest: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 over 'path:SHA-256\\n' of every file under Data, sorted by path.",
    )


class Device(Part):
    """What measured it."""

    model: str = Field(min_length=1, description="Hardware identifier, such as iPhone16,1.")
    os: str = Field(min_length=1, description="System and version, such as iOS 18.2.")

    @property
    def kind(self) -> DeviceClass:
        """The class of device, by its identifier; Macs have several families of them."""
        for prefix, kind in _CLASSES.items():
            if self.model.lower().startswith(prefix.lower()):
                return kind
        return "mac"


class Operation(Part):
    """Where one operation runs and what it costs, by Core ML's own estimate."""

    name: str
    operator: str
    device: Literal["cpu", "gpu", "neural_engine", "unknown"]
    cost: float | None = Field(default=None, ge=0, le=1, description="Share of the prediction.")


class Run(Part):
    """Measurements on one set of compute units."""

    compute_units: Units
    load_ms: tuple[Milliseconds, ...] = Field(default=(), description="Each load, in order.")
    first_ms: Milliseconds | None = Field(default=None, description="First prediction after load.")
    predict_ms: tuple[Milliseconds, ...] = Field(default=(), description="Each call, in order.")
    median_ms: Milliseconds | None = Field(default=None, description="If calls are not known.")
    thermal_before: Thermal = "unknown"
    thermal_after: Thermal = "unknown"
    operations: tuple[Operation, ...] = ()
    golden: Golden | None = Field(default=None, description="None where there was no golden kit.")

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if bool(self.predict_ms) == (self.median_ms is not None):
            raise ValueError("a run has either predict_ms or median_ms")
        return self


class Measurements(Part):
    """A result file."""

    format: Literal["care-deploy/coreml-bench/1"] = FORMAT
    source: str = Field(default="coreml-bench", description="What measured, or who read it off.")
    measured_at: datetime
    model: Model
    device: Device
    runs: tuple[Run, ...] = Field(min_length=1)

    def write(self, path: Path) -> None:
        """Write the file."""
        from pipeline.core.files import write_atomically

        write_atomically(path, self.model_dump_json(indent=1) + "\n")


def json_schema() -> dict[str, Any]:
    """The format, as a JSON schema."""
    return Measurements.model_json_schema()


def read(path: Path) -> Measurements:
    """Read a result file.

    Raises:
        DataError: It cannot be read, or is no result file; the message says where it departs.
    """
    data = read_input(path, MOST_BYTES, DataError, "give a result file")
    try:
        plain = parse_json(data, str(path), DataError)
    except DataError as error:
        raise DataError(f"{error}: give the file that coreml-bench wrote") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise DataError(f"{path} is no result file: its format is not {FORMAT}")
    try:
        return Measurements.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}") from error


def check(
    measurements: Measurements,
    artifact: Artifact,
    package: Path,
    device_class: str | None = None,
) -> None:
    """Check that a result is of this artifact, and of the device class that was asked for.

    Raises:
        ArtifactError: It is of another model.
        DataError: It is of another class of device.
    """
    if measurements.model.digest != saved.digest(package):
        raise ArtifactError(
            f"the result is of another model ({measurements.model.name}, "
            f"{measurements.model.digest[:12]}), not of {artifact.folder} "
            f"({saved.digest(package)[:12]}): export coreml-bench again and measure that"
        )
    if device_class is not None and measurements.device.kind != device_class:
        raise DataError(
            f"the result was measured on {measurements.device.model}, a device of class "
            f"{measurements.device.kind}, where {device_class} was asked for"
        )


def numbers(measurements: Measurements) -> dict[str, dict[str, Number]]:
    """Latencies by compute units: load, first prediction, steady prediction; medians."""
    device = measurements.device
    by = f"Core ML on {device.model}, {device.os} ({measurements.source})"
    return {run.compute_units: _numbers(run, by) for run in measurements.runs}


def _numbers(run: Run, by: str) -> dict[str, Number]:
    why = f"the result file has none for {run.compute_units}"
    found = {name: Number.not_measured(why, "ms") for name in ("load", "first")}
    if run.load_ms:
        load = Latency(run.load_ms)
        found["load"] = Number(
            load.p50, State.MEASURED, "ms", by, samples=len(run.load_ms), interval=load.interval()
        )
    if run.first_ms is not None:
        found["first"] = Number(run.first_ms, State.MEASURED, "ms", by, samples=1)
    thermal = f"thermal state {run.thermal_before} before, {run.thermal_after} after"
    if run.median_ms is not None:
        found["predict"] = Number(run.median_ms, State.MEASURED, "ms", by, why=thermal)
    else:
        predict = Latency(run.predict_ms)
        found["predict"] = Number(
            predict.p50,
            State.MEASURED,
            "ms",
            by,
            why=thermal,
            samples=len(run.predict_ms),
            interval=predict.interval(),
        )
    return found


def placement(run: Run) -> dict[str, Any]:
    """Share of a run's operations, and of their cost, on the Neural Engine, and those elsewhere."""
    if not run.operations:
        return {}
    there = [operation for operation in run.operations if operation.device == "neural_engine"]
    elsewhere = [operation for operation in run.operations if operation.device != "neural_engine"]
    cost = sum(operation.cost or 0 for operation in run.operations)
    return {
        "operations": len(run.operations),
        "share_on_neural_engine": len(there) / len(run.operations),
        "cost_on_neural_engine": sum(o.cost or 0 for o in there) / cost if cost else None,
        "elsewhere": [f"{o.name} ({o.operator}): {o.device}" for o in elsewhere],
    }
