"""What a run says of CPUs of other classes: a line for each, and which precision to use there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pipeline.core.cpu_classes import CLASSES
from pipeline.core.figures import Number
from pipeline.report import text
from pipeline.report.model import BuiltArtifact, Choice, GateFailure, Part, Run
from pipeline.steps.facts.cpu_class import ClassFacts, OnClass


def lines(run: Run) -> Iterator[str]:
    """Where artifacts are certified, and for every class accuracy, agreement, ratio and choice."""
    for artifact in run.artifacts:
        if told := certified(run, artifact):
            yield told
    for part in run.cpu_classes:
        yield line(run, part)


def certified(run: Run, artifact: BuiltArtifact) -> str:
    """On which CPUs an artifact gives the answers that were judged; "" if it does not say."""
    built = artifact.built
    stated = built.facts.more.get("certificate") if built else None
    if built is None or not isinstance(stated, Mapping):
        return ""
    names = [CLASSES[name].title for name in stated.get("certified_for", ()) if name in CLASSES]
    here = CLASSES.get(stated.get("measured_on", ""))
    judged = f"judged on {here.title}" if here else "judged on a CPU of no such class"
    if len(names) == len(CLASSES):
        return f"{artifact.name}: certified for every class of x86 CPUs, {judged}"
    layers = len(stated.get("unsafe_layers", ()))
    told = (
        f"(!) {artifact.name}: certified for {', '.join(names)} alone, {judged}: elsewhere 8-bit "
        f"products of {layers} layers may saturate"
    )
    found = next((form for form in run.forms.values() if form.name in built.made_from), None)
    figures = found.facts.more.get("certificate", {}) if found else {}
    if not figures.get("state"):
        return told
    return (
        f"{told} ({figures['state']}: top-1 {100 * figures['top1']:.2f} %, agreement "
        f"{100 * figures['agreement']:.2f} % of the calibration images)"
    )


def line(run: Run, part: Part[ClassFacts]) -> str:
    """What is known of one class."""
    facts = part.facts
    name = f"{facts.target} on {facts.title} ({facts.examples})"
    outdated = _outdated(run, part)
    if facts.why_not or outdated:
        return f"{name}: not measured: {facts.why_not or outdated}"
    chosen = choose(facts, run.class_failures.get(part.name, ()))
    mark = " on a busy machine" if facts.problem else ""
    words = [f"{precision} {_words(one, mark)}" for precision, one in facts.artifacts.items()]
    words += [f"{precision} not measured: {why}" for precision, why in facts.left_out.items()]
    why = "".join(f"; {precision}: {reason}" for precision, reason in chosen.why.items())
    use = f"use {chosen.precision}" if chosen.precision else "none"
    state = str(facts.state)
    if facts.untimed:
        use = f"which to use there is not known, since nothing was timed: {facts.untimed}"
    elif facts.lacks:
        state = f"{state} and times {facts.time_state}, since {facts.lacks}"
    return f"{name}, {state}: {', '.join(words)}; {use}{why}"


def _outdated(run: Run, part: Part[ClassFacts]) -> str:
    """Why the figures are none of what lies there now; "" if they are."""
    for artifact in run.artifacts:
        known = part.made_from.get(artifact.name)
        if artifact.built and known and known != artifact.built.digest:
            return f"{part.name} is of an earlier build of {artifact.name}: run it again"
    return ""


def _words(one: OnClass, mark: str) -> str:
    accuracy = one.accuracy
    answers = (
        f"top-1 {text.percent(accuracy.top1)}, agreement {_percent(accuracy.agreement)}, "
        f"same class as here {_percent(one.same_as_here)}"
    )
    if one.latency.value is None:
        return answers
    return f"{answers}, {text.milliseconds(one.latency)}{mark}{_ratio(one)}"


def _percent(number: Number | None) -> str:
    return text.percent(number) if number else "not measured"


def _ratio(one: OnClass) -> str:
    if one.ratio is None:
        return ""
    low, high = one.ratio.interval
    return f" (ratio {one.ratio.value:.2f}, 95 %: {low:.2f} to {high:.2f})"


def choose(facts: ClassFacts, failures: Iterable[GateFailure] = ()) -> Choice:
    """Which precision to use on CPUs of a class.

    The first of the configuration stays unless another holds the gates there and is faster beyond
    doubt. What this machine found against a precision, gates or the time of its graph, is no reason
    on another class. Where nothing was timed, none is chosen.

    Args:
        facts: What was found of the class.
        failures: Gates that do not hold there.
    """
    gates = {failure.precision: failure for failure in failures}
    why: dict[str, str] = {}
    best: str | None = None
    for precision, one in facts.artifacts.items():
        failure = gates.get(precision)
        if failure:
            why[precision] = f"a gate does not hold there: {failure.words}"
        elif facts.untimed:
            continue
        elif best is None:
            best = precision
        elif problem := _problem(facts, (precision, best)):
            why[precision] = problem
        elif facts.problem:
            why[precision] = facts.problem
        elif one.ratio is None or not one.ratio.faster:
            why[precision] = "not faster beyond doubt"
        elif not _holds(one):
            why[precision] = "its answers there are not those that were judged here"
        else:
            best = precision
    return Choice(best, why)


def _problem(facts: ClassFacts, precisions: Iterable[str]) -> str:
    """What is wrong with the timed calls of some precisions; "" if nothing is."""
    known = (facts.answers[name].problem for name in precisions if name in facts.answers)
    return next(filter(None, known), "")


SAME = 0.998
"""Share of images that must keep the class that was judged on this CPU."""


def _holds(one: OnClass) -> bool:
    return one.same_as_here.value is not None and one.same_as_here.value >= SAME
