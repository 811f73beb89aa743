"""`compare`: what became better or worse between two runs?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import ArtifactError, GateFailedError
from pipeline.core.files import refuse_foreign_file, write_atomically
from pipeline.report import compare as results
from pipeline.report import compare_pages as pages
from pipeline.report.history import PREVIOUS, previous


def compare(
    baseline: Path,
    new: Path,
    *,
    markdown: Path | None = None,
    html: Path | None = None,
    junit: Path | None = None,
    json_file: Path | None = None,
) -> int:
    """Print what two runs differ in; returns the exit code, 1 where a regression is proven.

    Args:
        baseline: Results' folder that stands for how it was, an entry of a history, or "previous"
            for the newest one of the new results that is another.
        new: The other one.
        markdown: Where to write the same for a pull request.
        html: Where to write a page with the images whose answers changed.
        junit: Where to write it as JUnit XML.
        json_file: Where to write all of it as JSON.

    Raises:
        ArtifactError: A folder holds no results, or a file of somebody else would be replaced.
    """
    for path in (markdown, html, junit, json_file):
        if path is not None:
            refuse_foreign_file(path, pages.is_ours)
    if str(baseline) == PREVIOUS:
        baseline = previous(new)
    compared = results.compare(baseline, new)
    written: dict[Path | None, Callable[[], str]] = {
        markdown: lambda: pages.markdown(compared),
        html: lambda: pages.html(compared, _pixels(new)),
        junit: lambda: pages.junit(compared),
        json_file: lambda: results.to_json(compared, pages.MARK),
    }
    for path, content in written.items():
        if path is not None:
            write_atomically(path, content(), pages.is_ours)
    print(pages.text(compared))
    return GateFailedError.exit_code if compared.regressions else 0


def _pixels(folder: Path) -> results.PixelsOrNone:
    """The validation images; None where they are gone: the page then names them only."""
    try:
        return results.pixels_of(folder)
    except ArtifactError:
        return None
