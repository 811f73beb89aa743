"""The report as Markdown, to paste into a pull request or a README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipeline.core.figures import State
from pipeline.core.published import DEVICES
from pipeline.report import cpu_classes, overview, provenance, resizes, view
from pipeline.report.model import Run
from pipeline.report.view import Card, Figure

_OTHER_DATA = (
    "ImageNet-1K's whole validation split, on the devices that the columns name; ours above are of "
    "this run's images and machine."
)


def page(run: Run) -> str:
    """The whole page."""
    machine = run.machine
    cards = [view.card(run, artifact) for artifact in run.artifacts]
    ended = overview.verdict(run)
    lines = [
        f"# {run.name}",
        "",
        f"{run.date}, {machine.cpu}, {machine.cpus_granted} CPUs, {machine.os}",
        "",
        f"**{_text(ended.line)}**",
        "",
        *_list(ended.lines),
        *_list(overview.alerts(run, cards)),
        *_artifacts(run, cards),
        "",
        *_list(f"**{use.sentence}** `{use.path}`" for use in overview.uses(run, cards)),
        *_list(overview.referee(run)),
        *_list(overview.choices(run)),
        *_list(cpu_classes.lines(run)),
        *_list(overview.worst_class(run)),
        *_list(_reasons(run)),
        *_resizes(run),
        *_published(run),
        "## Made from",
        "",
        *_list(
            f"`{part.name}` {part.digest[:16]}, made from "
            + ", ".join(f"{name} {digest[:16]}" for name, digest in part.made_from.items())
            for part in provenance.parts(run)
            if part.made_from
        ),
        "## Versions",
        "",
        ", ".join(f"{package} {version}" for package, version in run.versions.items()),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _resizes(run: Run) -> Iterator[str]:
    tables = list(resizes.tables(run))
    if tables:
        yield from ("## Other ways to prepare images", "")
    for grid, nothing in tables:
        yield from (_text(grid.title), "", *_table(grid.columns, grid.rows), "", *_list(nothing))


def _published(run: Run) -> Iterator[str]:
    head = (
        "Model",
        "GMACs",
        "Params (M)",
        *(f"{device} (ms)" for device in DEVICES),
        "top-1 (%)",
    )
    rows = (
        (
            row.title,
            row.gmacs,
            row.parameters,
            *(row.latency_ms[device] for device in DEVICES),
            row.top1,
        )
        for row in run.published_of_it
    )
    if run.published_of_it:
        yield from ("## Published", "", _OTHER_DATA, "", *_table(head, rows), "")


def _artifacts(run: Run, cards: Sequence[Card]) -> Iterator[str]:
    batch = view.first_batch(run)
    top1 = view.figure(view.TOP1, run.pytorch.top1)
    latency = view.figure(view.LATENCY, view.baseline(run), doubt=view.baseline_doubt(run))
    head = (
        "Artifact",
        "top-1",
        "top-1 drop",
        "same class",
        f"latency, batch {batch}" if batch else "latency",
        "against PyTorch",
        "size",
    )
    rows = [("PyTorch float32", _figure(top1), "", "", _figure(latency), "", "")]
    rows += [
        (
            _name(card),
            _figure(card.accuracy),
            _value(card.drop),
            _value(card.agreement),
            _figure(card.latency),
            f"{card.ratio.words} ({card.ratio.ratio}; {card.ratio.interval})" if card.ratio else "",
            card.size,
        )
        for card in cards
    ]
    yield from _table(head, rows)


def _name(card: Card) -> str:
    """The artifact's name, and what to know before its figures."""
    if card.failure:
        return f"{card.name} **failed**"
    if card.use:
        return f"**{card.name}: use this**{f' ({card.standing})' if card.standing else ''}"
    return f"{card.name} ({card.standing})" if card.standing else card.name


def _value(figure: Figure) -> str:
    """Value and interval; nothing where there is none."""
    return f"{figure.value} ({figure.interval})" if figure.interval else figure.value


def _figure(figure: Figure) -> str:
    """Value, interval and how they came about."""
    doubt = f", **not to be trusted**: {figure.doubt}" if figure.doubt else ""
    return f"{_value(figure)}, {figure.state}{doubt}" if figure.value else figure.state


def _reasons(run: Run) -> Iterator[str]:
    for state in (State.NOT_MEASURED, State.EMULATED):
        for item in overview.missing(run, state):
            yield f"{state}: {'; '.join(item.what)}: {item.why}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_text(str(cell)).replace("|", "\\|") for cell in row) + " |"


def _list(lines: Iterable[str]) -> Iterator[str]:
    """A list and an empty line; nothing if there are no lines."""
    shown = [f"- {_text(line)}" for line in lines]
    if shown:
        yield from (*shown, "")


def _text(text: str) -> str:
    """On one line, and without HTML of its own."""
    return " ".join(text.split()).replace("<", "&lt;")
