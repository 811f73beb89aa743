"""Puts what a benchmark prints into a document, between two marker lines that name it."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.core.files import write_atomically


def fill(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of `name`; without markers, add them at the end.

    Args:
        document: A Markdown file.
        name: What the markers say: `<!-- name -->` and `<!-- end of name -->`.
        text: The new part.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = document.read_text() if document.exists() else ""
    part = f"{begin}\n{text}\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    new = pattern.sub(lambda _: part, old) if begin in old else f"{old.rstrip()}\n\n{part}\n"
    write_atomically(document, new.lstrip("\n"))
