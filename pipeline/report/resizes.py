"""What other ways of preparing images cost, as a table for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report import text
from pipeline.report.facts import Grid
from pipeline.report.model import Part, Run
from pipeline.steps.facts.resizes import ResizesFacts, WayCost

COLUMNS = (
    "what an application does",
    "images changed",
    "levels",
    "top-1",
    "points lost (95 %)",
    "same answer",
    "shows",
)


def tables(run: Run) -> Iterator[tuple[Grid, list[str]]]:
    """A table, and lines, for the network and for each artifact of which this was asked."""
    for part in run.resizes:
        yield grid(part.facts, outdated(run, part)), list(nothing(part.facts))


def grid(facts: ResizesFacts, outdated: str = "") -> Grid:
    """The table of one of them.

    Args:
        facts: What was measured.
        outdated: Why it is none of what lies there now; "" if it is.
    """
    title = f"{facts.judged}, {words(facts)}"
    own = ("the network's own preprocessing", "", "", text.percent(facts.top1), "", "", "")
    rows = tuple(_row(cost) for cost in facts.ways if not cost.why)
    return Grid(f"{title}; OUTDATED: {outdated}" if outdated else title, COLUMNS, (own, *rows))


def nothing(facts: ResizesFacts) -> Iterator[str]:
    """Which ways mean nothing on these images, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for cost in facts.ways:
        if cost.why:
            by_reason.setdefault(cost.why, []).append(cost.title)
    for reason, titles in by_reason.items():
        yield f"means nothing here: {'; '.join(titles)}: {reason}"


def words(facts: ResizesFacts) -> str:
    """Which images, and what the ways are held against."""
    all_ = "" if facts.images == facts.of else f" of {facts.of:,}"
    told = f"{facts.images:,}{all_} images, against its own preprocessing ({facts.own})"
    if not facts.fitting:
        return told
    if facts.fitting == facts.images:
        return (
            f"{told}; every image has that size already: no filter does anything, and only the "
            "other rows mean something"
        )
    return f"{told}; {facts.fitting:,} of them have that size already"


def _row(cost: WayCost) -> tuple[str, ...]:
    within = text.points_interval(cost.drop).removesuffix(" points")
    lost = f"{text.points(cost.drop).removesuffix(' points')} ({within})"
    levels = f"{cost.levels:.2f}"
    top1, same = text.percent(cost.top1), text.percent(cost.agreement)
    return cost.title, f"{cost.changed:,}", levels, top1, lost, same, cost.told


def outdated(run: Run, part: Part[ResizesFacts]) -> str:
    """Why the figures are none of what lies there now; "" if they are."""
    now = dict(run.reference.made_from) if run.reference else {}
    now |= {artifact.name: artifact.built.digest for artifact in run.artifacts if artifact.built}
    for name, digest in part.made_from.items():
        if now.get(name, digest) != digest:
            return f"of an earlier {name}: run python -m pipeline resizes again"
    return ""


def lines(run: Run) -> Iterator[str]:
    """The most expensive way of each, for who has no room for a table."""
    for part in run.resizes:
        costs = [cost for cost in part.facts.ways if cost.drop.value is not None]
        if not costs or outdated(run, part):
            continue
        worst = max(costs, key=lambda cost: cost.drop.value or 0.0)
        yield (
            f"{part.facts.judged} on images that others prepare: most is lost by {worst.title}: "
            f"{text.points(worst.drop)} ({text.points_interval(worst.drop)}), {worst.told}"
        )
