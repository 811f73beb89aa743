"""Measuring on a Mac, and on an iPhone or iPad that is connected to it.

Uses coremltools' own tools: `MLModelBenchmarker` for load and prediction times, `MLComputePlan` for
where operations run, `remote_device` for connected devices. These take arrays only, so that a
device measures the twin of a package (see `package.as_arrays`): the same operations and weights.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import figures
from pipeline.core.errors import BuildError, UnavailableError
from pipeline.core.network import Logits
from pipeline.core.preprocess import Pictures
from pipeline.steps.artifact import Artifact
from pipeline.targets.apple import mac_model, thermal_state
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.convert import COMPUTE_UNITS
from pipeline.targets.coreml.results import Device, Measurements, Model, Operation, Run

LOADS = 3
_DEVICES = {"iphone": "IPHONE", "ipad": "IPAD"}


@dataclass(frozen=True)
class Signing:
    """What Xcode signs the measuring app with; either a team or a provisioning profile.

    Attributes:
        team: Identifier of the development team.
        profile: UUID of a provisioning profile.
        bundle: Bundle identifier; with a profile, the one that it names.
    """

    team: str = ""
    profile: str | None = None
    bundle: str | None = None


def measure_mac(
    artifact: Artifact, package: Path, *, samples: int = 200, units: Iterable[str] = COMPUTE_UNITS
) -> Measurements:
    """Measure a package on this Mac.

    Args:
        artifact: What the package belongs to.
        package: A classifier of ours.
        samples: Timed predictions for each of `units`.
        units: Compute units, see `convert.COMPUTE_UNITS`.

    Raises:
        UnavailableError: This is no Mac.
    """
    require_mac()
    device = Device(model=mac_model(), os=f"macOS {platform.mac_ver()[0]}")
    return asyncio.run(_measure(artifact, package, device, None, samples, units))


def measure_connected(
    artifact: Artifact,
    package: Path,
    *,
    kind: str = "iphone",
    signing: Signing | None = None,
    samples: int = 200,
    units: Iterable[str] = COMPUTE_UNITS,
) -> Measurements:
    """Measure a package on a device that is connected to this Mac.

    Builds coremltools' measuring app with Xcode, installs it and drives it.

    Args:
        artifact: What the package belongs to.
        package: A classifier of ours.
        kind: "iphone" or "ipad".
        signing: How to sign the app.
        samples: Timed predictions for each of `units`.
        units: Compute units, see `convert.COMPUTE_UNITS`.

    Raises:
        UnavailableError: This is no Mac, Xcode is missing, or no such device is connected.
        BuildError: The app cannot be built, signed or started.
    """
    require_mac()
    if shutil.which("xcodebuild") is None:
        raise UnavailableError("measuring on a device needs Xcode: install it from the App Store")

    async def measured() -> Measurements:
        remote = await _prepared(kind, signing or Signing())
        device = Device(model=remote.type.value, os=f"iOS {remote.os_version}")
        return await _measure(artifact, package, device, remote, samples, units)

    return asyncio.run(measured())


def compare_units(artifact: Artifact, pictures: Pictures, reference: Logits) -> dict[str, Any]:
    """Validate predictions on each set of compute units of this Mac.

    Args:
        artifact: What `CoreMLTarget` built.
        pictures: Real images.
        reference: PyTorch's logits of them, (batch, classes).

    Returns:
        Plain `measure.Comparison` values by compute units.

    Raises:
        UnavailableError: This is no Mac.
    """
    require_mac()
    from dataclasses import asdict

    from pipeline.targets.coreml.package import MODEL
    from pipeline.targets.coreml.runner import CoreMLRunner

    found = {}
    for units in COMPUTE_UNITS:
        with CoreMLRunner(artifact.folder / MODEL, artifact.network(), units) as runner:
            found[units] = asdict(figures.compare(runner(pictures.pixels), reference))
    return found


def placement(package: Path, units: str) -> tuple[Operation, ...]:
    """Where each operation of a package would run on this Mac, and its share of the cost.

    Raises:
        UnavailableError: This is no Mac.
    """
    require_mac()
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    compute_units = getattr(ct.ComputeUnit, COMPUTE_UNITS[units])
    model = ct.models.MLModel(str(package), compute_units=compute_units)
    plan = MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units)
    return operations_of(plan)


def operations_of(plan: Any) -> tuple[Operation, ...]:
    """Plain operations of an `MLComputePlan`, without constants."""
    program = plan.model_structure.program
    if program is None:
        raise BuildError("Core ML's compute plan is of no ML Program")
    found = []
    for operation in program.functions["main"].block.operations:
        if operation.operator_name.rpartition(".")[2] == "const":
            continue
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        found.append(
            Operation(
                name=operation.outputs[0].name if operation.outputs else "",
                operator=operation.operator_name,
                device=_device(None if usage is None else usage.preferred_compute_device),
                cost=None if cost is None else cost.weight,
            )
        )
    return tuple(found)


def _device(device: Any) -> Any:
    """Name of a compute device, by its class: here and on a connected device these differ."""
    kind = type(device).__name__
    for part, name in (("CPU", "cpu"), ("GPU", "gpu"), ("NeuralEngine", "neural_engine")):
        if part in kind:
            return name
    return "unknown"


async def _measure(
    artifact: Artifact,
    package: Path,
    device: Device,
    remote: Any,
    samples: int,
    units: Iterable[str],
) -> Measurements:
    model = Model(name=artifact.name, digest=saved.digest(package))
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder, "twin.mlpackage")
        saved.as_arrays(package, twin)
        runs = [await _run(twin, name, remote, samples) for name in units]
    source = "coremltools MLModelBenchmarker, array input"
    now = datetime.now(UTC).replace(microsecond=0)
    return Measurements(
        source=source, measured_at=now, model=model, device=device, runs=tuple(runs)
    )


async def _run(twin: Path, units: str, remote: Any, samples: int) -> Run:
    import coremltools as ct
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    # Loaded by the benchmarker, and on the device alone if there is one.
    model = ct.models.MLModel(
        str(twin),
        compute_units=getattr(ct.ComputeUnit, COMPUTE_UNITS[units]),
        skip_model_load=True,
    )
    array = model.get_spec().description.input[0].type.multiArrayType
    pixels = np.random.default_rng(0).integers(0, 256, tuple(array.shape)).astype(np.float32)
    benchmarker = MLModelBenchmarker(model=model, device=remote)
    before = thermal_state() if remote is None else "unknown"
    load = await benchmarker.benchmark_load(iterations=LOADS)
    inputs = {saved.IMAGE: pixels}
    first = await benchmarker.benchmark_predict(inputs=inputs, iterations=1, warmup=False)
    steady = await benchmarker.benchmark_predict(inputs=inputs, iterations=samples, warmup=True)
    placed = await benchmarker.benchmark_operation_execution(inputs=inputs, iterations=1)
    return Run(
        compute_units=units,  # type: ignore[arg-type]
        load_ms=tuple(load.samples),
        first_ms=first.samples[0],
        predict_ms=tuple(steady.samples),
        thermal_before=before,
        thermal_after=thermal_state() if remote is None else "unknown",
        operations=_executed(placed),
    )


def _executed(placed: Iterable[Any]) -> tuple[Operation, ...]:
    """Operations of coremltools' `OperationExecutionInfo`s, without constants, costliest first.

    Their times are Core ML's estimate of a share times the prediction's; here they become shares.
    """
    infos = [info for info in placed if info.spec.type != "const"]
    times = [sum(info.measurement.samples) for info in infos]
    total = sum(times)
    found = []
    for info, time in zip(infos, times, strict=True):
        usage = info.compute_device_usage
        found.append(
            Operation(
                name=info.spec.outputs[0].name if info.spec.outputs else "",
                operator=info.spec.type,
                device=_device(None if usage is None else usage.preferred_compute_device),
                cost=time / total if info.measurement.samples and total else None,
            )
        )
    return tuple(found)


async def _prepared(kind: str, signing: Signing) -> Any:
    """A connected device with the measuring app running on it."""
    from coremltools.models.ml_program.experimental import remote_device

    device_type = getattr(remote_device.DeviceType, _DEVICES[kind])
    connected = remote_device.Device.get_connected_devices(device_type)
    if not connected:
        raise UnavailableError(
            f"no {kind} is connected: plug it in, unlock it, trust this Mac and turn on its "
            "developer mode"
        )
    credentials = remote_device.AppSigningCredentials(
        development_team=signing.team,
        provisioning_profile_uuid=signing.profile,
        bundle_identifier=signing.bundle,
    )
    try:
        return await connected[0].prepare_for_model_debugging(credentials=credentials)
    # coremltools hands on whatever xcodebuild and devicectl say.
    except Exception as error:
        raise BuildError(
            f"the measuring app does not run on {connected[0].name}: {error}; see the signing "
            "options"
        ) from error


def require_mac() -> None:
    """Raise UnavailableError where this is no Mac."""
    if platform.system() != "Darwin":
        raise UnavailableError(
            "measuring Core ML needs macOS: run the same command on a Mac, or export a Swift "
            "package with `python -m pipeline export coreml-bench NAME` and import its result"
        )
