"""Writes a Swift package that measures a Core ML package on an iPhone, iPad or Mac.

The package holds the model as it is; what it measures names it by its digest, so that the result
cannot be taken for that of another model. See `results` for the file that it writes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.steps.artifact import Artifact
from pipeline.targets.coreml import package as saved
from pipeline.targets.coreml.package import MODEL

_FILES = {
    "Package.swift": "Package.swift",
    "README.md": "README.md",
    "Benchmark.swift": "Sources/CoreMLBench/Benchmark.swift",
    "Measurements.swift": "Sources/CoreMLBench/Measurements.swift",
    "main.swift": "Sources/coreml-bench/main.swift",
    "BenchmarkTests.swift": "Tests/CoreMLBenchTests/BenchmarkTests.swift",
}
_RESOURCES = Path("Sources/CoreMLBench/Resources")


def write_bench_package(artifact: Artifact, folder: Path, *, samples: int = 700) -> Path:
    """Write the Swift package.

    Args:
        artifact: What `CoreMLTarget` built.
        folder: Where it shall lie; must not exist, or be empty.
        samples: Timed predictions on each set of compute units; with 662 and more there is a p99.

    Returns:
        `folder`.

    Raises:
        ArtifactError: The artifact is damaged, or the folder cannot be written.
        InputError: The folder holds something.
    """
    artifact.verify()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: name a new folder")
    place = folder.resolve()
    try:
        with workspace(place) as new:
            _write(artifact, new, samples)
            put(new, place, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return folder


def _write(artifact: Artifact, folder: Path, samples: int) -> None:
    templates = Path(__file__).parent / "templates"
    for name, destination in _FILES.items():
        path = folder / destination
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(templates / f"{name}.txt", path)
    resources = folder / _RESOURCES
    for name in artifact.files:
        if name.startswith(f"{MODEL}/"):
            rest = name.removeprefix(f"{MODEL}/")
            artifact.copy(name, resources / "model.mlpackage" / rest)
    facts = {
        "name": f"{artifact.network().name} {artifact.name}",
        "digest": saved.digest(resources / "model.mlpackage"),
        "samples": samples,
    }
    (resources / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
