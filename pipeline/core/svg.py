"""Elements, scales and axes of plots, as SVG text that a page holds inline.

Colours are classes (`series-0` …), so that the page's style sheet decides them for light, dark and
print. Coordinates are rounded to a tenth of a pixel: the same figures give the same text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHARACTER = 6.4
"""Width of an average character of the 11 px label font, in pixels; a little too much rather than
too little, since browsers choose the font."""

MARGIN = 8.0
"""What each plot leaves free on its right, in pixels: texts of ticks may reach into it."""

LINE = 13.0
"""Height of a line of labels, in pixels."""


def element(tag: str, content: str = "", **attributes: str | float | None) -> str:
    """One element.

    Args:
        tag: Its name.
        content: What is inside, as SVG: escaped already.
        attributes: Text or numbers, escaped here; None leaves one out. A trailing underscore is
            dropped, other underscores become hyphens.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def _attribute(value: str | float) -> str:
    return html.escape(value) if isinstance(value, str) else pixels(value)


def pixels(value: float) -> str:
    """A coordinate: at most one decimal, without a needless zero."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def label(x: float, y: float, text: str, *, anchor: str = "start", class_: str = "label") -> str:
    """A line of text, escaped."""
    return element("text", html.escape(text), x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def figure(identity: str, width: float, height: float, title: str, desc: str, body: str) -> str:
    """The `<svg>` around a plot, with title and description for those who do not see it.

    Args:
        identity: Unique in the page.
        width: In pixels; the plot scales with its container.
        height: In pixels.
        title: What the plot shows.
        desc: What there is to see in it.
        body: Its elements.
    """
    named = element("title", html.escape(title), id=f"{identity}-title")
    described = element("desc", html.escape(desc), id=f"{identity}-desc")
    return element(
        "svg",
        named + described + body,
        viewBox=f"0 0 {pixels(width)} {pixels(height)}",
        role="img",
        aria_labelledby=f"{identity}-title {identity}-desc",
    )


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
        low: Value at `start`.
        high: Value at `end`; above `low`.
        start: In pixels.
        end: In pixels; may lie before `start`.
        log: Equal ratios take equal lengths; `low` is positive.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values beyond the ends stay at the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values between the ends: about `count` of them."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, count)


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    pad: float = 0.06,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Scale:
    """A scale that holds all values.

    Args:
        values: What it must hold.
        start: In pixels.
        end: In pixels.
        log: Equal ratios take equal lengths, if all values are positive.
        pad: Share of the range that stays free at both ends.
        limits: What the quantity cannot go beyond.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if log and low > 0:
        factor = (high / low) ** pad if high > low else 1.25
        return Scale(low / factor, high * factor, start, end, log=True)
    room = (high - low) * pad if high > low else abs(high) * 0.05 or 0.5
    low, high = max(low - room, limits[0]), min(high + room, limits[1])
    return Scale(low, high if high > low else low + 1, start, end)


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded: 3 * 0.1 is not 0.3.
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [round(m * 10.0**d, 12) for d in decades for m in multiples]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks
    return ticks if len(ticks) >= 2 else _ticks(low, high, 4)


def tick_text(value: float) -> str:
    """A tick's value, short."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"


def axes(plot: Box, x: Scale, y: Scale, x_title: str, y_title: str) -> str:
    """Grid lines, ticks and titles of both axes.

    Args:
        plot: Where the data lies.
        x: Horizontal scale.
        y: Vertical scale.
        x_title: With the unit.
        y_title: With the unit; stands above the plot, where it reads without turning one's head.
    """
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(line(plot.left, at, plot.right, at, "grid"))
        parts.append(label(plot.left - 6, at + 4, tick_text(value), anchor="end", class_="tick"))
    for value, middle in _apart(x, x.ticks(), plot.right + MARGIN):
        parts.append(line(x(value), plot.top, x(value), plot.bottom, "grid"))
        text = tick_text(value)
        parts.append(label(middle, plot.bottom + 16, text, anchor="middle", class_="tick"))
    parts.append(line(plot.left, plot.bottom, plot.right, plot.bottom, "axis"))
    parts.append(label(0, 12, y_title, class_="axis-title"))
    parts.append(label(plot.right, plot.bottom + 33, x_title, anchor="end", class_="axis-title"))
    return "".join(parts)


def _apart(x: Scale, ticks: Sequence[float], right: float) -> list[tuple[float, float]]:
    """Ticks whose texts do not touch, each with the middle of its text, which ends by `right`."""
    kept: list[tuple[float, float]] = []
    edge = -math.inf
    for value in ticks:
        half = CHARACTER * len(tick_text(value)) / 2
        middle = min(x(value), right - half)
        if middle - half >= edge:
            kept.append((value, middle))
            edge = middle + half + 8
    return kept


MARKERS = ("circle", "square", "triangle", "diamond", "pentagon")
"""Shapes of the series: colour alone tells nothing to those who do not see it."""


def marker(shape: str, x: float, y: float, class_: str, radius: float = 5.0) -> str:
    """A mark at a point; `cross` has no area."""
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=radius, class_=class_)
    if shape == "cross":
        r = radius * 0.8
        path = f"M{pixels(x - r)} {pixels(y - r)}L{pixels(x + r)} {pixels(y + r)}"
        path += f"M{pixels(x - r)} {pixels(y + r)}L{pixels(x + r)} {pixels(y - r)}"
        return element("path", d=path, class_=class_)
    corners, turn, grow = {
        "square": (4, math.pi / 4, 1.25),
        "triangle": (3, 0.0, 1.3),
        "diamond": (4, 0.0, 1.3),
        "pentagon": (5, 0.0, 1.1),
    }[shape]
    points = (
        (
            x + radius * grow * math.sin(turn + 2 * math.pi * i / corners),
            y - radius * grow * math.cos(turn + 2 * math.pi * i / corners),
        )
        for i in range(corners)
    )
    path = "L".join(f"{pixels(px)} {pixels(py)}" for px, py in points)
    return element("path", d=f"M{path}Z", class_=class_)


def place(text: str, x: float, y: float, plot: Box, taken: Sequence[Box]) -> tuple[Box, str]:
    """Where a point's label goes: beside it, where it covers least of what is there.

    Args:
        text: The label.
        x: Of the point, in pixels.
        y: Of the point, in pixels.
        plot: The label stays inside.
        taken: What is there already.

    Returns:
        The label's box, and the anchor of its text: "start", "middle" or "end".
    """
    width, gap = CHARACTER * len(text), 8.0
    candidates: list[tuple[Box, str]] = []
    for shift in (0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0, -4.0, 4.0):
        middle = y + shift * LINE
        top, bottom = middle - LINE / 2, middle + LINE / 2
        candidates.append((Box(x + gap, top, x + gap + width, bottom), "start"))
        candidates.append((Box(x - gap - width, top, x - gap, bottom), "end"))
        if shift:
            candidates.append((Box(x - width / 2, top, x + width / 2, bottom), "middle"))
    inside = [(box, anchor) for box, anchor in candidates if plot.holds(box)] or candidates[:1]
    return min(inside, key=lambda c: sum(c[0].overlap(other) for other in taken))


def spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of lines of text as near as possible to wanted ones, a line apart from each other.

    Lines that would touch form a block around the mean of what they want (isotonic regression by
    pooling neighbours).

    Args:
        wanted: Ascending, in pixels.
        top: Least height.
        bottom: Largest height; with too many lines they come closer to each other.
    """
    step = min(LINE, (bottom - top) / max(1, len(wanted) - 1))
    blocks: list[tuple[float, int]] = []  # first height, lines
    for i, height in enumerate(wanted):
        start, count = height - i * step, 1
        while blocks and blocks[-1][0] >= start:
            before, more = blocks.pop()
            start = (before * more + start * count) / (more + count)
            count += more
        blocks.append((start, count))
    last = bottom - (len(wanted) - 1) * step
    starts = [min(max(start, top), last) for start, count in blocks for _ in range(count)]
    return [start + i * step for i, start in enumerate(starts)]
