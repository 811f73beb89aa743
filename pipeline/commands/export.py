"""`export`: hand a built artifact to another program."""

from __future__ import annotations

from pathlib import Path

from pipeline.exports.built import built
from pipeline.steps.artifact import Artifact


def export_triton(
    output: Path, name: str, repository: Path, *, target: str, precision: str | None
) -> str:
    """Write a built artifact into a Triton model repository; returns what was written.

    Raises:
        InputError: There is no such artifact, or Triton cannot run it.
    """
    from pipeline.exports import triton

    artifact = built(output, name, target, precision)
    network = Artifact.read(output / name / "onnx").network()
    notes: list[str] = []
    folder = triton.export(artifact, network, repository, say=notes.append)
    return "\n".join([f"wrote {folder}", *notes])


def export_coreml_bench(
    output: Path, name: str, folder: Path, *, target: str, precision: str | None
) -> str:
    """Write a Swift package that measures a Core ML or Core AI artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, or the folder holds something.
    """
    from pipeline.exports.coreml_bench import write_bench_package

    return f"wrote {write_bench_package(built(output, name, target, precision), folder)}"
