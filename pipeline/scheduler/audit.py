"""A share of what a run made is made once more, elsewhere, and held against the first by digest.

Hashes find what was damaged on its way, not a machine that computes something wrong and hashes
that. Which steps are taken depends on their keys alone, so that every run of the same things takes
the same ones. What no two builds make alike is left out, and listed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from pipeline.core.errors import BuildError, PipelineError
from pipeline.scheduler.side_by_side import Running
from pipeline.steps.step import StageResult, State, Step

_WIDE = 2**32


@dataclass
class Audit:
    """What an audit came to.

    Attributes:
        same: Names of steps that came out the same.
        left_out: Why steps were not looked at, by name.
        differing: What is wrong, by name.
    """

    same: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    differing: dict[str, PipelineError] = field(default_factory=dict)

    def lines(self, share: float) -> list[str]:
        """For people."""
        checked = len(self.same) + len(self.differing)
        told = [f"audit of {share:g}: {checked} steps made once more, {len(self.same)} the same"]
        if self.left_out:
            listed = ", ".join(f"{name} ({why})" for name, why in sorted(self.left_out.items()))
            told.append(f"not audited: {listed}")
        return [*told, *map(str, self.differing.values())]

    def corrected(self, results: Sequence[StageResult]) -> list[StageResult]:
        """How steps ended, after what was found."""
        return [_corrected(end, self.differing.get(end.name)) for end in results]


def _corrected(end: StageResult, error: PipelineError | None) -> StageResult:
    if error is None:
        return end
    return dataclasses.replace(end, state=State.FAILED, why=str(error), error=error)


def is_chosen(key: str, share: float) -> bool:
    """Whether a step is among those that are made once more.

    Args:
        key: The step's.
        share: Of all steps, 0 to 1.
    """
    number = int.from_bytes(hashlib.sha256(f"audit {key}".encode()).digest()[:4])
    return number < share * _WIDE


def audit(
    steps: Sequence[Step],
    results: Sequence[StageResult],
    share: float,
    running: Running | None,
    here: Callable[[], AbstractContextManager[Running]],
) -> Audit:
    """Make some of the steps once more that this run made or took.

    Args:
        steps: The steps of the run.
        results: How they ended, in the same order.
        share: How many of them, 0 to 1.
        running: What ran them; None if they ran in this process.
        here: Opens a process of its own for the steps of such a run.
    """
    found = Audit()
    chosen = []
    for step, end in zip(steps, results, strict=True):
        if end.state is not State.DONE:
            continue
        if why := step.differs():
            found.left_out[step.name] = why
        elif is_chosen(step.artifact().key, share):
            chosen.append(step)
    if not chosen:
        return found
    with nullcontext(running) if running is not None else here() as place:
        waiting = [(step, place.again(step)) for step in chosen]
        for step, answer in waiting:
            _compare(step, place.made_on(step), answer, found)
    return found


def _compare(step: Step, first: str, answer: Callable[[], tuple[str, str]], found: Audit) -> None:
    """Hold one step's digest against that of its repetition."""
    mine = step.artifact().digest
    try:
        second, other = answer()
    except PipelineError as error:
        found.differing[step.name] = type(error)(f"{step.name} cannot be audited: {error}")
        return
    if mine == other:
        found.same.append(step.name)
        return
    found.differing[step.name] = BuildError(
        f"{step.name} is not what it was: {first} made {mine}, and {second} {other}, of the same "
        "inputs: one of the two computes wrongly: run it with --force on a third machine, and let "
        "neither build until you know which"
    )
