"""Pages for people, made again only where their results or the code that makes them changed."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, write_atomically
from pipeline.report.model import Run
from pipeline.steps.keys import PROJECT
from pipeline.steps.stated import MOST_BYTES


def _markdown(run: Run) -> str:
    from pipeline.report.markdown import page

    return page(run)


def _html(run: Run) -> str:
    # With Jinja, a sixth of the time of a run in which nothing else is to be done.
    from pipeline.report.gallery import flipped
    from pipeline.report.html import page

    return page(run, flipped(run))


PAGES: dict[str, Callable[[Run], str]] = {"report.md": _markdown, "report.html": _html}


def write_pages(folder: Path, run: Run, results: str) -> None:
    """Write the pages of a run, each whole or not at all; what is as it would be stays.

    Args:
        folder: The results' folder.
        run: What its results.json holds.
        results: The text of results.json, with the seals of all artifacts that pages look into.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    source = hashlib.sha256(f"{results} {_code()}".encode()).hexdigest()
    for name, page in PAGES.items():
        if not _is_of(folder / name, source):
            text = page(run)
            write_atomically(folder / name, text + _mark(text, source))


def _mark(text: str, source: str) -> str:
    """The last line of a page, which tells whether it is whole and up to date."""
    digest = hashlib.sha256(f"{source}\n{text}".encode()).hexdigest()
    return f"<!-- made by python -m pipeline run: {digest} -->\n"


def _is_of(path: Path, source: str) -> bool:
    try:
        found = read_regular(path, MOST_BYTES).decode()
    except (ArtifactError, OSError, ValueError):
        return False  # none yet, or damaged
    text = found[: -len(_mark("", ""))]
    return found == text + _mark(text, source)


@functools.cache
def _code() -> str:
    """What tells apart states of the product's files: after a copy of them, pages are made anew."""
    stated = []
    for folder, inner, names in os.walk(PROJECT / "pipeline"):
        place, holds_templates = Path(folder), Path(folder).name == "templates"
        inner.sort()
        for name in sorted(names):
            if name.endswith(".py") or holds_templates:
                stat = (place / name).stat()
                stated.append((folder, name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(stated).encode()).hexdigest()
