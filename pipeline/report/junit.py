"""What CI reads: JUnit XML of a run, or of a comparison of two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from pipeline.core.words import printable
from pipeline.report.model import Run
from pipeline.steps.step import State

RUN = "run of CARE Deploy"
"""Name of a run's suite, by which a file is known as ours."""


@dataclass(frozen=True)
class Case:
    """A test case.

    Attributes:
        group: What it belongs to.
        name: Its name.
        failure: What failed; "" if nothing did.
        skipped: Why it could not be told; "" if it was.
        seconds: How long it took.
    """

    group: str
    name: str
    failure: str = ""
    skipped: str = ""
    seconds: float = 0.0


def suite(name: str, cases: Iterable[Case]) -> str:
    """A suite of test cases as XML."""
    root, listed = ElementTree.Element("testsuite", name=name), list(cases)
    for each in listed:
        place = {"classname": printable(each.group), "name": printable(each.name)}
        case = ElementTree.SubElement(root, "testcase", place, time=f"{each.seconds:.3f}")
        if each.failure:
            ElementTree.SubElement(case, "failure", message=printable(each.failure))
        elif each.skipped:
            ElementTree.SubElement(case, "skipped", message=printable(each.skipped))
    root.set("tests", str(len(listed)))
    root.set("failures", str(sum(bool(each.failure) for each in listed)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def run_as_junit(run: Run) -> str:
    """A run: a case for each step, and one for the gates of each artifact."""
    return suite(RUN, [*_steps(run), *_gates(run)])


def _steps(run: Run) -> Iterator[Case]:
    for step in run.steps:
        failed = step.why if step.state is State.FAILED else ""
        skipped = step.why if step.state is State.SKIPPED else ""
        yield Case(step.stage, step.name, failed, skipped, step.seconds)


def _gates(run: Run) -> Iterator[Case]:
    if not run.gates.limits:
        return
    for artifact in run.artifacts:
        of_it = [
            each.words
            for each in run.gates.failures
            if (each.target, each.precision) == (artifact.target, artifact.precision)
        ]
        not_built = "" if artifact.built else "it was not built"
        yield Case("gates", artifact.name, "; ".join(of_it), not_built)


def is_junit(path: Path) -> bool:
    """Whether a file is one of an earlier run."""
    with path.open("rb") as stream:
        return RUN.encode() in stream.read(2000)
