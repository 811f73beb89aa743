"""A comparison of two runs for people and for CI: text, Markdown, JUnit XML and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from pipeline.core.screen import styled
from pipeline.core.words import printable
from pipeline.report.compare import NOT_INTERLEAVED, Compared, Pair
from pipeline.report.gallery import thumbnail
from pipeline.report.html import template
from pipeline.report.junit import Case, suite
from pipeline.report.terminal import render

MARK = "CARE Deploy comparison"
"""Stands in every file that is written here, so that it may be replaced by the next."""

MOST_SHOWN = 60
"""Changed images of one artifact on the page; the JSON names all of them."""

_COLOURS = {"worse": "red", "better": "green"}


def text(compared: Compared) -> str:
    """A table for the terminal, and what is proven."""
    table = Table("artifact", "top-1", "drop (95 %)", "p", "images changed", "", box=None)
    for pair in compared.pairs:
        verdict = styled(pair.verdict, _COLOURS.get(pair.verdict, ""))
        table.add_row(*_cells(pair), verdict)
    return render(table, *_notes(compared))


def markdown(compared: Compared) -> str:
    """For a pull request."""
    head = ("artifact", "top-1", "drop (95 %)", "p", "images changed", "verdict")
    lines = [f"### {MARK}", "", _row(head), _row(["---"] * len(head))]
    lines += [_row([*_cells(pair), pair.verdict]) for pair in compared.pairs]
    lines += ["", *(f"- {_escaped(note)}" for note in _notes(compared))]
    return "\n".join(lines) + "\n"


def junit(compared: Compared) -> str:
    """A test case an artifact: it fails where the new run is proven to be worse."""
    return suite(MARK, (_case(pair) for pair in compared.pairs))


def _case(pair: Pair) -> Case:
    is_worse = pair.verdict == "worse" or pair.only_in == "baseline"
    return Case(
        "accuracy",
        pair.name,
        failure=f"{pair.name}: {pair.verdict}, top-1 {_top1(pair)}" if is_worse else "",
        skipped=pair.why_not if pair.verdict == "cannot be told" else "",
    )


def html(compared: Compared, pixels: npt.NDArray[np.uint8] | None) -> str:
    """One page that needs nothing else.

    Args:
        compared: The two runs.
        pixels: The validation images, (images, height, width, channels), for thumbnails.
    """
    rows = [
        {"pair": pair, "cells": _cells(pair), "images": list(_thumbnails(pair, pixels))}
        for pair in compared.pairs
    ]
    return template("compare.html.j2").render(
        mark=MARK, compared=compared, rows=rows, notes=list(_notes(compared)), most=MOST_SHOWN
    )


def is_ours(path: Path) -> bool:
    """Whether a file is one of an earlier comparison."""
    with path.open("rb") as stream:
        return MARK.encode() in stream.read(2000)


def _cells(pair: Pair) -> list[str]:
    drop = ""
    if pair.drop is not None and pair.interval is not None:
        low, high = (100 * bound for bound in pair.interval)
        drop = f"{100 * pair.drop:+.2f} ({low:+.2f} to {high:+.2f})"
    p_value = "" if pair.p_value is None else f"{pair.p_value:.3g}"
    changed = _changed(pair) if pair.drop is not None else ""
    return [pair.name, _top1(pair), drop, p_value, changed]


def _top1(pair: Pair) -> str:
    before, after = ("none" if value is None else f"{100 * value:.2f}" for value in pair.top1)
    states = "" if len(set(pair.states)) == 1 or pair.only_in else f" ({' → '.join(pair.states)})"
    return f"{before} → {after}{states}"


def _changed(pair: Pair) -> str:
    won = sum(image.effect == "won" for image in pair.changed)
    lost = sum(image.effect == "lost" for image in pair.changed)
    return f"{len(pair.changed)}: {won} won, {lost} lost"


def _notes(compared: Compared) -> Iterator[str]:
    """What to know beside the table."""
    yield from compared.regressions or ["no regression is proven"]
    yield from compared.remarks
    reasons = dict.fromkeys(pair.why_not for pair in compared.pairs if pair.why_not)
    yield from (f"accuracy is not compared: {why}" for why in reasons)
    for pair in compared.pairs:
        if pair.size[0] != pair.size[1] and not pair.only_in:
            before, after = (f"{size / 1e6:.2f}" for size in pair.size)
            yield f"size of {pair.name}: {before} → {after} MB"
    for pair in compared.pairs:
        if said := _operations(*pair.operations):
            yield f"operations of {pair.name}: {said}"
    if any(None not in pair.latency for pair in compared.pairs):
        yield f"latency is {NOT_INTERLEAVED}"
    for package, (before, after) in compared.versions.items():
        yield f"{package}: {before} → {after}"
    if len(set(compared.machines)) > 1:
        yield f"machines: {' → '.join(compared.machines)}"


def _operations(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """How many there are and which kinds differ; "" where none do, or one is not known."""
    if not before or not after or before == after:
        return ""
    kinds = [
        f"{kind} {before.get(kind, 0)} → {after.get(kind, 0)}"
        for kind in sorted({*before, *after})
        if before.get(kind) != after.get(kind)
    ]
    return f"{sum(before.values())} → {sum(after.values())} ({', '.join(kinds)})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(cell: str) -> str:
    """Markdown that means nothing but its own characters."""
    return printable(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _thumbnails(pair: Pair, pixels: npt.NDArray[np.uint8] | None) -> Iterator[dict[str, Any]]:
    for image in pair.changed[:MOST_SHOWN]:
        there = pixels is not None and image.number < len(pixels)
        source = thumbnail(pixels[image.number]) if pixels is not None and there else ""
        yield {"image": image, "source": source}
