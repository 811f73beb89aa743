"""Built artifacts, as exports take them: whole, in the precision that the last run said to use.

What leaves the pipeline is held against all that is stated of it, from its own files to the graph
that was exported first; nothing skips that.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.network import Network
from pipeline.core.replacing import is_set_aside
from pipeline.report.model import Run
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE, results_folders
from pipeline.steps.library import Library

NETWORK_OF = "onnx"
"""The artifact whose labels and preprocessing are exported."""


def built(output: Path, name: str, target: str, precision: str | None) -> Artifact:
    """A built artifact, verified with all that it was made from.

    Args:
        output: Where results lie.
        name: Which results.
        target: Which target.
        precision: Which precision; None for the one that the last run said to use, or for the first
            in alphabetical order if it said nothing.

    Raises:
        InputError: There is none.
        ArtifactError: It, or something that it was made from, is damaged or not what was stated; or
            what the last run said cannot be read.
    """
    folder = results_folders(output, name)[0]
    found = [path.parent for path in (folder / target).glob(f"*/{MANIFEST}")]
    there = {path.name: path for path in found if not is_set_aside(path.relative_to(folder))}
    to_use = _to_use(folder, target)  # in any case: a damaged report vouches for nothing
    wanted = precision or to_use
    if wanted not in there and precision is None:
        wanted = min(there, default=None)
    if wanted is None or wanted not in there:
        known = ", ".join(sorted(there)) or "none"
        raise InputError(f"{folder} has no {target} artifact in that precision; built are: {known}")
    return Library(folder).require_whole(f"{target}/{wanted}")


def exported_network(output: Path, name: str) -> Network:
    """Labels and preprocessing of the graph, verified with all that it was made from.

    Args:
        output: Where results lie.
        name: Which results.

    Raises:
        ArtifactError: The graph is missing, damaged or not what was stated, or states no network.
    """
    return Library(results_folders(output, name)[0]).require_whole(NETWORK_OF).network()


def _to_use(folder: Path, target: str) -> str | None:
    """The precision that the last run said to use; None if there was no run, or it said nothing."""
    path = folder / RESULTS_FILE
    if not os.path.lexists(path):
        return None
    choice = Run.read(path).choice.get(target)
    return choice.precision if choice else None
