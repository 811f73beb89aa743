"""The stage that tells people what came out: results.json, report.md and report.html."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, refuse_foreign_file, write_atomically
from pipeline.core.plain import parse_json
from pipeline.core.seals import sealed, unsealed
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
        plain = parse_json(read_regular(path, MOST_BYTES), str(path))
    except (ArtifactError, OSError):
        return False
    keys = {"format", "name", "steps", "artifacts", "machine"}
    return isinstance(plain, dict) and keys <= set(plain)


def refuse_foreign(folder: Path) -> None:
    """Refuse files that somebody else put where a report shall lie.

    Raises:
        ArtifactError: There is one.
    """
    refuse_foreign_file(folder / RESULTS_FILE, is_results_file)
    history.refuse_foreign(folder)
    for name in PAGES:
        refuse_foreign_file(folder / name, _is_page)


def _is_page(path: Path) -> bool:
    """Pages carry no mark of their own: they are ours where they lie beside our results.json."""
    return is_results_file(path.with_name(RESULTS_FILE))


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
    run = _as_dated(folder, collect(config, path, outcome))
    text = sealed(run.to_dict())
    _, seal = unsealed(text.encode(), RESULTS_FILE)
    write_atomically(folder / RESULTS_FILE, text)
    Stated(folder).is_reported()
    write_pages(folder, run, seal)
    history.keep(folder, run)
    return run


def _as_dated(folder: Path, run: Run) -> Run:
    """A run with the date of the results that lie there, if these say nothing else."""
    try:
        there = read_values(folder / RESULTS_FILE)
    except ArtifactError:
        return run  # none yet, or damaged
    earlier = replace(run, date=str(there.get("date")))
    return earlier if parse_json(json.dumps(earlier.to_dict()), "it") == there else run
