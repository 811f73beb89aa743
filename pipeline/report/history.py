"""What earlier runs came to: results.json and the answers, an entry for each run that changed some.

    engines/trial/history/
      20261126-141502/
        results.json
        answers.npz

Artifacts are not kept: they are large, and the configuration makes them again. The newest entry is
what the results' folder itself holds.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from pipeline.core.errors import ArtifactError
from pipeline.core.replacing import Whose, cannot_write, put, workspace
from pipeline.core.seals import sealed
from pipeline.report.answers import Classes, answers_of, judged_by, to_bytes
from pipeline.report.model import Run, read_values
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.library import Library

HISTORY = "history"
ANSWERS = "answers.npz"

MOST = 20
"""Entries that are kept: the newest."""

PREVIOUS = "previous"
"""In place of an entry: the newest that holds something else than the results do."""

_ENTRY = re.compile(r"\d{8}-\d{6}(-\d+)?")


def entries(folder: Path) -> list[Path]:
    """Entries of a results' folder, the oldest first."""
    history = folder / HISTORY
    if history.is_symlink() or not history.is_dir():
        return []
    return sorted(path for path in history.iterdir() if _is_entry(path))


def previous(folder: Path) -> Path:
    """The newest entry that holds something else than the results of a folder do.

    Raises:
        ArtifactError: There is none, or the results cannot be read.
    """
    now = Run.read(folder / RESULTS_FILE)
    for entry in reversed(entries(folder)):
        if Run.read(entry / RESULTS_FILE).seals != now.seals:
            return entry
    raise ArtifactError(
        f"{folder / HISTORY} holds no earlier results than those of {folder}: name another folder "
        "with --baseline"
    )


def refuse_foreign(folder: Path) -> None:
    """Refuse what somebody else put in the history's place.

    Raises:
        ArtifactError: It is no folder.
    """
    history = folder / HISTORY
    if os.path.lexists(history) and (history.is_symlink() or not history.is_dir()):
        raise ArtifactError(
            f"{history} is in the way: results keep their history there; move it elsewhere"
        )


def keep(folder: Path, run: Run) -> None:
    """Add an entry, if something was made since the newest, and let go of the oldest.

    Args:
        folder: The results' folder.
        run: What its results.json holds.

    Raises:
        ArtifactError: It cannot be written.
    """
    there = entries(folder)
    if there and _seals_of(there[-1]) == run.seals:
        return
    place, answers = _new_place(folder, there), _answers(folder, run)
    try:
        with workspace(place) as new:
            new.mkdir()
            (new / RESULTS_FILE).write_text(sealed(run.to_dict()), encoding="utf-8")
            if answers is not None:
                (new / ANSWERS).write_bytes(answers)
            put(new, place, Whose.FREE)
        for old in [*there, place][:-MOST]:
            shutil.rmtree(old)
    except OSError as error:
        raise ArtifactError(cannot_write(place, error)) from error


def _new_place(folder: Path, there: list[Path]) -> Path:
    """A place that is free, and comes after all entries: a clock may have been set back."""
    name = time.strftime("%Y%m%d-%H%M%S")
    if there:
        name = max(name, there[-1].name[: len(name)])
    place, number = folder / HISTORY / name, 1
    while os.path.lexists(place):
        number += 1
        place = place.with_name(f"{name}-{number:03}")
    return place


def _is_entry(path: Path) -> bool:
    """Whether a folder is one that `keep` made, and holds nothing else."""
    if not _ENTRY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    names = {each.name for each in path.iterdir()}
    return RESULTS_FILE in names and names <= {RESULTS_FILE, ANSWERS}


def _seals_of(entry: Path) -> object:
    try:
        return read_values(entry / RESULTS_FILE).get("seals")
    except ArtifactError:
        return None  # of an earlier format, or damaged


def _answers(folder: Path, run: Run) -> bytes | None:
    """All answers of a run that has just ended; None where nothing was judged."""
    library = Library(folder)
    given: dict[str, Classes] = {}
    for built in run.artifacts:
        try:
            validated = library.artifact(f"validate/{built.target}-{built.precision}")
            given[built.name] = answers_of(validated, built)
        except ArtifactError:
            continue  # not judged, and results.json says why
    try:
        return to_bytes(judged_by(library.artifact("validate/samples"), given)) if given else None
    except ArtifactError:
        return None
