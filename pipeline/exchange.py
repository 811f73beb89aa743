"""Models that go to other programs: Triton's repository, a Swift package for devices."""

from __future__ import annotations

from pathlib import Path

from pipeline import check as checks
from pipeline.artifact import MANIFEST, Artifact
from pipeline.errors import InputError
from pipeline.targets.base import Network


def built(output: Path, name: str, target: str, precision: str | None) -> Artifact:
    """A built artifact, verified: the first of the target, or the one in `precision`.

    Raises:
        InputError: There is none.
        ArtifactError: It is damaged.
    """
    folder = checks.results(output, name)[0]
    there = sorted(path.parent for path in (folder / target).glob(f"*/{MANIFEST}"))
    found = [path for path in there if precision in (None, path.name)]
    if not found:
        known = ", ".join(path.name for path in there) or "none"
        raise InputError(f"{folder} has no {target} artifact in that precision; built are: {known}")
    artifact = Artifact.read(found[0])
    artifact.verify()
    return artifact


def export_triton(
    output: Path, name: str, repository: Path, *, target: str, precision: str | None
) -> str:
    """Write a built artifact into a Triton model repository; returns what was written.

    Raises:
        InputError: There is no such artifact, or Triton cannot run it.
    """
    from pipeline import triton

    artifact = built(output, name, target, precision)
    network = Network.from_facts(Artifact.read(output / name / "onnx"))
    return f"wrote {triton.export(artifact, network, repository)}"


def export_coreml_bench(output: Path, name: str, folder: Path, *, precision: str | None) -> str:
    """Write a Swift package that measures a Core ML artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, or the folder holds something.
    """
    from pipeline.targets.coreml.bench_package import write_bench_package

    return f"wrote {write_bench_package(built(output, name, 'coreml', precision), folder)}"
