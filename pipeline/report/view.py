"""What the report says, as words that HTML and Markdown only have to lay out.

Nothing here looks at a target's name: whatever the run holds is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.figures import LatencySummary, Number, Ratio, State
from pipeline.core.plain import plain
from pipeline.core.timing import END_TO_END
from pipeline.report import facts, provenance, text
from pipeline.report.facts import Block
from pipeline.report.model import EARLIER, BuiltArtifact, Part, Run
from pipeline.steps.facts.accuracy import Accuracy
from pipeline.steps.facts.bench import PYTORCH, Measured
from pipeline.steps.facts.graphs import BuildFacts

TOO_FEW = "too few samples"


@dataclass(frozen=True)
class Figure:
    """A figure with its origin.

    Attributes:
        title: What it is.
        value: With its unit; "" where it was not measured.
        interval: 95 % interval; "" without one.
        state: "measured", "emulated" or "not measured".
        origin: By what, or why not.
        doubt: Why it is not to be trusted; "" if it is.
    """

    title: str
    value: str
    interval: str
    state: str
    origin: str
    doubt: str = ""


@dataclass(frozen=True)
class Timing:
    """Timed calls of one runner: one phase at one batch size, or the whole way end to end.

    Attributes:
        valid: "valid", or what is against the percentiles; "" of the whole way.
    """

    runner: str
    batch: str
    phase: str
    p50: str
    interval: str
    p90: str
    p99: str
    mean: str
    samples: int
    valid: str = ""


@dataclass(frozen=True)
class Comparison:
    """How long a runner takes relative to another, with a word on what that shows."""

    batch: str
    against: str
    ratio: str
    interval: str
    verdict: str
    words: str


@dataclass(frozen=True)
class Card:
    """Everything about one artifact.

    Attributes:
        standing: Whether it is from an earlier run, or was not selected in this one; "" if this run
            made it.
        numerics: What an executor saw while it ran over the images.
        size: Of what is shipped.
        ratio: Its time relative to PyTorch's; None without one that is to be trusted.
        path: Its folder; "" where nothing lies there.
        use: It is the one of its target to use.
        throughput: Images a second, call after call at the first batch size.
        alternatives: Size of files that stand for others where they fit, and are not shipped.
    """

    name: str
    title: str
    anchor: str
    standing: str
    failure: str
    size: str
    accuracy: Figure
    drop: Figure
    agreement: Figure
    latency: Figure
    ratio: Comparison | None
    figures: tuple[Figure, ...]
    timings: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    cold_start: str
    numerics: tuple[Block, ...]
    warnings: tuple[str, ...]
    facts: tuple[Block, ...]
    files: tuple[tuple[str, str, str], ...]
    tools: tuple[tuple[str, str], ...]
    chain: tuple[provenance.Link, ...]
    alternatives: str = ""
    path: str = ""
    use: bool = False
    throughput: str = ""


def flips(value: Number) -> str:
    """Number of images that changed class, out of how many."""
    if value.value is None:
        return str(value.state)
    total = f" of {value.samples:,}" if value.samples else ""
    return f"{value.value:,.0f}{total}"


def _plain(digits: str) -> Callable[[Number], str]:
    return lambda value: str(value.state) if value.value is None else f"{value.value:{digits}}"


Words = Callable[[Number], str]


def _no_interval(value: Number) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """How a figure is written.

    Attributes:
        title: What it is.
        value: The value in words.
        interval: The interval in words.
    """

    title: str
    value: Words
    interval: Words = _no_interval


TOP1 = Kind("top-1", text.percent, text.percent_interval)
TOP1_DROP = Kind("top-1 drop", text.points, text.points_interval)
TOP5 = Kind("top-5", text.percent, text.percent_interval)
AGREEMENT = Kind("same top-1 class as PyTorch", text.percent, text.percent_interval)
FLIPS = Kind("images with another top-1 class", flips)
COSINE = Kind("cosine of the logits", _plain(".6f"))
MAX_DIFFERENCE = Kind("largest difference of logits", _plain(".3g"))
LATENCY = Kind("latency, median", text.milliseconds, text.milliseconds_interval)


def figure(kind: Kind, number: Number | None, earlier: bool = False, doubt: str = "") -> Figure:
    """A figure, or why there is none.

    Args:
        kind: How it is written.
        number: The figure; None where nobody asked for it.
        earlier: It is from an earlier run.
        doubt: Why it is not to be trusted.
    """
    number = number or Number.not_measured("not validated")
    known = number.value is not None
    return Figure(
        kind.title,
        kind.value(number) if known else "",
        kind.interval(number),
        str(number.state),
        f"{origin(number)}, {EARLIER}" if earlier and known else origin(number),
        doubt if known else "",
    )


def origin(number: Number) -> str:
    """By what a figure came about, or why there is none."""
    if number.state is State.EMULATED:
        executor = number.by.removeprefix("emulated: ")
        return f"by {executor}, since {number.why}" if number.why else f"by {executor}"
    return number.by or number.why


def first_batch(run: Run) -> str:
    """Batch size of the latencies that stand for an artifact; "" if none was measured."""
    for measured in measurements(run):
        return str(measured.first_batch)
    return ""


def baseline(run: Run) -> Number:
    """Latency of PyTorch in the first measurement that has one."""
    for measured in measurements(run):
        return measured.headline(PYTORCH)
    return Number.not_measured("no target was measured here", unit="ms")


def baseline_doubt(run: Run) -> str:
    """Why PyTorch's latency is not to be trusted; "" if it is, or there is none."""
    for measured in measurements(run):
        return measured.doubt(PYTORCH)
    return ""


def measurements(run: Run) -> Iterator[Measured]:
    """What was measured on this machine, in the order of targets."""
    for target in run.bench:
        if measured := run.measured(target):
            yield measured


def _narrow_sums(artifact: BuiltArtifact) -> dict[str, Any]:
    """The second verdict as facts; none where there is none."""
    narrow = artifact.narrow_sums
    if narrow is None:
        return {}
    return {
        "agreement_where_sums_are_in": {
            "float32": text.percent(narrow.agreement_wide),
            "half precision": text.percent(narrow.agreement),
            "images": narrow.images,
        }
    }


def _emulation(artifact: BuiltArtifact) -> dict[str, Any]:
    """The error of the emulation as facts; none where nothing was measured and emulated."""
    error = artifact.emulation
    if error is None:
        return {}
    return {
        "emulation_against_the_hardware": {
            "top-1 measured": text.percent(error.measured),
            "top-1 emulated": text.percent(error.emulated),
            "same class": text.percent(error.agreement),
            "largest difference of two logits": error.max_difference.value,
            "images": error.images,
            "emulated by": error.by,
        }
    }


def _photo(artifact: BuiltArtifact) -> dict[str, Any]:
    """What the model with preprocessing inside gives, as facts; none where there is none."""
    photo = artifact.photo
    if photo is None:
        return {}
    return {
        "given_decoded_photographs": {
            "top-1": text.percent(photo.top1),
            "top-1 lost": f"{text.points(photo.drop)} ({text.points_interval(photo.drop)})",
            "same class as given prepared images": text.percent(photo.agreement),
            "largest difference of two logits": photo.max_difference.value,
            "images": photo.images,
            "by": photo.by,
        }
    }


def card(run: Run, artifact: BuiltArtifact) -> Card:
    """Everything about one artifact of a run."""
    accuracy, built = artifact.accuracy, artifact.built
    # Without a latency of its own, what was measured is of an earlier build.
    measured = run.measured(artifact.target) if artifact.latency.value is not None else None
    compared = tuple(comparisons(measured, artifact.precision)) if measured else ()
    cold = measured.cold_start_ms.get(artifact.precision) if measured else None
    earlier = artifact.accuracy_earlier
    numerics = artifact.numerics.to_facts() if artifact.numerics else {}
    return Card(
        name=artifact.name,
        title=artifact.title,
        anchor=anchor(artifact.name),
        standing=artifact.standing,
        failure=artifact.failure,
        size=text.size(artifact.size) if artifact.size else "",
        alternatives=text.size(artifact.alternatives_size) if artifact.alternatives_size else "",
        path=f"{run.folder}/{artifact.name}" if built else "",
        use=is_chosen(run, artifact),
        throughput=_throughput(measured, artifact.latency),
        accuracy=figure(TOP1, accuracy.top1, earlier),
        drop=figure(TOP1_DROP, accuracy.top1_drop, earlier),
        agreement=figure(AGREEMENT, accuracy.agreement, earlier),
        latency=figure(LATENCY, artifact.latency, artifact.latency_earlier, artifact.latency_doubt),
        ratio=None if artifact.latency_doubt else _against_pytorch(compared),
        figures=tuple(figure(kind, number, earlier) for kind, number in _figures(accuracy)),
        timings=tuple(timings(measured, artifact.precision)) if measured else (),
        comparisons=compared,
        cold_start=f"{cold:.1f} ms" if cold is not None else "",
        numerics=tuple(
            facts.blocks(
                "",
                {**numerics, **_narrow_sums(artifact), **_emulation(artifact), **_photo(artifact)},
            )
        ),
        warnings=repeated(built.facts.warnings) if built else (),
        facts=tuple(facts.blocks("Build", build_facts(built))) if built else (),
        files=tuple(_files(built)) if built else (),
        tools=tuple(sorted(built.tools.items())) if built else (),
        chain=tuple(provenance.chain(run, artifact)),
    )


def _against_pytorch(compared: Sequence[Comparison]) -> Comparison | None:
    return next((c for c in compared if c.against == shown(PYTORCH)), None)


def is_chosen(run: Run, artifact: BuiltArtifact) -> bool:
    """Whether an artifact is the one of its target to use."""
    choice = run.choice.get(artifact.target)
    return choice is not None and choice.precision == artifact.precision


def _throughput(measured: Measured | None, latency: Number) -> str:
    if measured is None or not latency.value:
        return ""
    return f"{1000 * measured.first_batch / latency.value:,.0f} images/s"


def _figures(accuracy: Accuracy) -> Iterator[tuple[Kind, Number | None]]:
    yield TOP1, accuracy.top1
    yield TOP1_DROP, accuracy.top1_drop
    yield TOP5, accuracy.top5
    yield AGREEMENT, accuracy.agreement
    yield FLIPS, accuracy.flips
    yield COSINE, accuracy.cosine
    yield MAX_DIFFERENCE, accuracy.max_difference
    if accuracy.by_class is not None:
        worst = f"top-1 of the worst class, {accuracy.by_class.worst}"
        yield Kind(worst, text.percent, text.percent_interval), accuracy.by_class.top1
    for name, number in accuracy.metrics.items():
        yield Kind(name, text.number, text.number_interval), number


def _files(built: Part[BuildFacts]) -> Iterator[tuple[str, str, str]]:
    for file, record in sorted(built.files.items()):
        yield file, facts.value_text(record.size, "size"), record.sha256


def build_facts(built: Part[BuildFacts]) -> dict[str, Any]:
    """What a target told of a build, without what has a place of its own in the report."""
    told = dict(built.facts.more)
    # Class names and all: the graph's section gives it once.
    told.pop("network", None)
    if built.facts.curve:
        told |= {"chosen": plain(built.facts.chosen), "curve": plain(built.facts.curve)}
    if built.build_seconds is not None:
        told["build_seconds"] = built.build_seconds
    return told


def repeated(warnings: Sequence[str]) -> tuple[str, ...]:
    """Each warning once, with how often it came: builders repeat theirs for every layer."""
    told = []
    for warning, count in Counter(warnings).items():
        told.append(f"{warning} ({count} times)" if count > 1 else warning)
    return tuple(told)


def shown(runner: str) -> str:
    """A runner's name for people."""
    return "PyTorch" if runner == PYTORCH else runner


def anchor(name: str) -> str:
    """A name as the target of a link: letters, digits and hyphens."""
    return "a-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def timings(measured: Measured, runner: str) -> Iterator[Timing]:
    """Every phase at every batch size of one runner, then the whole way end to end."""
    for batch, latency in measured.batches.items():
        for phase, calls in latency.phases.get(runner, {}).items():
            valid = _valid(measured.validity(runner, batch, phase))
            yield replace(_timing(runner, batch, phase, calls), valid=valid)
    whole = measured.end_to_end.latency.get(runner)
    if whole:
        yield _timing(runner, measured.end_to_end.batch, END_TO_END, whole)


def _valid(percentiles: Mapping[str, str]) -> str:
    """Both percentiles in a few words."""
    if len(set(percentiles.values())) == 1:
        return next(iter(percentiles.values()))
    return "; ".join(f"{name} {state}" for name, state in percentiles.items())


def _timing(runner: str, batch: int, phase: str, calls: LatencySummary) -> Timing:
    low, high = calls.p50_interval
    return Timing(
        shown(runner),
        str(batch),
        phase,
        _milliseconds(calls.p50),
        f"{low:.3f} to {high:.3f}",
        _bounded(calls.p90, calls.p90_bound),
        _bounded(calls.p99, calls.p99_bound),
        _milliseconds(calls.mean),
        calls.samples,
    )


def _milliseconds(value: float | None) -> str:
    return TOO_FEW if value is None else f"{value:.3f}"


def _bounded(value: float | None, bound: float | None) -> str:
    """A percentile, and what it is at most; earlier results have no bounds."""
    told = _milliseconds(value)
    return told if value is None or bound is None else f"{told} (≤ {bound:.3f})"


def comparisons(measured: Measured, runner: str) -> Iterator[Comparison]:
    """Ratios of one runner to PyTorch and to the first precision, at every batch size."""
    for batch, latency in measured.batches.items():
        against_pytorch = latency.ratio_to_pytorch.get(runner)
        if against_pytorch:
            yield _comparison(batch, PYTORCH, against_pytorch)
        against_first = latency.ratio_to_baseline.get(runner)
        if against_first:
            yield _comparison(batch, latency.baseline, against_first)


def _comparison(batch: int, against: str, ratio: Ratio) -> Comparison:
    low, high = ratio.interval
    verdict = "faster" if ratio.faster else "slower" if ratio.slower else "no difference shown"
    digits = 2 if low >= 0.1 else 3
    interval = f"{low:.{digits}f} to {high:.{digits}f}"
    value = f"{ratio.value:.{digits}f}"
    return Comparison(str(batch), shown(against), value, interval, verdict, in_words(ratio))


def in_words(ratio: Ratio) -> str:
    """How much faster or slower, as people say it; nothing is claimed that was not shown."""
    if ratio.faster:
        return f"{1 / ratio.value:.1f} x faster"
    if ratio.slower:
        return f"{ratio.value:.1f} x slower"
    return "no difference shown"


def cost(run: Run) -> tuple[tuple[str, str], ...]:
    """What the network is and costs, in a few pairs."""
    if run.export is None:
        return ()
    facts, pairs = run.export.facts, []
    if model := facts.network.description.get("model"):
        pairs.append(("network", model))
    if licence := facts.network.description.get("license"):
        pairs.append(("licence of the weights", licence))
    if facts.parameters:
        pairs.append(("parameters", f"{facts.parameters / 1e6:.2f} million"))
    if facts.macs:
        pairs.append(("multiply-accumulates of an image", f"{facts.macs / 1e9:.3f} GMACs"))
    pairs.append(("image", " x ".join(map(str, facts.network.input_shape))))
    pairs.append(("classes", f"{len(facts.network.labels):,}"))
    return tuple(pairs)


def class_count(run: Run) -> int:
    """Number of classes of the network; 0 if the export failed."""
    return len(run.network.labels) if run.network else 0
