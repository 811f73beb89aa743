"""What the HTML report says, as plain values that its template only has to lay out.

Nothing here looks at a target's name: whatever `results.json` holds is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.figures import Number, Ratio, State
from pipeline.report import facts, provenance, text
from pipeline.report.facts import Block
from pipeline.report.results import Results

PYTORCH = "pytorch"
ENGINE = "engine"
IMAGENET_CLASSES = 1000
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
    """

    title: str
    value: str
    interval: str
    state: str
    origin: str


@dataclass(frozen=True)
class Timing:
    """Timed calls of one runner: one phase at one batch size, or the whole way end to end."""

    runner: str
    batch: str
    phase: str
    p50: str
    interval: str
    p90: str
    p99: str
    mean: str
    samples: int


@dataclass(frozen=True)
class Comparison:
    """How long a runner takes relative to another, with a word on what that shows."""

    batch: str
    against: str
    ratio: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class Card:
    """Everything about one artifact."""

    name: str
    title: str
    anchor: str
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
    verdict: str
    notes: tuple[Block, ...]
    warnings: tuple[str, ...]
    facts: tuple[Block, ...]
    files: tuple[tuple[str, str, str], ...]
    tools: tuple[tuple[str, str], ...]
    chain: tuple[provenance.Link, ...]


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


_SHOWN: dict[str, tuple[str, Words, Words]] = {
    "top1": ("top-1", text.percent, text.percent_interval),
    "top1_drop": ("top-1 drop", text.points, text.points_interval),
    "top5": ("top-5", text.percent, text.percent_interval),
    "agreement": ("same top-1 class as PyTorch", text.percent, text.percent_interval),
    "flips": ("images with another top-1 class", flips, _no_interval),
    "cosine": ("cosine of the logits", _plain(".6f"), _no_interval),
    "max_difference": ("largest difference of logits", _plain(".3g"), _no_interval),
}
"""Figures of validation: title, and how value and interval are written."""

_LATENCY: tuple[str, Words, Words] = (
    "latency, median",
    text.milliseconds,
    text.milliseconds_interval,
)


def figure(plain: Mapping[str, Any] | None, key: str, why: str = "not validated") -> Figure:
    """A figure of validation, or why there is none.

    Args:
        plain: From results.json.
        key: Which figure: one of those that validation knows, or "latency".
        why: Why it is not there, if it is not.
    """
    number = text.number(plain) if plain else Number.not_measured(why)
    title, value, interval = _LATENCY if key == "latency" else _SHOWN[key]
    known = number.value is not None
    return Figure(
        title,
        value(number) if known else "",
        interval(number),
        str(number.state),
        origin(number),
    )


def origin(number: Number) -> str:
    """By what a figure came about, or why there is none."""
    if number.state is State.EMULATED:
        executor = number.by.removeprefix("emulated: ")
        return f"by {executor}, since {number.why}" if number.why else f"by {executor}"
    return number.by or number.why


def bench_facts(results: Results, target: str) -> Mapping[str, Any]:
    """What was measured of a target; empty if nothing was."""
    found: Mapping[str, Any] = (results["bench"].get(target) or {}).get("facts", {})
    return found


def first_batch(results: Results) -> str:
    """Batch size of the latencies that stand for an artifact; "" if none was measured."""
    for target in results["bench"]:
        for batch in bench_facts(results, target).get("batches", {}):
            return str(batch)
    return ""


def baseline(results: Results) -> Number:
    """Latency of PyTorch in the first measurement that has one."""
    for target in results["bench"]:
        measured = bench_facts(results, target)
        for batch in measured.get("batches", {}).values():
            phase = batch["phases"].get(PYTORCH, {}).get(ENGINE)
            if phase:
                low, high = phase["p50_interval"]
                return Number(
                    phase["p50"],
                    State.MEASURED,
                    unit="ms",
                    by=measured["devices"][PYTORCH],
                    samples=phase["samples"],
                    interval=(low, high),
                )
    return Number.not_measured("no target was measured here", unit="ms")


def reference(results: Results) -> Mapping[str, Any]:
    """Accuracy of PyTorch: what validation wrote down; empty if it did not run."""
    facts_of_it: Mapping[str, Any] = (results.get("pytorch") or {}).get("facts", {})
    numbers: Mapping[str, Any] = facts_of_it.get("numbers", {})
    return numbers


def full_name(artifact: Mapping[str, Any]) -> str:
    """Name of a built artifact, such as "ort/fp32"."""
    return f"{artifact['target']}/{artifact['precision']}"


def card(results: Results, artifact: Mapping[str, Any]) -> Card:
    """Everything about one artifact of `results`."""
    name, precision = full_name(artifact), artifact["precision"]
    measured = bench_facts(results, artifact["target"])
    numbers = artifact["numbers"]
    why = text.number(numbers.get("top1")).why or "not validated"
    compared = tuple(comparisons(measured, precision))
    own = dict(artifact.get("facts", {}))
    warnings = repeated(own.pop("warnings", []))
    for hidden in ("target", "precision", "ranges", "log"):
        own.pop(hidden, None)
    cold = measured.get("cold_start_ms", {}).get(precision)
    return Card(
        name=name,
        title=artifact["title"],
        anchor=anchor(name),
        failure=artifact["failure"] or "",
        size=text.size(artifact["size"]) if artifact.get("size") else "",
        accuracy=figure(numbers.get("top1"), "top1", why),
        drop=figure(numbers.get("top1_drop"), "top1_drop", why),
        agreement=figure(numbers.get("agreement"), "agreement", why),
        latency=figure(artifact["latency"], "latency"),
        ratio=next((c for c in compared if c.against == shown(PYTORCH)), None),
        figures=tuple(figure(numbers.get(key), key, why) for key in _SHOWN),
        timings=tuple(timings(measured, precision)),
        comparisons=compared,
        cold_start=f"{cold:.1f} ms" if cold is not None else "",
        verdict=facts.value_text(own.pop("verdict", "")),
        notes=tuple(facts.blocks("", artifact.get("notes") or {})),
        warnings=warnings,
        facts=tuple(facts.blocks("Build", _without_labels(own))),
        files=tuple(
            (file, facts.value_text(record["size"], "size"), record["sha256"])
            for file, record in sorted(artifact.get("files", {}).items())
        ),
        tools=tuple(sorted(artifact.get("tools", {}).items())),
        chain=tuple(provenance.chain(results, artifact)),
    )


def repeated(warnings: Sequence[Any]) -> tuple[str, ...]:
    """Each warning once, with how often it came: builders repeat theirs for every layer."""
    counted = Counter(facts.value_text(warning) for warning in warnings)
    return tuple(
        f"{warning} ({count} times)" if count > 1 else warning for warning, count in counted.items()
    )


def shown(runner: str) -> str:
    """A runner's name for people."""
    return "PyTorch" if runner == PYTORCH else runner


def anchor(name: str) -> str:
    """A name as the target of a link: letters, digits and hyphens."""
    return "a-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _without_labels(own: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without the class names, which the graph's section gives once."""
    network = own.get("network")
    if isinstance(network, Mapping) and "labels" in network:
        return {key: value for key, value in own.items() if key != "network"}
    return dict(own)


def timings(measured: Mapping[str, Any], runner: str) -> Iterator[Timing]:
    """Every phase at every batch size of one runner, then the whole way end to end."""
    for batch, facts_of_batch in measured.get("batches", {}).items():
        for phase, latency in facts_of_batch["phases"].get(runner, {}).items():
            yield _timing(runner, batch, phase, latency)
    whole = measured.get("end_to_end", {}).get(runner)
    if whole:
        yield _timing(runner, "1", "end to end", whole)


def _timing(runner: str, batch: str, phase: str, latency: Mapping[str, Any]) -> Timing:
    def written(key: str) -> str:
        value = latency.get(key)
        return TOO_FEW if value is None else f"{value:.3f}"

    interval = latency.get("p50_interval")
    return Timing(
        shown(runner),
        batch,
        phase,
        written("p50"),
        f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
        written("p90"),
        written("p99"),
        written("mean"),
        latency["samples"],
    )


def comparisons(measured: Mapping[str, Any], runner: str) -> Iterator[Comparison]:
    """Ratios of one runner to PyTorch and to the first precision, at every batch size."""
    for batch, facts_of_batch in measured.get("batches", {}).items():
        for against, key in (
            (PYTORCH, "ratio_to_pytorch"),
            (facts_of_batch.get("baseline", ""), "ratio_to_baseline"),
        ):
            plain = facts_of_batch.get(key, {}).get(runner)
            if plain and against != runner:
                yield _comparison(batch, against, plain)


def _comparison(batch: str, against: str, plain: Mapping[str, Any]) -> Comparison:
    low, high = plain["interval"]
    ratio = Ratio(plain["value"], (low, high))
    verdict = "faster" if ratio.faster else "slower" if ratio.slower else "no difference shown"
    digits = 2 if low >= 0.1 else 3
    interval = f"{low:.{digits}f} to {high:.{digits}f}"
    return Comparison(batch, shown(against), f"{ratio.value:.{digits}f}", interval, verdict)


def class_count(results: Results) -> int:
    """Number of classes of the network; 0 if the export failed."""
    network = (results.get("export") or {}).get("facts", {}).get("network", {})
    return len(network.get("labels", ()))
