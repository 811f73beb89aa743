"""The stage that tells people what came out: results.json, report.md and report.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.config import Config
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, refuse_foreign_file, write_atomically
from pipeline.core.plain import parse_json
from pipeline.core.seals import sealed
from pipeline.report import history
from pipeline.report.gallery import flipped
from pipeline.report.html import page as html_page
from pipeline.report.markdown import page as markdown_page
from pipeline.report.model import Run
from pipeline.report.results import collect
from pipeline.scheduler.execute import Outcome
from pipeline.steps.folders import RESULTS_FILE
from pipeline.steps.stated import MOST_BYTES, Stated


def _html_with_images(run: Run) -> str:
    return html_page(run, flipped(run))


PAGES: dict[str, Callable[[Run], str]] = {
    "report.md": markdown_page,
    "report.html": _html_with_images,
}


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

    Args:
        config: The configuration.
        path: Its file.
        outcome: How the run ended.

    Returns:
        What results.json holds.

    Raises:
        ArtifactError: A file of somebody else is in the way, or the folder cannot be written.
    """
    refuse_foreign(config.folder)
    run = collect(config, path, outcome)
    write_atomically(config.folder / RESULTS_FILE, sealed(run.to_dict()))
    Stated(config.folder).is_reported()
    for name, page in PAGES.items():
        write_atomically(config.folder / name, page(run))
    history.keep(config.folder, run)
    return run
