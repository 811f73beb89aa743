"""`summary.html`: the curves of a run on one page that needs no network and no program."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core import svg
from pipeline.core.files import write_atomically
from pipeline.core.plain import parse_json
from pipeline.core.plots import WIDTH
from pipeline.core.svg import Box

_POINTS = 600
"""Most points of a curve: more than pixels show nothing more."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;
color:#1b1f24;background:#fff;--s0:#0b62c4;--s1:#c2410c}
main{display:flex;flex-wrap:wrap;gap:24px}
svg{width:100%;max-width:460px;height:auto}
text{font:11px system-ui,sans-serif;fill:currentColor}
.grid{stroke:currentColor;opacity:.13}.axis{stroke:currentColor}
.curve{fill:none;stroke-width:1.6}.c0{stroke:var(--s0)}.c1{stroke:var(--s1)}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#15181c;--s0:#6cb0ff;--s1:#ff9a62}}
"""


class Series(NamedTuple):
    """A curve.

    Attributes:
        text: Its label.
        points: (epoch, value) in order.
    """

    text: str
    points: list[tuple[float, float]]


PLOTS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Loss", "cross-entropy", (("training", "step", "loss"), ("validation", "epoch", "val_loss"))),
    (
        "Top-1 on the validation images",
        "share",
        (("weights", "epoch", "val_top1"), ("moving average", "epoch", "ema_top1")),
    ),
    ("Learning rate", "of the next step", (("", "step", "lr"),)),
    ("Norm of the gradient", "before clipping", (("", "step", "gradient_norm"),)),
    ("Speed", "images per second", (("", "step", "images_per_second"),)),
    ("Waiting for images", "share of the time", (("", "step", "data_wait"),)),
)
"""Title, vertical axis, and for each curve its label, kind of event and figure."""


def write_summary(folder: Path) -> None:
    """Draw the curves of a run from its metrics.jsonl; a run without any gets none.

    Args:
        folder: Of the run.
    """
    log = folder / "metrics.jsonl"
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    events = [parse_json(line, str(log)) for line in lines]
    write_atomically(folder / "summary.html", page(folder.name, events))


def page(name: str, events: Sequence[dict[str, Any]]) -> str:
    """The page of a run.

    Args:
        name: Of the run.
        events: Lines of its metrics.jsonl.
    """
    steps = max((event["step"] for event in events), default=1)
    epochs = max((event["epoch"] for event in events), default=1)
    figures = []
    for number, (title, axis, curves) in enumerate(PLOTS):
        series = [Series(text, _points(events, kind, key)) for text, kind, key in curves]
        series = [one for one in series if one.points]
        if series:
            figures.append(_plot(f"plot-{number}", title, axis, series))
    skipped = sum(event["kind"] == "skipped" for event in events)
    line = f"{steps:,} steps, {epochs} epochs; {skipped} steps left out"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(name)}</h1><p>{line}</p>"
        f"<main>{''.join(figures)}</main></html>\n"
    )


def _points(events: Sequence[dict[str, Any]], kind: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of a figure, at most `_POINTS` of them."""
    known = [
        (float(event["step"]), float(event[key]))
        for event in events
        if event["kind"] == kind and event.get(key) is not None and math.isfinite(event[key])
    ]
    return known[:: max(1, math.ceil(len(known) / _POINTS))]


def _plot(identity: str, title: str, axis: str, series: Sequence[Series]) -> str:
    """Curves over the number of steps."""
    plot = Box(48, 24, WIDTH - 10, 206)
    x = svg.scale([p[0] for one in series for p in one.points], plot.left, plot.right, pad=0.02)
    y = svg.scale([p[1] for one in series for p in one.points], plot.bottom, plot.top)
    body = [svg.axes(plot, x, y, "steps", f"{title}, {axis}")]
    for number, one in enumerate(series):
        class_ = f"curve c{number}"
        path = "L".join(f"{svg.pixels(x(a))} {svg.pixels(y(b))}" for a, b in one.points)
        body.append(svg.element("path", d=f"M{path}", class_=class_))
        if len(series) > 1:
            at = 48.0 + 150 * number
            body.append(svg.line(at, 248, at + 24, 248, class_))
            body.append(svg.label(at + 30, 252, one.text))
    last = ", ".join(f"{one.text or title} {one.points[-1][1]:.4g}" for one in series)
    return svg.figure(identity, WIDTH, 258, title, f"last: {last}", "".join(body))
