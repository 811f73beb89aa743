"""The run as a whole: how it ended, what to know first, which figures are missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from calibration.budget import Budget
from pipeline.core.figures import State, ratio
from pipeline.core.network import LICENCE_REMARK
from pipeline.report import text, view
from pipeline.report.model import NOT_SELECTED, BuiltArtifact, GateReport, Run
from pipeline.steps.facts.accuracy import EmulationError, NarrowSums, PhotoCheck
from pipeline.steps.step import State as StepState

EXIT_CODES = {
    0: "fine",
    1: "a gate of the configuration does not hold",
    2: "something that was given does not make sense",
    3: "a build failed",
    4: "this machine lacks the hardware or software",
    70: "an unforeseen fault",
}


FAR_BELOW = 0.05
"""Share of images by which an artifact's agreement with PyTorch may lie below the others'."""

REPAIRED_HEADROOM = Budget().headroom
"""Least headroom that a repaired graph shall have on the validation images."""

FEWEST_TO_COMPARE = 3
"""Artifacts of which one may stand out."""


@dataclass(frozen=True)
class Verdict:
    """How the run ended, in one line.

    Attributes:
        good: Whether nothing failed.
        line: The words.
        lines: Failures and gates that do not hold, one each.
    """

    good: bool
    line: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Missing:
    """Figures that were not measured, or were emulated, for one reason.

    Attributes:
        what: Such as "accuracy of trt/fp16, trt/int8".
        why: The reason.
    """

    what: tuple[str, ...]
    why: str


def verdict(run: Run) -> Verdict:
    """How the run ended; failures come before gates."""
    failures = list(_failures(run))
    lines = dict.fromkeys(failures)
    for step in run.steps:
        if step.state is StepState.SKIPPED:
            lines[f"{step.name} was skipped: {step.why}"] = None
    for gate in run.gates.failures:
        lines[f"gate does not hold: {gate}"] = None
    told = " and ".join(_counts(len(failures), len(run.gates.failures)))
    meaning = EXIT_CODES.get(run.exit_code, "see the log")
    line = told or (_success(run) if run.exit_code == 0 else meaning)
    good = run.exit_code == 0 and not told
    return Verdict(good, f"{line} (exit code {run.exit_code}: {meaning})", tuple(lines))


def _failures(run: Run) -> Iterator[str]:
    """Steps of this run that failed, in their order."""
    for step in run.steps:
        if step.state is StepState.FAILED:
            yield f"{step.name} failed: {step.why}"


def _counts(failures: int, gates: int) -> Iterator[str]:
    if failures:
        yield "1 failure" if failures == 1 else f"{failures} failures"
    if gates:
        yield "1 gate that does not hold" if gates == 1 else f"{gates} gates that do not hold"


def _success(run: Run) -> str:
    """What is done, of what was asked for, and what that says of gates."""
    if not run.steps:
        done = "No step was selected: this is what lies there"
    elif run.not_selected:
        total = len(run.steps) + len(run.not_selected)
        done = f"All that was selected is done, {len(run.steps)} of {total} steps"
    else:
        done = "Everything was built"
    return f"{done}{_gates_in_words(run.gates)}"


def _gates_in_words(gates: GateReport) -> str:
    """What can be said of gates where none failed."""
    if not gates.limits:
        return "; no gate is set"
    if not gates.judged:
        return "; no gate was judged, for want of figures"
    unjudged = gates.limits - gates.judged
    left = f"; {unjudged} of {gates.limits} had no figure to judge" if unjudged else ""
    told = (
        f"; {len(gates.doubts)} of them cannot be told with so few images" if gates.doubts else ""
    )
    return f", and no gate failed{left}{told}"


def told_first(run: Run) -> Iterator[str]:
    """The same as `alerts`, for who has no cards."""
    return alerts(run, [view.card(run, artifact) for artifact in run.artifacts])


def alerts(run: Run, cards: Sequence[view.Card]) -> Iterator[str]:
    """What a reader should know before any figure, though nothing failed."""
    yield from run.problems
    if run.network and (remark := run.network.description.get(LICENCE_REMARK)):
        yield remark
    layers = run.reference.facts.range if run.reference else None
    if layers and layers.words and any(artifact.overflowed for artifact in run.artifacts):
        yield layers.words
    for artifact, one in zip(run.artifacts, cards, strict=True):
        yield from _workarounds(one.name, artifact)
        yield from _overflow(one.name, artifact)
        yield from _sums(one.name, artifact.narrow_sums)
        yield from _emulation(one.name, artifact.emulation)
        yield from _photo(one.name, artifact.photo)
        yield from _repaired(one.name, artifact)
        for link in one.chain:
            if link.problem:
                yield f"{one.name} is outdated: {link.name} was {link.problem}; run again"
    if run.calibration:
        yield from (f"calibration: {warning}" for warning in run.calibration.facts.warnings)
    if run.simplified and run.simplified.facts.why_not:
        yield f"the graph was not simplified: {run.simplified.facts.why_not}"
    for target in run.bench:
        measured = run.measured(target)
        doubts = (
            dict.fromkeys(measured.doubt(name) for name in measured.devices) if measured else {}
        )
        for doubt in filter(None, doubts):
            yield (
                f"{target}: latency is not to be trusted: {doubt}; no gate and no choice uses it, "
                "measure again"
            )
    yield from _doubts(run.gates)
    yield from remarks(run)


def _doubts(gates: GateReport) -> Iterator[str]:
    """Gates that cannot be told, those of one reason together; what counts as failed is told so."""
    by_reason: dict[str, list[str]] = {}
    for doubt in gates.doubts:
        if not doubt.fails:
            by_reason.setdefault(doubt.words, []).append(f"{doubt.target}/{doubt.precision}")
    for reason, names in by_reason.items():
        yield f"gate in doubt: {', '.join(names)}: {reason}"


def remarks(run: Run) -> Iterator[str]:
    """What is against expectation: nothing is wrong, but somebody should look."""
    for artifact in run.artifacts:
        yield from _against_float(run, artifact)
    agreements = {
        artifact.name: artifact.accuracy.agreement.value
        for artifact in run.artifacts
        if artifact.accuracy.agreement and artifact.accuracy.agreement.value is not None
    }
    if len(agreements) < FEWEST_TO_COMPARE:
        return
    usual = median(agreements.values())
    for name, agreement in agreements.items():
        if agreement < usual - FAR_BELOW:
            yield (
                f"{name} agrees with PyTorch on {100 * agreement:.1f} % of the images, where "
                f"{100 * usual:.1f} % are usual in this run: look at its calibration and at "
                f"python -m pipeline diff --target {name.partition('/')[0]}"
            )


def _against_float(run: Run, artifact: BuiltArtifact) -> Iterator[str]:
    """Where quantizing brought the opposite of what it is for."""
    floats = [
        other
        for other in run.artifacts
        if other.target == artifact.target and other.precision.startswith("fp") and other.size
    ]
    if not artifact.precision.startswith("int") or not artifact.size or not floats:
        return
    smallest = min(floats, key=lambda other: other.size)
    if artifact.size > smallest.size:
        yield (
            f"{artifact.name} is larger than {smallest.name} ({artifact.size / 1e6:.2f} against "
            f"{smallest.size / 1e6:.2f} MB), though its weights take fewer bits"
        )
    measured = run.measured(artifact.target)
    for other in floats:
        known = (
            artifact.trusted_latency.value is not None and other.trusted_latency.value is not None
        )
        if measured is None or not known:
            continue
        compared = ratio(
            measured.samples_ms[artifact.precision], measured.samples_ms[other.precision]
        )
        if compared.slower:
            yield f"{artifact.name} is slower than {other.name}: {compared.value:.2f} of its time"


REPAIRED_PRECISIONS = ("fp16", "bf16")
REPAIR_REMEDY = (
    "repair: true under its target keeps what breaks in a wider type, chosen on calibration images"
)


def _workarounds(name: str, artifact: BuiltArtifact) -> Iterator[str]:
    """What was built in another way than was asked for."""
    if artifact.built is not None:
        yield from (f"{name}: {line}" for line in artifact.built.facts.workarounds)


def _overflow(name: str, artifact: BuiltArtifact) -> Iterator[str]:
    numerics = artifact.numerics
    if numerics is None:
        return
    if numerics.overflowed_values:
        count = f"{numerics.overflowed_values:,}"
        told = f"{name}: {count} values left the range of their type while it ran"
        can_repair = artifact.precision in REPAIRED_PRECISIONS and artifact.repair is None
        yield told + (f"; {REPAIR_REMEDY}" if can_repair else "")
    elif numerics.overflowed_tensors:
        tensors = ", ".join(numerics.overflowed_tensors)
        yield f"{name}: values that are not finite were carried on in {tensors}"


def _sums(name: str, narrow: NarrowSums | None) -> Iterator[str]:
    if narrow is not None and narrow.differ:
        wide, half = (text.percent(n) for n in (narrow.agreement_wide, narrow.agreement))
        yield (
            f"{name}: accuracy depends on the accumulator: {wide} of {narrow.images} images have "
            f"PyTorch's class where products are summed in float32, {half} where in half precision"
        )


def _emulation(name: str, error: EmulationError | None) -> Iterator[str]:
    if error is not None and error.is_proven:
        emulated, measured = text.percent(error.emulated), text.percent(error.measured)
        yield (
            f"{name}: the emulation judges otherwise than the hardware: top-1 {emulated} emulated, "
            f"{measured} measured, of {error.images} images"
        )


def _photo(name: str, photo: PhotoCheck | None) -> Iterator[str]:
    if photo is not None and photo.is_worse:
        yield (
            f"{name}: the model that prepares photographs itself loses {text.points(photo.drop)} "
            f"({text.points_interval(photo.drop)}) of top-1 on {photo.images} of them"
        )


def _repaired(name: str, artifact: BuiltArtifact) -> Iterator[str]:
    """What was raised in its graph, and why; what the validation images say of it."""
    repair = artifact.repair
    if repair is None or not repair.raised:
        return
    yield f"{name} was repaired: {repair.words}; before: {repair.broke}; now: {repair.result}"
    headroom = artifact.numerics.more.get("headroom") if artifact.numerics else None
    if headroom is not None and headroom < REPAIRED_HEADROOM:
        yield (
            f"{name}: the repair does not hold on the validation images: least headroom "
            f"{headroom:.3g}, where {REPAIRED_HEADROOM:g} was asked for: give more calibration "
            "images"
        )


@dataclass(frozen=True)
class Use:
    """What to ship for one target.

    Attributes:
        title: The target's name for people.
        name: The artifact, such as "ort/int8".
        path: Its folder.
        sentence: What speaks for it, in one sentence.
        others: What speaks against the others, a line each.
        runs_here: Whether the machine that judged it runs it, too.
    """

    title: str
    name: str
    path: str
    sentence: str
    others: tuple[str, ...]
    runs_here: bool


def uses(run: Run, cards: Sequence[view.Card]) -> Iterator[Use]:
    """What to ship for each target that has something to ship."""
    for artifact, card in zip(run.artifacts, cards, strict=True):
        if not card.use or not card.path:
            continue
        others = run.choice[artifact.target].why
        told = ", ".join(_merits(artifact, card))
        yield Use(
            artifact.title,
            artifact.name,
            card.path,
            f"{artifact.title}: ship {artifact.name}: {told}.",
            tuple(f"{artifact.target}/{name}: {why}" for name, why in others.items()),
            artifact.accuracy.top1.state is State.MEASURED,
        )


def _merits(artifact: BuiltArtifact, card: view.Card) -> Iterator[str]:
    """What was found of an artifact, in a few words each."""
    if card.accuracy.value:
        yield f"top-1 {card.accuracy.value} ({card.accuracy.state})"
    if card.drop.value:
        yield f"{card.drop.value} lost to PyTorch"
    if card.ratio and not artifact.latency_doubt:
        yield f"{card.ratio.words} (against PyTorch)"
    elif artifact.latency_doubt:
        yield "its latency is not to be trusted"
    else:
        yield "its latency was not measured here"
    yield card.size


def choices(run: Run) -> Iterator[str]:
    """Which artifact of each target with several to use, and why not the others."""
    for target, choice in run.choice.items():
        if not choice.why:
            continue
        if set(choice.why.values()) == {NOT_SELECTED} and choice.precision is None:
            yield f"{target}: nothing to choose from: {NOT_SELECTED}"
            continue
        use = f"{target}: use {choice.precision}" if choice.precision else f"{target}: none"
        yield f"{use}; {'; '.join(f'{name}: {why}' for name, why in choice.why.items())}"


def referee(run: Run) -> Iterator[str]:
    """What the answers are held against, where that is a graph that was given."""
    by = run.pytorch.top1.by
    if by and not by.startswith("PyTorch"):
        yield f"PyTorch stands here for the graph that was given: {by}"


def worst_class(run: Run) -> Iterator[str]:
    """The class that suffers most in any artifact, beside what PyTorch makes of its images."""
    found = [(a.name, a.accuracy.by_class) for a in run.artifacts]
    known = [(name, of) for name, of in found if of is not None]
    if not known:
        return
    name, lowest = min(known, key=lambda each: each[1].classes[each[1].worst])
    reference = run.pytorch.by_class
    own = reference.classes.get(lowest.worst) if reference else None
    beside = "" if own is None else f"; with PyTorch {100 * own:.2f} %"
    yield (
        f"worst class: {lowest.worst}: {text.percent(lowest.top1)} of {lowest.top1.samples} images "
        f"are right with {name}{beside}"
    )


def missing(run: Run, state: State) -> list[Missing]:
    """Accuracies and latencies in a state, by reason or executor."""
    found: dict[str, dict[str, list[str]]] = {}
    for artifact in run.artifacts:
        if artifact.failure:
            continue
        for what, number in (("accuracy", artifact.accuracy.top1), ("latency", artifact.latency)):
            if number.state is state:
                names = found.setdefault(view.origin(number), {}).setdefault(what, [])
                names.append(artifact.name)
    return [
        Missing(tuple(f"{what} of {', '.join(names)}" for what, names in kinds.items()), why)
        for why, kinds in found.items()
    ]
