"""Models that go to other programs: Triton's repository, a Swift package for devices."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import check as checks
from pipeline.artifact import MANIFEST, Artifact
from pipeline.errors import InputError
from pipeline.replacing import is_set_aside
from pipeline.results import RESULTS_FILE
from pipeline.targets.base import Network


def built(output: Path, name: str, target: str, precision: str | None) -> Artifact:
    """A built artifact, verified.

    Args:
        output: Where results lie.
        name: Which results.
        target: Which target.
        precision: Which precision; None for the one that the last run said to use, or for the first
            in alphabetical order if it said nothing.

    Raises:
        InputError: There is none.
        ArtifactError: It is damaged.
    """
    folder = checks.results(output, name)[0]
    found = [path.parent for path in (folder / target).glob(f"*/{MANIFEST}")]
    there = {path.name: path for path in found if not is_set_aside(path.relative_to(folder))}
    wanted = precision or _to_use(folder, target)
    if wanted not in there and precision is None:
        wanted = min(there, default=None)
    if wanted is None or wanted not in there:
        known = ", ".join(sorted(there)) or "none"
        raise InputError(f"{folder} has no {target} artifact in that precision; built are: {known}")
    artifact = Artifact.read(there[wanted])
    artifact.verify()
    return artifact


def _to_use(folder: Path, target: str) -> str | None:
    """The precision that the last run said to use, see `pipeline.choice`."""
    try:
        choice = json.loads((folder / RESULTS_FILE).read_text())["choice"][target]
    except (OSError, ValueError, KeyError):
        return None
    precision: str | None = choice["precision"]
    return precision


def export_triton(
    output: Path, name: str, repository: Path, *, target: str, precision: str | None
) -> str:
    """Write a built artifact into a Triton model repository; returns what was written.

    Raises:
        InputError: There is no such artifact, or Triton cannot run it.
        ArtifactError: The model's folder is somebody else's, or cannot be written.
    """
    from pipeline import triton

    artifact = built(output, name, target, precision)
    network = Network.from_facts(Artifact.read(output / name / "onnx"))
    notes: list[str] = []
    folder = triton.export(artifact, network, repository, say=notes.append)
    return "\n".join([f"wrote {folder}", *notes])


def export_coreml_bench(output: Path, name: str, folder: Path, *, precision: str | None) -> str:
    """Write a Swift package that measures a Core ML artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, or the folder holds something.
    """
    from pipeline.targets.coreml.bench_package import write_bench_package

    return f"wrote {write_bench_package(built(output, name, 'coreml', precision), folder)}"
