"""Built artifacts, as exports take them: whole, in the precision that the last run said to use."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.replacing import is_set_aside
from pipeline.report.results import RESULTS_FILE
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
        ArtifactError: It is damaged.
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
    """The precision that the last run said to use, see `pipeline.report.choice`."""
    try:
        choice = json.loads((folder / RESULTS_FILE).read_text())["choice"][target]
    except (OSError, ValueError, KeyError):
        return None
    precision: str | None = choice["precision"]
    return precision
