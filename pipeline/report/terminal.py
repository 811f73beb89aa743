"""The table at the end of a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.report import overview, text
from pipeline.report.results import Results


def render(*parts: Any, width: int | None = None) -> str:
    """Text of rich tables and lines, for the width of the screen or 100 columns."""
    buffer = io.StringIO()
    is_terminal = sys.stdout.isatty()
    console = Console(
        file=buffer,
        width=width or (None if is_terminal else 100),
        force_terminal=is_terminal,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    return buffer.getvalue().rstrip("\n")


def summary(results: Results, folder: str) -> str:
    """What came out, with a word on every figure that was not measured.

    Args:
        results: What results.json holds.
        folder: Where it lies.
    """
    table = Table("artifact", "top-1", "agreement", "latency", "size", "state", box=None)
    reference = text.number(results["pytorch"].get("facts", {}).get("numbers", {}).get("top1"))
    table.add_row("pytorch", text.percent(reference), "", _pytorch_latency(results), "", "")
    for artifact in results["artifacts"]:
        top1 = text.number(artifact["numbers"].get("top1"))
        agreement = text.number(artifact["numbers"].get("agreement"))
        table.add_row(
            f"{artifact['target']}/{artifact['precision']}",
            text.percent(top1),
            text.percent(agreement) if agreement.value is not None else "",
            text.milliseconds(text.number(artifact["latency"])),
            text.size(artifact.get("size", 0)),
            "[red]failed[/]" if artifact["failure"] else str(top1.state),
        )
    return render(table, *_notes(results), f"report: {escape(folder)}/report.html")


def _pytorch_latency(results: Results) -> str:
    """Latency of the baseline in the first measurement that has one."""
    for bench in results["bench"].values():
        for measured in bench.get("facts", {}).get("batches", {}).values():
            return f"{measured['phases']['pytorch']['engine']['p50']:.2f} ms"
    return ""


def _notes(results: Results) -> Iterator[str]:
    """Which artifact to use, why figures are missing, and what failed; each line once."""
    lines: dict[str, None] = dict.fromkeys(overview.choices(results))
    for artifact in results["artifacts"]:
        name = f"{artifact['target']}/{artifact['precision']}"
        if artifact["failure"]:
            lines[f"{name} failed: {artifact['failure']}"] = None
            continue
        for what in ("top1", "latency"):
            plain = artifact["latency"] if what == "latency" else artifact["numbers"].get(what)
            figure = text.number(plain)
            if figure.value is None:
                lines[f"{artifact['target']} {what} not measured: {figure.why}"] = None
    for gate in results["gates"]:
        lines[f"gate failed: {gate}"] = None
    yield from (escape(line) for line in lines)
