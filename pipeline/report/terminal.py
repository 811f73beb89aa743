"""The table at the end of a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.core.screen import Screen, styled
from pipeline.report import cpu_classes, overview, resizes, text, view
from pipeline.report.model import NOT_SELECTED, BuiltArtifact, Run


def render(*parts: Any, width: int | None = None) -> str:
    """Text of rich tables and lines, for the width of the screen or 100 columns."""
    buffer = io.StringIO()
    is_terminal = sys.stdout.isatty()
    console = Screen(
        file=buffer,
        width=width or (None if is_terminal else 100),
        force_terminal=is_terminal,
    )
    for part in parts:
        console.print(part)
    return buffer.getvalue().rstrip("\n")


def summary(run: Run) -> str:
    """What came out, with a word on every figure that was not measured."""
    table = Table("artifact", "top-1", "agreement", "latency", "size", "state", box=None)
    baseline = view.baseline(run)
    pytorch = ""
    if baseline.value is not None:
        pytorch = _marked(text.milliseconds(baseline), view.baseline_doubt(run))
    table.add_row("pytorch", text.percent(run.pytorch.top1), "", pytorch, "", "")
    for artifact in run.artifacts:
        agreement = artifact.accuracy.agreement
        known = agreement is not None and agreement.value is not None
        table.add_row(
            artifact.name,
            text.percent(artifact.accuracy.top1),
            text.percent(agreement) if agreement and known else "",
            _marked(text.milliseconds(artifact.latency), artifact.latency_doubt),
            text.size(artifact.size),
            _state(artifact),
        )
    cards = [view.card(run, artifact) for artifact in run.artifacts]
    alerts = [f"(!) {line}" for line in overview.alerts(run, cards)]
    lines = dict.fromkeys([*_lines(run), *alerts])
    return render(
        table,
        *lines,
        overview.verdict(run).line,
        f"report: {run.folder}/report.html",
    )


def _marked(latency: str, doubt: str) -> str:
    """A latency, with a mark where a line below says why it is not to be trusted."""
    return f"{latency} (!)" if doubt else latency


def _state(artifact: BuiltArtifact) -> str | Text:
    """How an artifact and its accuracy came about, in a few words."""
    if artifact.failure:
        return styled("failed", "red")
    if artifact.standing == NOT_SELECTED:
        return NOT_SELECTED
    state = str(artifact.accuracy.top1.state)
    return f"{state}, {artifact.standing}" if artifact.standing else state


def _lines(run: Run) -> Iterator[str]:
    """Which artifact to use, why figures are missing, and what failed."""
    yield from overview.referee(run)
    yield from overview.choices(run)
    yield from cpu_classes.lines(run)
    yield from overview.worst_class(run)
    yield from resizes.lines(run)
    for artifact in run.artifacts:
        if artifact.failure:
            yield f"{artifact.name} failed: {artifact.failure}"
            continue
        for what, figure in (("top1", artifact.accuracy.top1), ("latency", artifact.latency)):
            if figure.value is None and figure.why != NOT_SELECTED:
                yield f"{artifact.target} {what} not measured: {figure.why}"
    for gate in run.gates.failures:
        yield f"gate failed: {gate}"
