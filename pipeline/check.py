"""Verifies what lies in a results' folder: hashes, the chain to the checkpoint, the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import MANIFEST, Artifact, file_hash
from pipeline.errors import ArtifactError, InputError, PipelineError
from pipeline.replacing import is_set_aside, is_temporary
from pipeline.targets import TARGETS


@dataclass(frozen=True)
class Finding:
    """What was found about one artifact.

    Attributes:
        name: The results' name and the artifact's, such as "care_tiny/trt/fp16".
        size: Bytes of all files; 0 if they could not be told.
        opened: What was looked at beyond the hashes.
        problem: What is wrong; "" if nothing is.
    """

    name: str
    size: int
    opened: str
    problem: str


def results(output: Path, name: str | None = None) -> list[Path]:
    """Folders of results under `output`, or the one called `name`.

    Raises:
        InputError: There is none.
    """
    if name is not None:
        folder = output / name
        if not folder.is_dir():
            known = ", ".join(path.name for path in _folders(output))
            raise InputError(
                f"{folder} does not exist: "
                + (f"there are {known}" if known else "run python -m pipeline run first")
            )
        return [folder]
    found = _folders(output)
    if not found:
        raise InputError(f"{output} holds no results: run python -m pipeline run first")
    return found


def _folders(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    return [path for path in sorted(output.iterdir()) if any(path.glob(f"*/{MANIFEST}"))]


def check(folder: Path) -> Iterator[Finding]:
    """Check every artifact of one results' folder."""
    manifests = sorted(folder.rglob(MANIFEST))
    folders = [path.parent for path in manifests if not _passed_over(path.relative_to(folder))]
    digests = dict(_digests(folder, folders))
    for path in folders:
        name = path.relative_to(folder.parent).as_posix()
        try:
            artifact = Artifact.read(path)
        except PipelineError as error:
            yield Finding(name, 0, "", str(error))
            continue
        try:
            artifact.verify()
            _check_chain(artifact, digests)
            yield Finding(name, artifact.size, _open(artifact), "")
        except PipelineError as error:
            yield Finding(name, artifact.size, "", str(error))
    for path in sorted(folder.glob("*/*")):
        is_lost = path.is_dir() and path.parent.name in TARGETS and not (path / MANIFEST).exists()
        if is_lost and not _passed_over(path.relative_to(folder)):
            name = path.relative_to(folder.parent).as_posix()
            yield Finding(name, 0, "", f"{path / MANIFEST} is missing")


def _passed_over(path: Path) -> bool:
    """Whether a path is no result: still being made, or set aside."""
    return is_temporary(path) or is_set_aside(path)


def _digests(root: Path, folders: list[Path]) -> Iterator[tuple[str, str]]:
    for folder in folders:
        try:
            yield folder.relative_to(root).as_posix(), Artifact.read(folder).digest
        except ArtifactError:
            continue


def _check_chain(artifact: Artifact, digests: dict[str, str]) -> None:
    """Follow the hashes to what the artifact was made from."""
    for name, digest in artifact.made_from.items():
        if name == "checkpoint":
            _check_checkpoint(artifact, digest)
        elif name not in digests:
            raise ArtifactError(f"{name}, from which {artifact.name} was made, is missing")
        elif digests[name] != digest:
            raise ArtifactError(f"{artifact.name} was made from another {name} than lies here")


def _check_checkpoint(artifact: Artifact, digest: str) -> None:
    stated = artifact.facts.get("checkpoint")
    path = Path(stated) if isinstance(stated, str) else None
    # A checkpoint may lie elsewhere by now: only one that is there can be another.
    if path is not None and path.is_file() and file_hash(path) != digest:
        raise ArtifactError(f"{path} is another checkpoint than {artifact.name} was made from")


def _open(artifact: Artifact) -> str:
    """Open a model by its own library, as far as this machine can; returns what was done."""
    if artifact.kind == "build":
        return TARGETS[str(artifact.facts["target"])].inspect(artifact)
    if "model.onnx" in artifact.files:
        import onnx

        try:
            onnx.checker.check_model(onnx.load(artifact.path("model.onnx")))
        except Exception as error:  # the checker and protobuf raise kinds of their own
            raise ArtifactError(f"{artifact.name}: no valid ONNX model: {error}") from error
        return "ONNX checker"
    return "hashes"
