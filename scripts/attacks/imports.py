"""Measurements for `bench --import`: result files and Xcode reports with odd bytes and values."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks import ground as grounds
from attacks.attempt import Attempt
from attacks.ground import NAME, PACKAGE, Ground, changed_bytes, changed_json, put_odd
from pipeline.core.errors import DataError
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.results import FORMAT
from pipeline.targets.registry import TARGETS

FILE = "result.json"


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Changed result files, through the functions that the command calls."""
    ground = grounds.make(folder)
    artifact = Artifact.read(ground.results / "coreml/fp16")
    for number in range(count):
        yield Attempt(f"result {number}", partial(_read, ground, artifact, seed, number))


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """The same through the real command."""
    ground = grounds.make(folder)
    for number in range(count):
        yield Attempt(f"result {number}", partial(_import, ground, seed, number))


def _read(ground: Ground, artifact: Artifact, seed: int, number: int) -> None:
    place = _write(ground, seed, number)
    measured = TARGETS["coreml"].read_measurements(place, {"fp16": artifact}, None)
    for each in measured.values():
        assert each.line.isprintable(), f"not printable: {each.line[:80]!a}"
        json.loads(each.content)
    ground.require_canaries()


def _import(ground: Ground, seed: int, number: int) -> None:
    place = _write(ground, seed, number).relative_to(ground.folder)
    arguments = ("bench", "--config", "pipeline.yaml", "--target", "coreml", "--import", str(place))
    try:
        if said := grounds.command(ground.folder, *arguments):
            raise DataError(said)
        if said := grounds.command(ground.folder, "check", NAME):
            raise AssertionError(f"what was taken over is not whole: {said}")
    finally:
        ground.reset()
        ground.require_canaries()


def _write(ground: Ground, seed: int, number: int) -> Path:
    """A result file, or what Xcode writes, changed."""
    rng = random.Random(f"{seed} {number}")
    folder = ground.folder / "models"
    folder.mkdir(exist_ok=True)
    if rng.random() < 0.3:
        place = folder / "report.mlperf" / "report.json"
        place.parent.mkdir(exist_ok=True)
        text = json.dumps(_report(), indent=1)
    else:
        place = folder / FILE
        text = json.dumps(_result(ground), indent=1)
    kind = rng.randrange(6)
    if kind == 0:
        put_odd(rng, place)
        return place
    if place.is_symlink() or not place.is_file():
        grounds.remove(place)
    if kind == 1:
        place.write_bytes(changed_bytes(rng, text.encode()))
    elif kind == 2:
        place.write_text(text)
    else:
        place.write_text(changed_json(rng, text, sign=False).rpartition(",\n")[0] + "\n}\n")
    return place.parent if place.name == "report.json" and rng.random() < 0.5 else place


def _result(ground: Ground) -> dict[str, Any]:
    run = {
        "compute_units": "cpu_and_neural_engine",
        "load_ms": [120.0, 40.0],
        "first_ms": 3.0,
        "predict_ms": [1.0 + 0.01 * (i % 7) for i in range(50)],
        "thermal_before": "nominal",
        "thermal_after": "fair",
        "operations": [
            {"name": "a", "operator": "conv", "device": "neural_engine", "cost": 0.5},
            {"name": "b", "operator": "gelu", "device": "cpu", "cost": None},
        ],
    }
    return {
        "format": FORMAT,
        "source": "coreml-bench",
        "measured_at": "2026-11-23T10:00:00Z",
        "model": {"name": "attack", "digest": saved.digest(ground.kept / "coreml/fp16" / PACKAGE)},
        "device": {"model": "iPhone16,1", "os": "iOS 18.2"},
        "runs": [run],
    }


def _report() -> dict[str, Any]:
    return {
        "deviceInformation": {"deviceModel": "iPhone16,1", "osVersion": "18.2"},
        "performance": {"computeUnits": 2, "predictionSamples": [0.001, 0.002]},
        "modelStructure": {"operations": [{"operatorName": "conv", "device": "cpu"}]},
    }
