"""`check`: is what lies here whole and unchanged? Hashes, seals, the chain, models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from pipeline.core.errors import ArtifactError, GateFailedError, InputError, PipelineError
from pipeline.core.replacing import cannot_read, is_set_aside, is_temporary
from pipeline.core.screen import styled
from pipeline.core.signing import Verifier
from pipeline.core.words import in_short, printable
from pipeline.exports.unpacked import is_bundle, opened
from pipeline.report.model import Run
from pipeline.report.terminal import render
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE, results_folders
from pipeline.steps.library import Library
from pipeline.targets.registry import TARGETS

_FETCH = "do not use it: fetch it again from where it was built"


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


def is_alone(path: Path) -> bool:
    """Whether a path is of what travels alone: an artifact's folder, or a bundle."""
    return (path / MANIFEST).is_file() or is_bundle(path)


def check_alone(path: Path, key: Path | None) -> int:
    """Check an artifact that was copied alone, or a bundle; print it and return the exit code.

    Args:
        path: The artifact's folder; or a bundle, packed or unpacked.
        key: The public key of who should have signed the bundle; None to ask for none.

    Raises:
        InputError: The key is none, or an artifact alone has no signature to verify.
        UnavailableError: What verifies signatures is not installed.
    """
    verifier = None if key is None else Verifier(key)
    if not is_bundle(path):
        if key is not None:
            raise InputError(f"{path} is an artifact, and signatures are of bundles: give one")
        return _told([_alone(path)], _FETCH)
    return _told(_bundle(path, verifier), _FETCH)


def _alone(folder: Path) -> Finding:
    """One artifact, by its own manifest: what it was made from does not lie here."""
    name = str(folder)
    try:
        artifact = Artifact.read(folder)
        artifact.verify()
        return Finding(name, artifact.size, _open(artifact), "")
    except PipelineError as error:
        return Finding(name, 0, "", str(error))
    except OSError as error:
        return Finding(name, 0, "", printable(cannot_read(error.filename or folder, error)))


def _bundle(path: Path, verifier: Verifier | None) -> Iterator[Finding]:
    """A bundle's checksums and signature, then its artifacts."""
    try:
        with opened(path) as bundle:
            signed = bundle.signature(verifier)
            bundle.verify()
            artifacts = bundle.artifacts()
            yield Finding(f"{path}", 0, f"checksums; {signed}", "")
            for artifact in artifacts:
                found = _alone(artifact.folder)
                yield replace(found, name=artifact.name)
    except (PipelineError, OSError) as error:
        why = str(error) if isinstance(error, PipelineError) else cannot_read(path, error)
        yield Finding(f"{path}", 0, "", printable(why))


def check(output: Path, name: str | None) -> int:
    """Check what lies under `output`, print what was found and return the exit code."""
    folders = results_folders(output, name)
    remedy = "rebuild what is damaged with: python -m pipeline run CONFIG"
    return _told((finding for folder in folders for finding in findings(folder)), remedy)


def _told(found: Iterable[Finding], remedy: str) -> int:
    """Print what was found, and how to mend what is damaged; returns the exit code."""
    table = Table("artifact", "MB", "opened by", "", box=None)
    problems: list[str] = []
    for finding in found:
        size = f"{finding.size / 1e6:.2f}" if finding.size else ""
        state = styled("damaged", "red") if finding.problem else styled("ok", "green")
        table.add_row(finding.name, size, finding.opened, state)
        if finding.problem:
            problems.append(f"{finding.name}: {finding.problem}")
    print(render(table))
    for problem in problems:
        print(problem)
    if problems:
        print(remedy, file=sys.stderr)
    return GateFailedError.exit_code if problems else 0
