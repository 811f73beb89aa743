"""Measuring on a Mac: load, first and steady prediction by each preference of compute units.

By the system's own Core AI, through the packages that build. Each preference also answers real
images: wrong numbers without an error were reported, so that a latency alone says little.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core import figures
from pipeline.core.errors import UnavailableError
from pipeline.core.network import Images, Logits
from pipeline.steps.artifact import Artifact
from pipeline.targets.apple import mac_model, thermal_state
from pipeline.targets.base import DeviceJob, DeviceMeasurement
from pipeline.targets.coreai.package import MODEL, check, digest
from pipeline.targets.coreai.results import (
    Device,
    Measurements,
    Model,
    Run,
    described,
)
from pipeline.targets.coreai.runtime import CPU_ONLY, UNITS, Runtime, has_units

AGREEMENT = "agreement_by_compute_units"
LOADS = 3
WARMUP = 10
SOURCE = "coreai-core on this Mac, array input"
_NO_UNITS = (
    "Core AI's packages use the runtime that they bring, which knows no compute units: unset "
    "USE_LOCAL_COREAI, or install coreai-core from its wheel"
)


def measure_mac(artifacts: Mapping[str, Artifact], job: DeviceJob) -> dict[str, DeviceMeasurement]:
    """Measure assets on this Mac; see `Target.measure_on`.

    Raises:
        UnavailableError: Its Core AI offers no choice of compute units.
        ArtifactError: An asset is damaged or foreign, or Core AI does not load it.
    """
    if not has_units():
        raise UnavailableError(_NO_UNITS)
    return {precision: _measure(precision, each, job) for precision, each in artifacts.items()}


def _measure(precision: str, artifact: Artifact, job: DeviceJob) -> DeviceMeasurement:
    package, network = artifact.folder / MODEL, artifact.network()
    check(package, network)
    images, expected = job.pictures().images, job.expected()
    runs: list[Run] = []
    agreement: list[dict[str, Any]] = []
    reference: Logits | None = None
    # The CPU comes first: its logits are what the others are held against.
    for unit in (CPU_ONLY, *(unit for unit in UNITS if unit != CPU_ONLY)):
        run, logits = _run(package, unit, images, job.samples, reference)
        reference = logits if reference is None else reference
        runs.append(run)
        compared = figures.compare(logits, expected)
        agreement.append({"precision": precision, "compute_unit": unit, **vars(compared)})
    measured = Measurements(
        source=SOURCE,
        measured_at=datetime.now(UTC).replace(microsecond=0),
        model=Model(name=f"{network.name} {artifact.name}", digest=digest(package)),
        device=Device(model=mac_model(), os=f"macOS {platform.mac_ver()[0]}"),
        runs=tuple(runs),
    )
    return described(precision, measured, {AGREEMENT: agreement})


def _run(
    package: Path, unit: str, images: Images, samples: int, reference: Logits | None
) -> tuple[Run, Logits]:
    """Measurements by one preference, and its logits of all images."""
    before = thermal_state()
    loads = [_load(package, unit) for _ in range(LOADS)]
    runtime = Runtime(package, unit)
    try:
        (first,) = runtime.timed(images[0], 1)
        runtime.timed(images[0], WARMUP)
        times = runtime.timed(images[0], samples)
        logits = runtime(images)
    finally:
        runtime.close()
    off = figures.compare(logits, logits if reference is None else reference)
    run = Run(
        compute_unit=unit,  # type: ignore[arg-type]
        load_ms=tuple(loads),
        first_ms=first,
        predict_ms=tuple(times),
        difference_to_cpu_only=off.relative_error if off.finite else None,
        thermal_before=before,
        thermal_after=thermal_state(),
    )
    return run, logits


def _load(package: Path, unit: str) -> float:
    """Milliseconds of a load. The first one of a preference fits the program to the hardware."""
    start = time.perf_counter()
    runtime = Runtime(package, unit)
    took = 1e3 * (time.perf_counter() - start)
    runtime.close()
    return took
