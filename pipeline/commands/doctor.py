"""`doctor`: what does this machine lack?"""

from __future__ import annotations

from rich.table import Table

from pipeline.core.screen import styled
from pipeline.report.terminal import render
from pipeline.targets.registry import TARGETS


def doctor(target: str | None) -> str:
    """What targets need and what is there."""
    table = Table("target", "needs", "found", "for", "how to get it", box=None)
    for name, runtime in TARGETS.items():
        if target in (None, name):
            for need in runtime.requirements():
                found = need.found or styled("missing", "yellow")
                remedy = "" if need.found else need.remedy
                table.add_row(name, need.name, found, need.needed_for, remedy)
    return render(table)
