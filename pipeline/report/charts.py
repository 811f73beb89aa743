"""Which plots a run's results give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core import plots
from pipeline.core.figures import State
from pipeline.core.plots import Curve, Point, Words
from pipeline.core.published import PUBLISHED
from pipeline.report.model import IMAGENET_CLASSES, Run
from pipeline.report.view import (
    anchor,
    baseline,
    class_count,
    first_batch,
    measurements,
    shown,
)
from pipeline.steps.facts.bench import PYTORCH
from pipeline.steps.facts.graphs import TriedCompression
from pipeline.targets.registry import TARGETS

_TOP1 = "top-1 (%)"
_PYTORCH_SERIES = plots.SERIES - 1


@dataclass(frozen=True)
class Plot:
    """A plot with the words below it.

    Attributes:
        title: What it shows.
        svg: The `<svg>`, ready for the page.
        caption: What to know when reading it.
    """

    title: str
    svg: str
    caption: str


def all_plots(run: Run) -> list[Plot]:
    """All plots for which there are figures."""
    return [
        *_accuracy_latency(run),
        *_beside_published(run),
        *_accuracy_size(run),
        *_size_curves(run),
        *_distributions(run),
    ]


def _ours(run: Run, target: str | None = None) -> list[Point]:
    """A point for every artifact whose accuracy is known; x is its latency, if measured."""
    targets = list(run.bench)
    points = []
    for artifact in run.artifacts:
        top1, latency = artifact.accuracy.top1, artifact.latency
        if top1.value is None or target not in (None, artifact.target):
            continue
        points.append(
            Point(
                artifact.name,
                latency.value,
                100 * top1.value,
                plots.EMULATED if top1.state is State.EMULATED else plots.MEASURED,
                targets.index(artifact.target) % _PYTORCH_SERIES,
                latency.interval,
                _percent(top1.interval),
            )
        )
    return points


def _percent(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval[0], 100 * interval[1])


def _pytorch(run: Run) -> list[Point]:
    """The baseline, if its accuracy and its latency are known."""
    top1, latency = run.pytorch.top1, baseline(run)
    if top1.value is None or latency.value is None:
        return []
    return [
        Point(
            "PyTorch",
            latency.value,
            100 * top1.value,
            plots.MEASURED,
            _PYTORCH_SERIES,
            latency.interval,
            _percent(top1.interval),
        )
    ]


def _accuracy_latency(run: Run) -> Iterator[Plot]:
    points = [*_ours(run), *_pytorch(run)]
    if not points:
        return
    timed = any(point.x is not None for point in points)
    title = "Accuracy against latency" if timed else "Accuracy; no latency was measured"
    batch = first_batch(run)
    axis = f"median latency (ms), batch {batch}" if batch else "median latency (ms)"
    words = Words(title, _told(points, "ms"), axis, _TOP1)
    caption = "Bars are 95 % intervals. Filled: accuracy measured; hollow: emulated."
    if timed:
        caption += " Artifacts whose latency was not measured stand aside."
    if devices := list(dict.fromkeys(_devices(run))):
        caption += f" Measured on: {'; '.join(devices)}."
    if len(list(measurements(run))) > 1:
        caption += " Latencies of different devices do not compare with each other."
    plot = plots.scatter("accuracy-latency", points, words, log=_wide(points))
    yield Plot(title, plot, caption)


def _devices(run: Run) -> Iterator[str]:
    for measured in measurements(run):
        for runner, device in measured.devices.items():
            if runner != PYTORCH:
                yield device


def _wide(points: Sequence[Point]) -> bool:
    known = [point.x for point in points if point.x is not None and point.x > 0]
    return bool(known) and max(known) / min(known) > 5


def _told(points: Sequence[Point], unit: str) -> str:
    """What a scatter plot shows, in words."""
    return "; ".join(
        f"{p.text}: {p.y:.2f} %"
        + (f" at {p.x:.4g} {unit}" if p.x is not None else ", not measured")
        + (f" ({p.kind})" if p.kind != plots.MEASURED else "")
        for p in points
    )


def _beside_published(run: Run) -> Iterator[Plot]:
    """Published rows as context; only where the network answers the same question as theirs."""
    if class_count(run) != IMAGENET_CLASSES:
        return
    for target in run.bench:
        ours = _ours(run, target)
        if not ours:
            continue
        device = TARGETS[target].published_on
        if not device:
            continue
        rows = [
            Point(row.title, row.latency_ms[device], row.top1, plots.PUBLISHED, _PYTORCH_SERIES)
            for row in PUBLISHED
        ]
        title = f"{target} beside the published rows ({device})"
        points = [*ours, *rows]
        words = Words(title, _told(points, "ms"), "latency (ms)", _TOP1)
        yield Plot(
            title,
            plots.scatter(f"published-{target}", points, words, log=_wide(points)),
            f"Crosses: published, on {device} with ImageNet-1K's whole validation split. "
            "Ours are from the device and images of this run: context, not a ranking.",
        )


def _accuracy_size(run: Run) -> Iterator[Plot]:
    sizes = {artifact.name: artifact.size / 1e6 for artifact in run.artifacts}
    points = [
        Point(p.text, sizes[p.text], p.y, p.kind, p.series, None, p.y_interval)
        for p in _ours(run)
        if sizes[p.text]
    ]
    if not points:
        return
    title = "Accuracy against size"
    words = Words(title, _told(points, "MB"), "size of the artifact (MB)", _TOP1)
    yield Plot(
        title,
        plots.scatter("accuracy-size", points, words, log=_wide(points)),
        "Bars are 95 % intervals. Filled: accuracy measured; hollow: emulated. A size is "
        "that of what is shipped.",
    )


def _size_curves(run: Run) -> Iterator[Plot]:
    """What a search over compressions tried."""
    for artifact in run.artifacts:
        facts = artifact.built.facts if artifact.built else None
        if facts and facts.curve:
            yield _size_curve(artifact.name, facts.curve, facts.chosen)


def _size_curve(
    name: str, curve: Sequence[TriedCompression], chosen: TriedCompression | None
) -> Plot:
    points = []
    for mix in curve:
        built = mix == chosen
        points.append(
            Point(
                "chosen" if built else "",
                mix.size / 1e6,
                100 * mix.changed,
                plots.MEASURED if built else plots.EMULATED,
                2 if built else 0,
            )
        )
    title = f"What {name} could have been"
    desc = "; ".join(f"{p.y:.2f} % changed at {p.x:.3g} MB {p.text}".rstrip() for p in points)
    words = Words(title, desc, "size (MB)", "calibration images whose class changes (%)")
    return Plot(
        title,
        plots.scatter(f"curve-{anchor(name)}", points, words),
        "Every compression that was tried on the calibration images, by the executor; the "
        "filled one was built.",
    )


def _distributions(run: Run) -> Iterator[Plot]:
    for target in run.bench:
        measured = run.measured(target)
        for batch, latency in (measured.batches if measured else {}).items():
            curves = _curves(latency.samples_ms)
            if not curves:
                continue
            title = f"Latency distribution, {target}, batch {batch}"
            desc = "; ".join(curve.text for curve in curves)
            words = Words(
                title, desc, "latency (ms)", "share of calls that took at most so long (%)"
            )
            identity = f"distribution-{target}-{batch}"
            yield Plot(
                title,
                plots.ecdf(identity, curves, words),
                "Every timed call counts; all were timed in turn, in one run.",
            )


def _curves(samples: Mapping[str, Sequence[float]]) -> list[Curve]:
    curves = []
    for i, (runner, values) in enumerate(samples.items()):
        if not values:
            continue
        ordered = sorted(values)
        median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        series = _PYTORCH_SERIES if runner == PYTORCH else i % _PYTORCH_SERIES
        name = shown(runner)
        curves.append(
            Curve(f"{name}: median {median:.3f} ms, {len(values):,} calls", values, series)
        )
    return curves
