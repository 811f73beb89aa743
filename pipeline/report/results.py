"""All that a run knows, gathered from its artifacts into one plain value: results.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.core import machine
from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Number
from pipeline.core.published import PUBLISHED
from pipeline.core.replacing import is_set_aside
from pipeline.report.choice import choose
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import versions
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.scheduler.execute import Outcome

FORMAT = 1
RESULTS_FILE = "results.json"

Results = Mapping[str, Any]


def collect(config: Config, path: Path, outcome: Outcome) -> dict[str, Any]:
    """Gather what lies in the results' folder, and how the run ended.

    Args:
        config: The configuration.
        path: Its file.
        outcome: How the run ended.
    """
    folder = config.folder
    failed = {r.name: r.why for r in outcome.results if r.error is not None}
    gates = [str(error) for error in outcome.gates]
    artifacts = [
        _built(folder, name, precision, failed.get(f"{name}/{precision}"))
        for name in TARGETS
        for precision in config.precisions(name)
    ]
    bench = {name: _artifact(folder / "bench" / name) for name in TARGETS if config.target(name)}
    return {
        "format": FORMAT,
        "name": config.name,
        "config": str(path),
        "folder": str(folder),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "exit_code": outcome.exit_code,
        "gates": gates,
        "steps": [
            {k: v for k, v in asdict(r).items() if k != "error"} | {"state": str(r.state)}
            for r in outcome.results
        ],
        "machine": machine.describe(),
        "versions": versions(
            "torch", "timm", "onnx", "onnxruntime", "coremltools", "tensorrt-rtx-cu13", "tensorrt"
        ),
        "export": _artifact(folder / "export"),
        "onnx": _artifact(folder / "onnx"),
        "forms": {
            path.name: _artifact(path)
            for path in sorted((folder / "precision").glob("[!.]*"))
            if not is_set_aside(path.relative_to(folder))
        },
        "calibration": _artifact(folder / "calibration"),
        "pytorch": _artifact(folder / "validate" / "pytorch"),
        "artifacts": artifacts,
        "bench": bench,
        "choice": {
            name: choose(
                [artifact for artifact in artifacts if artifact["target"] == name],
                measured.get("facts", {}),
                gates,
            ).to_dict()
            for name, measured in bench.items()
        },
        "published": [asdict(row) for row in PUBLISHED],
    }


def is_results_file(path: Path) -> bool:
    """Whether a file is one that `collect` filled."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    keys = {"format", "name", "steps", "artifacts", "machine"}
    return isinstance(plain, dict) and keys <= set(plain)


def _built(folder: Path, target: str, precision: str, failure: str | None) -> dict[str, Any]:
    """One artifact with its figures; where there are none, why."""
    built = _artifact(folder / target / precision)
    validated = _artifact(folder / "validate" / f"{target}-{precision}")
    measured = _artifact(folder / "bench" / target)
    why = failure or ("not validated yet" if built else "not built")
    latency = measured.get("facts", {}).get("latency", {}).get(precision)
    form = _artifact(folder / "precision" / TARGETS[target].precisions[precision])
    numbers = validated.get("facts", {}).get("numbers") or {
        "top1": Number.not_measured(why).to_dict()
    }
    return {
        "target": target,
        "title": TARGETS[target].title,
        "precision": precision,
        "failure": failure,
        "why_not": form.get("facts", {}).get("why_not", ""),
        **built,
        "numbers": numbers,
        "notes": validated.get("facts", {}).get("notes", {}),
        "latency": latency or Number.not_measured(why, unit="ms").to_dict(),
    }


def _artifact(folder: Path) -> dict[str, Any]:
    """What one artifact says of itself; empty where there is none."""
    try:
        artifact = Artifact.read(folder)
    except ArtifactError:
        return {}
    return {
        "name": artifact.name,
        "size": artifact.size,
        "digest": artifact.digest,
        "key": artifact.key,
        "files": {name: asdict(record) for name, record in artifact.files.items()},
        "made_from": dict(artifact.made_from),
        "tools": dict(artifact.tools),
        "facts": dict(artifact.facts),
    }
