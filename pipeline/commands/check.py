"""`check`: is what lies here whole and unchanged? Hashes, seals, the chain, models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.core.errors import ArtifactError, GateFailedError, PipelineError
from pipeline.core.replacing import cannot_read, is_set_aside, is_temporary
from pipeline.core.screen import styled
from pipeline.core.words import in_short, printable
from pipeline.report.model import Run
from pipeline.report.terminal import render
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE, results_folders
from pipeline.steps.library import Library
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
    """Check every artifact of one results' folder, and what results.json tells of them."""
    library = Library(folder)
    for name in library.places:
        yield _finding(library, name)
    for path in sorted(folder.glob("*/*")):
        is_lost = path.is_dir() and path.parent.name in TARGETS and not (path / MANIFEST).exists()
        if is_lost and not _passed_over(path.relative_to(folder)):
            name = path.relative_to(folder.parent).as_posix()
            yield Finding(name, 0, "", f"{path / MANIFEST} is missing")
    if os.path.lexists(folder / RESULTS_FILE):
        yield _results(library)


def _finding(library: Library, name: str) -> Finding:
    full = f"{library.folder.name}/{name}"
    known = library.artifacts.get(name)
    size = known.size if known else 0
    try:
        return Finding(full, size, _open(library.check(name)), "")
    except PipelineError as error:
        problem = str(error)
    except OSError as error:
        problem = printable(cannot_read(error.filename or library.places[name], error))
    return Finding(full, size, "", problem)


def _results(library: Library) -> Finding:
    """What the last run wrote, and whether all is there that it tells of."""
    path = library.folder / RESULTS_FILE
    name = f"{library.folder.name}/{RESULTS_FILE}"
    try:
        run = Run.read(path)
    except PipelineError as error:
        return Finding(name, 0, "", str(error))
    size = path.stat().st_size
    missing = [each for each in run.seals if each not in library.places]
    if missing:
        return Finding(name, size, "", f"it tells of {missing[0]}, which is missing: run again")
    return Finding(name, size, "its seal", "")


def _passed_over(path: Path) -> bool:
    """Whether a path is no result: still being made, or set aside."""
    return is_temporary(path) or is_set_aside(path)


def _open(artifact: Artifact) -> str:
    """Open a model by its own library, as far as this machine can; returns what was done.

    Raises:
        ArtifactError: The library does not accept it.
    """
    try:
        return _look(artifact)
    except PipelineError:
        raise
    except Exception as error:  # libraries raise kinds of their own
        raise ArtifactError(f"{artifact.name} cannot be opened: {in_short(error)}") from error


def _look(artifact: Artifact) -> str:
    if artifact.kind == "build":
        return TARGETS[str(artifact.facts["target"])].inspect(artifact)
    if "model.onnx" in artifact.files:
        import onnx

        onnx.checker.check_model(onnx.load(artifact.path("model.onnx")))
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
