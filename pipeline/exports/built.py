"""Built artifacts, as exports take them: whole, in the precision that the last run said to use."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.replacing import is_set_aside
from pipeline.report.model import RESULTS_FILE, Run
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import results_folders


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
        ArtifactError: It is damaged, or what the last run said cannot be read.
    """
    folder = results_folders(output, name)[0]
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
    """The precision that the last run said to use; None if there was no run, or it said nothing."""
    path = folder / RESULTS_FILE
    if not path.exists():
        return None
    try:
        choice = Run.read(path).choice.get(target)
    except ArtifactError as error:
        raise ArtifactError(f"{error}, or name the precision with --precision") from error
    return choice.precision if choice else None
