"""`export`: hand a built artifact to another program."""

from __future__ import annotations

from pathlib import Path

from pipeline.exports.built import built, exported_network


def export_triton(
    output: Path, name: str, repository: Path, *, target: str, precision: str | None
) -> str:
    """Write a built artifact into a Triton model repository; returns what was written.

    Raises:
        InputError: There is no such artifact, or Triton cannot run it.
        ArtifactError: It, or something that it was made from, is not what was stated.
    """
    from pipeline.exports import triton

    artifact = built(output, name, target, precision)
    network = exported_network(output, name)
    notes: list[str] = []
    folder = triton.export(artifact, network, repository, say=notes.append)
    return "\n".join([f"wrote {folder}", *notes])


def export_coreml_bench(
    output: Path, name: str, folder: Path, *, target: str, precision: str | None
) -> str:
    """Write a Swift package that measures a Core ML or Core AI artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, or the folder holds something.
        ArtifactError: It, or something that it was made from, is not what was stated.
    """
    from pipeline.exports.coreml_bench import write_bench_package

    artifact = built(output, name, target, precision)
    notes: list[str] = []
    written = write_bench_package(artifact, folder, say=notes.append)
    return "\n".join([f"wrote {written}", *notes])


def export_golden(
    output: Path, name: str, folder: Path, *, target: str, precision: str | None
) -> str:
    """Write the golden kit of a built artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, it was not validated, or the folder holds something.
        ArtifactError: It, or something that it was made from, is not what was stated.
    """
    from pipeline.exports import golden

    artifact = built(output, name, target, precision)
    return f"wrote {golden.export(artifact, folder)}, the kit of {artifact.name}"
