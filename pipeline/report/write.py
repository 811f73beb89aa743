"""The stage that tells people what came out: results.json, report.md and report.html."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

from pipeline.config import Config
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, refuse_foreign_file, write_atomically
from pipeline.core.plain import parse_json
from pipeline.core.seals import sealed
from pipeline.report import history
from pipeline.report.model import Run, read_values
from pipeline.report.pages import PAGES, write_pages
from pipeline.report.results import collect
from pipeline.scheduler.execute import Outcome
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.stated import MOST_BYTES, Stated


def is_results_file(path: Path) -> bool:
    """Whether a file is one that `write` wrote."""
    try:
        return _are_results(read_regular(path, MOST_BYTES))
    except (ArtifactError, OSError):
        return False


@lru_cache(maxsize=1)
def _are_results(data: bytes) -> bool:
    """Whether some megabytes of JSON are results; a run asks before and after, often of the same.

    Raises:
        ArtifactError: It is no JSON.
    """
    plain = parse_json(data, RESULTS_FILE)
    keys = {"format", "name", "steps", "artifacts", "machine"}
    return isinstance(plain, dict) and keys <= set(plain)


def refuse_foreign(folder: Path) -> None:
    """Refuse files that somebody else put where a report shall lie.

    Raises:
        ArtifactError: There is one.
    """
    results = folder / RESULTS_FILE
    is_ours = cache(is_results_file)  # one look at a file of some megabytes, for all three
    refuse_foreign_file(results, is_ours)
    history.refuse_foreign(folder)
    for name in PAGES:
        # Pages are ours where they lie beside our results.json: an edited one has lost its mark.
        refuse_foreign_file(folder / name, lambda page: is_ours(results))


def write(config: Config, path: Path, outcome: Outcome) -> Run:
    """Write results.json, report.md and report.html, each whole or not at all.

    Where they would say what they say, they stay as they are, with their date.

    Args:
        config: The configuration.
        path: Its file.
        outcome: How the run ended.

    Returns:
        What results.json holds.

    Raises:
        ArtifactError: A file of somebody else is in the way, or the folder cannot be written.
    """
    folder = config.folder
    refuse_foreign(folder)
    run, text, is_new = _as_dated(folder, collect(config, path, outcome))
    if is_new:
        write_atomically(folder / RESULTS_FILE, text)
    Stated(folder).is_reported()
    write_pages(folder, run, text)
    history.keep(folder, run)
    return run


def _as_dated(folder: Path, run: Run) -> tuple[Run, str, bool]:
    """A run with the date of the results that lie there if these say nothing else.

    Returns:
        The run, the text of results.json, and whether another one lies there.
    """
    path, values = folder / RESULTS_FILE, run.to_dict()
    with contextlib.suppress(ArtifactError, OSError):  # none yet, or damaged
        there = read_values(path)
        date = str(there.get("date"))
        # Without indentation Python writes JSON in C: in a twentieth of the time.
        if json.dumps(there) == json.dumps({**values, "date": date}):
            return replace(run, date=date), read_regular(path, MOST_BYTES).decode(), False
    return run, sealed(values), True
