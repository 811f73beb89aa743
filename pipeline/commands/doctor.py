"""`doctor`: what does this machine lack?"""

from __future__ import annotations

from rich.table import Table

from pipeline.core.screen import styled
from pipeline.report.terminal import render
from pipeline.targets.registry import TARGETS


def doctor(target: str | None) -> str:
    """What targets need and what is there."""
    table = Table("target", "needs", "found", "for", box=None)
    remedies: dict[str, None] = {}
    for name, runtime in TARGETS.items():
        if target in (None, name):
            for need in runtime.requirements():
                found = need.found or styled("missing", "yellow")
                table.add_row(name, need.name, found, need.needed_for)
                if not need.found:
                    remedies[f"{need.name}: {need.remedy}"] = None
    # Below the table, where a narrow screen folds them; in a column it would cut them off.
    return render(table, *remedies)
