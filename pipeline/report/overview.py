"""The run as a whole: how it ended, what to know first, which figures are missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.core.figures import State
from pipeline.core.runner import Numerics
from pipeline.report import text, view
from pipeline.report.model import NOT_SELECTED, GateReport, Run
from pipeline.steps.facts.accuracy import NarrowSums
from pipeline.steps.step import State as StepState

EXIT_CODES = {
    0: "fine",
    1: "a gate of the configuration does not hold",
    2: "something that was given does not make sense",
    3: "a build failed",
    4: "this machine lacks the hardware or software",
}


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


def alerts(run: Run, cards: Sequence[view.Card]) -> Iterator[str]:
    """What a reader should know before any figure, though nothing failed."""
    yield from run.problems
    layers = run.reference.facts.range if run.reference else None
    if layers and layers.words and any(artifact.overflowed for artifact in run.artifacts):
        yield layers.words
    for artifact, one in zip(run.artifacts, cards, strict=True):
        yield from _overflow(one.name, artifact.numerics)
        yield from _sums(one.name, artifact.narrow_sums)
        for link in one.chain:
            if link.problem:
                yield f"{one.name} is outdated: {link.name} was {link.problem}; run again"
    if run.calibration:
        yield from (f"calibration: {warning}" for warning in run.calibration.facts.warnings)
    if run.simplified and run.simplified.facts.why_not:
        yield f"the graph was not simplified: {run.simplified.facts.why_not}"
    for target in run.bench:
        measured = run.measured(target)
        if measured and measured.load_before > 0.5 * measured.machine.cpus_granted:
            yield (
                f"{target}: other processes kept {measured.load_before:.1f} of "
                f"{measured.machine.cpus_granted} CPUs busy before latency was measured; medians "
                "may be too high and intervals too wide"
            )


def _overflow(name: str, numerics: Numerics | None) -> Iterator[str]:
    if numerics is None:
        return
    if numerics.overflowed_values:
        count = f"{numerics.overflowed_values:,}"
        yield f"{name}: {count} values left the range of their type while it ran"
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
