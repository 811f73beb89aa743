"""`export`: hand a built artifact to another program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.exports.built import built, exported_network
from pipeline.report.model import Run
from pipeline.steps.folders import RESULTS_FILE, results_folders


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
        InputError: There is no such artifact, no Swift package measures it, or the folder holds
            something.
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


def export_bundle(
    output: Path, name: str, path: Path | None, *, targets: Sequence[str], key: Path | None = None
) -> str:
    """Write the artifacts that the last run said to use into one archive; returns what was written.

    Args:
        output: Where results lie.
        name: Which results.
        path: The archive; None for NAME.tar.gz.
        targets: These targets; empty for all that the run chose something of.
        key: A private key that signs the archive's checksums; None for no signature.

    Raises:
        InputError: There is no such artifact, the archive is there already, or the key is none.
        ArtifactError: Something is not what was stated.
        UnavailableError: What signs is not installed.
    """
    from pipeline.core.signing import Signer
    from pipeline.exports.bundle import write_bundle

    signer = None if key is None else Signer(key)

    run = Run.read(results_folders(output, name)[0] / RESULTS_FILE)
    chosen = [t for t, choice in run.choice.items() if choice.precision is not None]
    artifacts = [built(output, name, target, None) for target in targets or chosen]
    place = path or Path(f"{name}.tar.gz")
    notes: list[str] = []
    network = exported_network(output, name)
    written = write_bundle(artifacts, network, name, place, signer=signer, say=notes.append)
    names = ", ".join(artifact.name for artifact in artifacts)
    if signer is not None:
        notes.append(f"signed with the key {signer.fingerprint}")
    told = f"wrote {written} ({written.stat().st_size / 1e6:.2f} MB): {names}"
    return "\n".join([told, *notes])
