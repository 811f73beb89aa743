"""The order of the stages, what of them is out of date, and what happened."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.core.errors import ArtifactError, BuildError, PipelineError, UnforeseenError
from pipeline.core.words import in_short
from pipeline.scheduler.plan import Selection, plan
from pipeline.stages.context import RunContext
from pipeline.steps.folders import LOG_FILE
from pipeline.steps.step import StageResult, State, Step
from pipeline.store.shared import Shared


class Observer(Protocol):
    """Who is told what happens."""

    def planned(self, steps: Sequence[Step]) -> None:
        """The steps that will be looked at, in order."""

    def started(self, step: Step, why: str) -> None:
        """A step begins, and why it has to run."""

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        """How far the running step is."""

    def finished(self, result: StageResult) -> None:
        """A step ended."""

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        results: How every selected step ended, in order.
        not_selected: Names of the configuration's other steps, in order.
    """

    results: list[StageResult] = field(default_factory=list)
    not_selected: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 fine, else the highest code of the errors; gates are judged by the report."""
        return max((end.error.exit_code for end in self.results if end.error), default=0)


def dry_run(context: RunContext, selection: Selection) -> list[tuple[Step, str | None]]:
    """Every selected step and why it would run; None where it is up to date."""
    reasons: dict[Step, str | None] = {}
    for step in selection.select(plan(context)):
        reasons[step] = _reason(step, selection, reasons)
    return list(reasons.items())


def _reason(step: Step, selection: Selection, reasons: dict[Step, str | None]) -> str | None:
    if selection.forces(step):
        return "asked for"
    for required in step.requires:
        if reasons.get(required):
            return f"made from {required.name}, which runs"
    return step.stale()


def execute(
    context: RunContext, selection: Selection, observer: Observer, store: Shared | None = None
) -> Outcome:
    """Run what is selected and out of date; a step that fails stops only what needs it.

    Args:
        context: What the steps work with.
        selection: Which steps.
        observer: Is told what happens.
        store: Is asked before a step is built, and given what was built.
    """
    planned = plan(context)
    steps = selection.select(planned)
    outcome = Outcome(not_selected=[step.name for step in planned if step not in steps])
    observer.planned(steps)
    ended: dict[str, StageResult] = {}
    for step in steps:
        result = _run_one(step, selection, ended, context, observer, store)
        ended[step.name] = result
        outcome.results.append(result)
        observer.finished(result)
        context.source.hashes.save()
    return outcome


def _run_one(
    step: Step,
    selection: Selection,
    ended: dict[str, StageResult],
    context: RunContext,
    observer: Observer,
    store: Shared | None,
) -> StageResult:
    start = time.monotonic()
    if blocked := _blocked(step, ended):
        return StageResult(step.stage, step.name, State.SKIPPED, blocked)
    try:
        why = "asked for" if selection.forces(step) else step.stale()
        if why is None:
            step.restate()
            return StageResult(step.stage, step.name, State.UP_TO_DATE)
        _require_whole(step, ended)
        observer.started(step, why)
        context.log(f"{step.name}: {why}")
        _make(step, None if selection.forces(step) else store, store)
    except PipelineError as error:
        context.log(f"{step.name} failed: {error}")
        seconds = time.monotonic() - start
        return StageResult(step.stage, step.name, State.FAILED, str(error), seconds, error)
    except Exception as error:
        # Whatever a library or this program did not foresee fails this step alone.
        context.log(f"{step.name} failed:\n{''.join(traceback.format_exception(error))}")
        failure = _unforeseen(step, error)
        seconds = time.monotonic() - start
        return StageResult(step.stage, step.name, State.FAILED, str(failure), seconds, failure)
    seconds = time.monotonic() - start
    return StageResult(step.stage, step.name, State.DONE, "; ".join([why, *step.notes]), seconds)


def _make(step: Step, asked: Shared | None, given: Shared | None) -> None:
    """Take a step's artifact from a store, or run it and give what it made."""
    if asked is not None and asked.take(step):
        return
    step.run()
    if given is not None:
        given.give(step)


def _require_whole(step: Step, ended: dict[str, StageResult]) -> None:
    """Refuse to make something from a damaged artifact that this run did not look at.

    Raises:
        ArtifactError: One of those that the step is made from is damaged.
    """
    for required in step.requires:
        if required.name not in ended:
            try:
                required.verified()
            except ArtifactError as error:
                raise ArtifactError(
                    f"{required.name} is damaged ({error}) and not selected: run it as well"
                ) from error


def _unforeseen(step: Step, error: Exception) -> PipelineError:
    if isinstance(error, MemoryError):
        return BuildError(f"{step.name}: out of memory: {error}")
    return UnforeseenError(
        f"{step.name}: an unforeseen fault: {in_short(error)}; please report it with what "
        f"{LOG_FILE} says"
    )


def _blocked(step: Step, ended: dict[str, StageResult]) -> str:
    """Why the step cannot run, if it cannot, even without what is missing."""
    missing: dict[Step, str] = {}
    for required in step.requires:
        result = ended.get(required.name)
        if result is not None and result.state in (State.FAILED, State.SKIPPED):
            missing[required] = f"{required.name} {result.state}"
        if result is None and not required.folder.exists():
            missing[required] = f"{required.name} is not built and not selected"
    if not missing or step.do_without(list(missing)):
        return ""
    return next(iter(missing.values()))
