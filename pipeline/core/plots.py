"""The plots of the report: accuracy against something, distribution of latency, histograms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import svg
from pipeline.core.svg import Box

WIDTH = 460.0
"""Of a plot, in pixels: on a phone it shrinks to 340 and stays readable."""

SERIES = 6
"""Colours of the style sheet; series beyond them begin again, with another shape or dashes."""

MEASURED, EMULATED, PUBLISHED = "measured", "emulated", "published"

_CURVE_POINTS = 240


@dataclass(frozen=True)
class Point:
    """A point of `scatter`.

    Attributes:
        text: Its label; "" for none.
        x: None where it was not measured: the point stands in a column of its own.
        y: Its height.
        kind: `MEASURED` (filled), `EMULATED` (hollow) or `PUBLISHED` (cross).
        series: Number of colour and shape.
        x_interval: 95 % interval.
        y_interval: 95 % interval.
    """

    text: str
    x: float | None
    y: float
    kind: str
    series: int
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """Samples of one thing, for `ecdf`.

    Attributes:
        text: Its label.
        samples: In the unit of the axis; at least one.
        series: Number of colour and dashes.
    """

    text: str
    samples: Sequence[float]
    series: int


@dataclass(frozen=True)
class Words:
    """What is written around a plot.

    Attributes:
        title: What it shows.
        desc: What there is to see, for those who do not see it.
        x: Title of the horizontal axis, with the unit.
        y: Title of the vertical axis, with the unit.
        missing: Heading of the column of points that have no x.
    """

    title: str
    desc: str
    x: str
    y: str
    missing: str = "not measured"


def scatter(identity: str, points: Sequence[Point], words: Words, *, log: bool = False) -> str:
    """Points with intervals and labels.

    Args:
        identity: Unique in the page.
        points: At least one.
        words: Title and axes.
        log: Horizontal axis by ratios.
    """
    height = 330.0
    placed = [point for point in points if point.x is not None]
    aside = [point for point in points if point.x is None]
    column = _column_width(aside) if aside else 0.0
    plot = Box(44, 24, WIDTH - 8 - (column if placed else 0), height - 44)
    xs = [v for p in placed for v in (p.x, *(p.x_interval or ())) if v is not None]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    # Labels need more room than points: the range is padded generously.
    x = svg.scale(xs, plot.left, plot.right, log=log, pad=0.16, limits=(0, math.inf))
    y = svg.scale(ys, plot.bottom, plot.top, pad=0.12)
    body = [svg.axes(plot, x, y, words.x, words.y)] if placed else [_column_axes(plot, y, words)]
    spots = [(point, x(point.x), plot) for point in placed if point.x is not None]
    body += _marks(spots, x, y)
    if aside:
        left = plot.right + 10 if placed else plot.left
        side = Box(left, plot.top, WIDTH - 2, plot.bottom)
        if placed:
            body.append(_frame(side, words.missing))
        body += _column(aside, side, x, y)
    return svg.figure(identity, WIDTH, height, words.title, words.desc, "".join(body))


def _column_width(points: Sequence[Point]) -> float:
    """Room for the marks and the longest label, within reason."""
    return 56 + svg.CHARACTER * min(18, max(len(point.text) for point in points))


def _column_axes(plot: Box, y: svg.Scale, words: Words) -> str:
    """Axes of a plot in which no point has an x."""
    parts = [svg.label(0, 12, words.y, class_="axis-title")]
    for value in y.ticks():
        parts.append(svg.line(plot.left, y(value), plot.right, y(value), "grid"))
        text = svg.tick_text(value)
        parts.append(svg.label(plot.left - 6, y(value) + 4, text, anchor="end", class_="tick"))
    return "".join(parts)


def _frame(side: Box, heading: str) -> str:
    """Around the column of points without an x, with its heading below."""
    width, height = side.right - side.left, side.bottom - side.top
    middle = (side.left + side.right) / 2
    return svg.element(
        "rect", x=side.left, y=side.top, width=width, height=height, class_="aside"
    ) + svg.label(middle, side.bottom + 16, heading, anchor="middle", class_="tick")


def _column(points: Sequence[Point], side: Box, x: svg.Scale, y: svg.Scale) -> list[str]:
    """Points without an x: marks on the left, and a list of their labels on the right."""
    ordered = sorted(points, key=lambda point: -point.y)
    # Points of nearly equal height would cover each other: they take turns in three lanes.
    lanes = [side.left + 9 + 11.0 * (i % 3) for i in range(len(ordered))]
    spots = [
        (dataclasses.replace(point, text=""), lane, side)
        for point, lane in zip(ordered, lanes, strict=True)
    ]
    body = _marks(spots, x, y)
    heights = svg.spread([y(point.y) for point in ordered], side.top + 7, side.bottom - 5)
    at = side.left + 44
    for point, lane, height in zip(ordered, lanes, heights, strict=True):
        body.append(svg.line(lane + 6, y(point.y), at - 2, height, "leader"))
        body.append(svg.label(at, height + 4, point.text))
    return body


def _marks(spots: Sequence[tuple[Point, float, Box]], x: svg.Scale, y: svg.Scale) -> list[str]:
    """Intervals below, then marks, then labels that avoid both."""
    intervals, marks, labels, taken = [], [], [], []
    for point, at, _ in spots:
        colour, height = f"series-{point.series % SERIES}", y(point.y)
        # Labels may lie over an interval, but better not: it takes a narrow box.
        if point.y_interval:
            low, high = (y(value) for value in point.y_interval)
            intervals.append(svg.line(at, low, at, high, f"interval {colour}"))
            taken.append(Box(at - 2, high, at + 2, low))
        if point.x_interval and point.x is not None:
            low, high = (x(value) for value in point.x_interval)
            intervals.append(svg.line(low, height, high, height, f"interval {colour}"))
            taken.append(Box(low, height - 2, high, height + 2))
        shape = svg.MARKERS[point.series % len(svg.MARKERS)]
        shape = "cross" if point.kind == PUBLISHED else shape
        marks.append(svg.marker(shape, at, height, f"mark {point.kind} {colour}"))
        taken.append(Box(at - 6, height - 6, at + 6, height + 6))
    for point, at, room in spots:
        if not point.text:
            continue
        height = y(point.y)
        box, anchor = svg.place(point.text, at, height, room, taken)
        taken.append(box)
        edges = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}
        middle = (box.top + box.bottom) / 2
        if abs(middle - height) > 1.5 * svg.LINE:
            labels.append(svg.line(at, height, edges[anchor], middle, "leader"))
        labels.append(svg.label(edges[anchor], middle + 4, point.text, anchor=anchor))
    return [*intervals, *marks, *labels]


def ecdf(identity: str, curves: Sequence[Curve], words: Words) -> str:
    """Share of calls that took at most so long, for each curve; nothing is cut off.

    Args:
        identity: Unique in the page.
        curves: At least one.
        words: Title and axes.
    """
    legend = 18.0 * len(curves)
    height = 250.0 + legend
    plot = Box(44, 24, WIDTH - 10, 206)
    values = [value for curve in curves for value in curve.samples]
    wide = min(values) > 0 and max(values) / min(values) > 3
    x = svg.scale(values, plot.left, plot.right, log=wide, pad=0.02)
    y = svg.Scale(0, 100, plot.bottom, plot.top)
    body = [svg.axes(plot, x, y, words.x + (", logarithmic" if wide else ""), words.y)]
    for i, curve in enumerate(curves):
        class_ = f"curve series-{curve.series % SERIES} dash-{curve.series % 4}"
        body.append(svg.element("path", d=_steps(curve.samples, x, y), class_=class_))
        at = 254 + 18.0 * i
        body.append(svg.line(plot.left, at - 4, plot.left + 28, at - 4, class_))
        body.append(svg.label(plot.left + 36, at, curve.text))
    return svg.figure(identity, WIDTH, height, words.title, words.desc, "".join(body))


def _steps(samples: Sequence[float], x: svg.Scale, y: svg.Scale) -> str:
    """The path of an empirical distribution; long ones keep every k-th step and both ends."""
    ordered = sorted(samples)
    total = len(ordered)
    ranks = range(total)
    if total > _CURVE_POINTS:
        ranks = range(0, total, math.ceil(total / _CURVE_POINTS))
    path = [f"M{svg.pixels(x(ordered[0]))} {svg.pixels(y(0))}"]
    for rank in sorted({*ranks, total - 1}):
        path.append(f"H{svg.pixels(x(ordered[rank]))}V{svg.pixels(y(100 * (rank + 1) / total))}")
    return "".join(path)


def histogram(
    identity: str, counts: Sequence[int], seen: tuple[float, float], chosen: tuple[float, float]
) -> str:
    """A small histogram of a tensor on a logarithmic scale, with the range chosen for it.

    Args:
        identity: Unique in the page.
        counts: In equal parts of what was seen.
        seen: Smallest and largest value seen.
        chosen: Range to quantize with.
    """
    width, height = 160.0, 26.0
    top = math.log1p(max(counts, default=0)) or 1.0
    bar = width / max(1, len(counts))
    # One path of all bars: a page has hundreds of histograms, and an element for each of their bars
    # would make most of its size.
    right = svg.pixels(max(bar - 0.6, 0.5))
    bars = "".join(
        f"M{svg.pixels(i * bar)} {svg.pixels(height)}"
        f"v{svg.pixels(-height * math.log1p(count) / top)}h{right}V{svg.pixels(height)}z"
        for i, count in enumerate(counts)
        if count
    )
    body = svg.element("path", d=bars, class_="bar") if bars else ""
    length = seen[1] - seen[0]
    edges = [width * (edge - seen[0]) / length for edge in chosen] if length > 0 else []
    ends = "".join(svg.line(at, 0, at, height, "edge") for at in edges if 0 < at < width)
    title = "Histogram of the values seen"
    desc = f"from {seen[0]:.4g} to {seen[1]:.4g}; range {chosen[0]:.4g} to {chosen[1]:.4g}"
    return svg.figure(identity, width, height, title, desc, body + ends)
