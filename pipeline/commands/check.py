"""`check`: is what lies here whole and unchanged? Hashes, the chain to the checkpoint, models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.core.errors import ArtifactError, GateFailedError, PipelineError
from pipeline.core.files import file_hash
from pipeline.core.replacing import cannot_read, is_set_aside, is_temporary
from pipeline.core.screen import styled
from pipeline.core.words import in_short, printable
from pipeline.report.terminal import render
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import results_folders
from pipeline.targets.registry import TARGETS


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


def findings(folder: Path) -> Iterator[Finding]:
    """Check every artifact of one results' folder."""
    # As deep as artifacts lie: a folder that only looks like results may hold a whole disk.
    manifests = sorted(m for depth in range(1, 4) for m in folder.glob("*/" * depth + MANIFEST))
    folders = [path.parent for path in manifests if not _passed_over(path.relative_to(folder))]
    digests = dict(_digests(folder, folders))
    for path in folders:
        name = path.relative_to(folder.parent).as_posix()
        try:
            artifact = Artifact.read(path)
        except PipelineError as error:
            yield Finding(name, 0, "", str(error))
            continue
        yield _looked_at(name, artifact, digests)
    for path in sorted(folder.glob("*/*")):
        is_lost = path.is_dir() and path.parent.name in TARGETS and not (path / MANIFEST).exists()
        if is_lost and not _passed_over(path.relative_to(folder)):
            name = path.relative_to(folder.parent).as_posix()
            yield Finding(name, 0, "", f"{path / MANIFEST} is missing")


def _looked_at(name: str, artifact: Artifact, digests: dict[str, str]) -> Finding:
    """Verify an artifact, its chain and its model; one that cannot be looked at stops no other."""
    try:
        artifact.verify()
        _check_chain(artifact, digests)
        return Finding(name, artifact.size, _open(artifact), "")
    except PipelineError as error:
        problem = str(error)
    except OSError as error:
        problem = printable(cannot_read(error.filename or artifact.folder, error))
    except Exception as error:  # facts that lack what a target needs to open a model
        problem = f"{artifact.folder} cannot be opened ({printable(in_short(error))}): build again"
    return Finding(name, artifact.size, "", problem)


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


def check(output: Path, name: str | None) -> int:
    """Check what lies under `output`, print what was found and return the exit code."""
    table = Table("artifact", "MB", "opened by", "", box=None)
    problems: list[str] = []
    for folder in results_folders(output, name):
        for finding in findings(folder):
            size = f"{finding.size / 1e6:.2f}"
            state = styled("damaged", "red") if finding.problem else styled("ok", "green")
            table.add_row(finding.name, size, finding.opened, state)
            if finding.problem:
                problems.append(f"{finding.name}: {finding.problem}")
    print(render(table))
    for problem in problems:
        print(problem)
    if problems:
        print("rebuild what is damaged with: python -m pipeline run CONFIG", file=sys.stderr)
    return GateFailedError.exit_code if problems else 0
