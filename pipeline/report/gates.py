"""Limits of the configuration, judged on what validation and measurement wrote down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config, Gates
from pipeline.core.errors import ArtifactError, GateFailedError
from pipeline.core.figures import Number
from pipeline.steps.artifact import Artifact
from pipeline.targets.registry import TARGETS


def failures(config: Config) -> list[GateFailedError]:
    """Every limit that does not hold, in the order of targets and precisions.

    A figure that was not measured fails no gate; the report says that it is missing.
    """
    failed = []
    for name in TARGETS:
        gates = config.gates(name)
        for precision in config.precisions(name):
            numbers = _numbers(config.folder, name, precision)
            what = f"{name}/{precision}"
            failed += [GateFailedError(f"{what}: {text}") for text in _judge(gates, numbers)]
    return failed


def _judge(gates: Gates, numbers: dict[str, Number]) -> list[str]:
    limits = [
        ("top1_drop", gates.max_top1_drop, True, "top-1 drop", "max_top1_drop"),
        ("agreement", gates.min_agreement, False, "agreement", "min_agreement"),
        ("latency", gates.max_latency_ms, True, "latency in ms", "max_latency_ms"),
    ]
    failed = []
    for name, limit, is_upper, title, gate in limits:
        number = numbers.get(name)
        if limit is None or number is None or number.value is None:
            continue
        # Written so that a NaN fails.
        holds = number.value <= limit if is_upper else number.value >= limit
        if not holds:
            failed.append(
                f"{title} is {number.value:.4g}, {gate} allows {limit:g} ({number.state})"
            )
    return failed


def _numbers(folder: Path, target: str, precision: str) -> dict[str, Number]:
    """Figures of one artifact, by name; without those that there are not."""
    validated = _facts(folder / "validate" / f"{target}-{precision}").get("numbers", {})
    numbers = {name: Number.from_dict(plain) for name, plain in validated.items()}
    latency = _facts(folder / "bench" / target).get("latency", {})
    if precision in latency:
        numbers["latency"] = Number.from_dict(latency[precision])
    return numbers


def _facts(folder: Path) -> Mapping[str, Any]:
    try:
        return Artifact.read(folder).facts
    except ArtifactError:
        return {}
