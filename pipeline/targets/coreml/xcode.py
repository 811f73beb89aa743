"""Reads Xcode's performance reports (`NAME.mlperf`, a folder with `report.json`).

Apple does not publish the format. What is read here is what several independent public programs
read alike: the device, the compute units as Core ML numbers them, samples in seconds, and the
model's structure. Anything else in the file stays unread, among it the device's serial number and
name; whatever departs from this is an error. The report does not identify the model's weights: it
is recognized by its operations, and what comes of it says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from pipeline.core.errors import DataError
from pipeline.core.inputs import read_input
from pipeline.core.plain import MOST_BYTES, parse_json
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.results import (
    Device,
    Measurements,
    Model,
    Operation,
    Run,
    Units,
)

SUFFIX = ".mlperf"
REPORT = "report.json"
SOURCE = "Xcode performance report; the model was recognized by its operations, not its weights"

_UNITS: tuple[Units, ...] = ("cpu_only", "cpu_and_gpu", "all", "cpu_and_neural_engine")
"""By the numbers of Core ML's MLComputeUnits."""

_DEVICES: tuple[tuple[str, Literal["cpu", "gpu", "neural_engine"]], ...] = (
    ("neuralengine", "neural_engine"),
    ("gpu", "gpu"),
    ("cpu", "cpu"),
)

Seconds = Annotated[float, Field(gt=0, lt=3600)]
Signature = Counter[tuple[str, str]]
"""Operations of a program without constants: kind and name of the first result."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        alias_generator=to_camel,
        extra="ignore",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # Xcode's own names begin with `model`: older versions warn of it
    )


class _Samples(_Part):
    samples: tuple[Seconds, ...] = Field(min_length=1)


class _Results(_Part):
    predict: _Samples
    load: _Samples | None = None
    model_structure: dict[str, Any]


class _DeviceInfo(_Part):
    model_name: str = Field(min_length=1)
    os_name_and_version_without_build_number: str = Field(min_length=1)


class Report(_Part):
    """What is read of a report."""

    device_info: _DeviceInfo
    compute_unit: int = Field(ge=0, lt=len(_UNITS))
    device_results: _Results


def is_report(path: Path) -> bool:
    """Whether a path looks like a report, by its name or by being a folder."""
    return path.suffix == SUFFIX or path.is_dir()


def read(path: Path) -> Report:
    """Read a report.

    Raises:
        DataError: It is none, or written in another way than those that are known.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        data = read_input(file, MOST_BYTES, DataError, "give the .mlperf folder that Xcode exports")
        parse_json(data, str(file), DataError)  # sets the limits; pydantic's own is strict on JSON
        return Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{file}: {where}: {first['msg']}: {_OTHERWISE}") from error


_OTHERWISE = (
    "this version of Xcode writes its report in a way that is not known here; write its medians "
    "into a result file instead (median_ms, source: Xcode performance report), see docs/coreml.md"
)


def fits(report: Report, package: Path) -> bool:
    """Whether a report is of a program with the operations of this package."""
    from pipeline.emulate.mil.program import read_program

    signature: Signature = Counter(
        (operation.type, operation.outputs[0][0])
        for operation in read_program(package).operations
        if operation.type != "const"
    )
    return signature == Counter((_kind(op), _result(op)) for op in _operations(report))


def measurements(report: Report, file: Path, artifact: Artifact, package: Path) -> Measurements:
    """A report as a result of ours, for the artifact that it fits.

    Args:
        report: The report.
        file: Where it was read: its date is that of the measurement.
        artifact: What was measured.
        package: Its package.
    """
    results, device = report.device_results, report.device_info
    place = file / REPORT if file.is_dir() else file
    placed = tuple(
        Operation(
            name=_result(operation),
            operator=str(operation["operatorName"]),
            device=_device(operation),
            cost=_cost(operation),
        )
        for operation in _operations(report)
    )
    known = any(operation.device != "unknown" for operation in placed)
    return Measurements(
        source=SOURCE,
        measured_at=datetime.fromtimestamp(int(place.stat().st_mtime), UTC),
        model=Model(name=artifact.name, digest=saved.digest(package)),
        device=Device(model=device.model_name, os=device.os_name_and_version_without_build_number),
        runs=(
            Run(
                compute_units=_UNITS[report.compute_unit],
                load_ms=tuple(1e3 * s for s in results.load.samples) if results.load else (),
                predict_ms=tuple(1e3 * s for s in results.predict.samples),
                operations=placed if known else (),
            ),
        ),
    )


def _operations(report: Report) -> Iterator[dict[str, Any]]:
    """Operations of the main function, without constants."""
    program = report.device_results.model_structure
    try:
        for key in ("program", "_0", "functions", "main", "block"):
            program = program[key]
        for operation in program["operations"]:
            if not isinstance(operation, dict):
                raise TypeError("an operation is no mapping")
            if _kind(operation) != "const":
                yield operation
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the report has no structure of an ML Program ({error}): {_OTHERWISE}"
        ) from error


def _kind(operation: dict[str, Any]) -> str:
    """The operation's type without its operation set: "conv" of "ios16.conv"."""
    return str(operation["operatorName"]).rpartition(".")[2]


def _result(operation: dict[str, Any]) -> str:
    return str(_at(operation, "outputs", 0, "name") or "")


def _device(operation: dict[str, Any]) -> Literal["cpu", "gpu", "neural_engine", "unknown"]:
    stated = _at(operation, "deviceUsage", "preferred", "deviceType")
    text = str(stated or "").lower().replace("_", "")
    return next((device for part, device in _DEVICES if part in text), "unknown")


def _cost(operation: dict[str, Any]) -> float | None:
    weight = _at(operation, "cost", "weight")
    return weight if isinstance(weight, float) and 0 <= weight <= 1 else None


def _at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys and places in lists; None where there is no such thing."""
    for key in path:
        if isinstance(key, str):
            value = value.get(key) if isinstance(value, dict) else None
        else:
            value = next(iter(value[key:]), None) if isinstance(value, list) else None
    return value
