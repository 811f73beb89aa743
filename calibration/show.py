"""Ranges for people: a text table with histograms, and rows for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibration.table import Table
from pipeline.core.figures import RangeRow

_BARS = "▁▂▃▄▅▆▇█"
_NAME = 44


def sparkline(counts: Sequence[int]) -> str:
    """A bar for every count, on a logarithmic scale; a blank for zero.

    Logarithmic because activations gather around zero: on a linear scale the tails, which decide
    about the range, would all look empty.
    """
    largest = max(counts, default=0)
    if largest <= 0:
        return " " * len(counts)
    top = math.log1p(largest)
    return "".join(
        _BARS[min(len(_BARS) - 1, int(len(_BARS) * math.log1p(count) / top))] if count else " "
        for count in counts
    )


def rows(table: Table) -> list[RangeRow]:
    """One row for every tensor, in the order of the graph."""
    return [
        RangeRow(
            tensor=name,
            seen=(tensor.seen.low, tensor.seen.high),
            chosen=(tensor.chosen.low, tensor.chosen.high),
            clipped=tensor.clipped,
            constant=tensor.seen.constant,
            histogram=tensor.histogram,
        )
        for name, tensor in table.tensors.items()
    ]


def text(table: Table, limit: int | None = None) -> str:
    """The table as text.

    Args:
        table: See `calibration.table`.
        limit: Most tensors to show, those that are clipped most; None for all of them, in the order
            of the graph.
    """
    shown = list(table.tensors.items())
    if limit is not None and len(shown) > limit:
        kept = sorted(shown, key=lambda item: -item[1].clipped)[:limit]
        shown = [item for item in shown if item in kept]
    names = [_shortened(name) for name, _ in shown]
    width = max([len("tensor"), *map(len, names)])
    lines = [
        _summary(table),
        f"{'tensor':<{width}}  {'seen':^22}  {'chosen':^22}  {'cut':>5}  what was seen",
    ]
    for name, (_, tensor) in zip(names, shown, strict=True):
        lines.append(
            f"{name:<{width}}  {_pair(tensor.seen.low, tensor.seen.high)}  "
            f"{_pair(tensor.chosen.low, tensor.chosen.high)}  {tensor.clipped:>5.0%}  "
            f"|{sparkline(tensor.histogram)}|"
        )
    if len(shown) < len(table.tensors):
        lines.append(f"… {len(table.tensors) - len(shown)} more that are clipped less")
    lines += [f"warning: {warning}" for warning in table.warnings]
    return "\n".join(lines)


def _summary(table: Table) -> str:
    kind = "symmetric" if table.scheme.symmetric else "asymmetric"
    return (
        f"{len(table.tensors)} tensors over {table.images} images: {table.method}, {kind} "
        f"{table.scheme.dtype}"
    )


def _pair(low: float, high: float) -> str:
    return f"{low:>10.4g}  {high:>10.4g}"


def _shortened(name: str) -> str:
    """The end of a long name: its beginning is shared with its neighbours."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
