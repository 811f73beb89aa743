"""Several runs in one table, and which artifacts no other beats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.report.model import Run

COSTS = ("latency_ms", "bytes")
"""What accuracy is paid with."""

COLUMNS = (
    "name",
    "artifact",
    "target",
    "precision",
    "top1",
    "top1_state",
    "latency_ms",
    "latency_state",
    "bytes",
    "best_for_latency_ms",
    "best_for_bytes",
    "failure",
)
Row = dict[str, Any]


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """A row for every artifact of the runs, with whether it lies on a Pareto front.

    Latency is compared within a target, as each has a device of its own; size among all.
    """
    rows: list[Row] = [
        {
            "name": run.name,
            "artifact": artifact.name,
            "target": artifact.target,
            "precision": artifact.precision,
            "top1": artifact.accuracy.top1.value,
            "top1_state": str(artifact.accuracy.top1.state),
            "latency_ms": artifact.latency.value,
            "latency_state": str(artifact.latency.state),
            "bytes": artifact.size,
            "failure": artifact.failure,
        }
        for run in runs
        for artifact in run.artifacts
    ]
    for row in rows:
        beside = [other for other in rows if other["target"] == row["target"]]
        row["best_for_latency_ms"] = on_front(row, beside, "latency_ms")
        row["best_for_bytes"] = on_front(row, rows, "bytes")
    return rows


def on_front(row: Row, others: Sequence[Row], cost: str) -> bool:
    """Whether no other is as accurate for less, or more accurate for no more.

    Figures that are not known neither beat nor are beaten.
    """
    if not _is_known(row, cost):
        return False
    return not any(_beats(other, row, cost) for other in others if _is_known(other, cost))


def _is_known(row: Row, cost: str) -> bool:
    return bool(row["top1"] is not None and row[cost] is not None and not row["failure"])


def _beats(other: Row, row: Row, cost: str) -> bool:
    no_worse: bool = other["top1"] >= row["top1"] and other[cost] <= row[cost]
    return no_worse and bool(other["top1"] > row["top1"] or other[cost] < row[cost])


def as_json(rows: Sequence[Row]) -> str:
    """The rows for programs."""
    return json.dumps({"format": 1, "rows": list(rows)}, indent=1) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The rows for spreadsheets; an unknown figure is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_text(rows: Sequence[Row]) -> str:
    """The rows for people: lines, best accuracy first; a star marks the Pareto fronts."""
    header = ("network", "artifact", "top-1", "latency", "size", "")
    table = [header, *(_line(row) for row in sorted(rows, key=lambda row: -(row["top1"] or 0)))]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) for line in table
    ]
    legend = "* no other is as accurate and faster on this target; + or smaller, of all"
    return "\n".join([line.rstrip() for line in lines] + [legend])


def _line(row: Row) -> tuple[str, ...]:
    if row["failure"]:
        return row["name"], row["artifact"], "failed", "", "", str(row["failure"])[:60]
    marks = ("*" if row["best_for_latency_ms"] else "") + ("+" if row["best_for_bytes"] else "")
    top1 = "unknown" if row["top1"] is None else f"{100 * row['top1']:.2f} % {row['top1_state']}"
    latency = row["latency_state"]
    if row["latency_ms"] is not None:
        latency = f"{row['latency_ms']:.2f} ms {latency}"
    size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f} MB"
    return row["name"], row["artifact"], top1, latency, size, marks
