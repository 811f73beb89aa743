"""The stage that tells people what came out: results.json, report.md and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.core.files import write_atomically
from pipeline.report.html import page as html_page
from pipeline.report.markdown import page as markdown_page
from pipeline.report.model import RESULTS_FILE, Run
from pipeline.report.results import collect
from pipeline.scheduler.execute import Outcome


def write(config: Config, path: Path, outcome: Outcome) -> Run:
    """Write results.json, report.md and report.html, each whole or not at all.

    Args:
        config: The configuration.
        path: Its file.
        outcome: How the run ended.

    Returns:
        What results.json holds.
    """
    run = collect(config, path, outcome)
    write_atomically(config.folder / RESULTS_FILE, json.dumps(run.to_dict(), indent=1) + "\n")
    write_atomically(config.folder / "report.md", markdown_page(run))
    write_atomically(config.folder / "report.html", html_page(run))
    return run
