"""The order of the stages, what of them is out of date, and what happened."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.core import signals
from pipeline.core.errors import ArtifactError, PipelineError, failure_of
from pipeline.scheduler.cuts import Cuts
from pipeline.scheduler.plan import ASKED_FOR, Selection, plan
from pipeline.stages.context import RunContext
from pipeline.steps.folders import LOG_FILE
from pipeline.steps.step import Elsewhere, StageResult, State, Step, machine_of

if TYPE_CHECKING:
    from pipeline.scheduler.processes import Made
    from pipeline.scheduler.side_by_side import Begun, Running
    from pipeline.store.shared import Shared


class Observer:
    """Is told what a run does; derive from it to show it."""

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

    def audited(self, lines: Sequence[str]) -> None:
        """What was made once more, and what was not."""


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


def dry_run(
    context: RunContext,
    selection: Selection,
    *,
    verify: bool = True,
    elsewhere: Elsewhere | None = None,
) -> list[tuple[Step, str | None]]:
    """Every selected step and why it would run; None where it is up to date.

    Args:
        context: What the steps work with.
        selection: Which steps.
        verify: Whether to hash what is there: damage is a reason, too.
        elsewhere: Knows the machines where the steps would run; None: this one.
    """
    reasons: dict[Step, str | None] = {}
    for step in selection.select(plan(context)):
        reasons[step] = _reason(step, selection, reasons, verify, elsewhere)
    return list(reasons.items())


def _reason(
    step: Step,
    selection: Selection,
    reasons: dict[Step, str | None],
    verify: bool,
    elsewhere: Elsewhere | None,
) -> str | None:
    if selection.forces(step):
        return ASKED_FOR
    for required in step.requires:
        if reasons.get(required):
            why = str(reasons[required])
            return _after(
                step, required, why, lambda: step.stale(verify=verify, elsewhere=elsewhere)
            )
    return step.stale(verify=verify, elsewhere=elsewhere)


MAY_RUN = "may run"
"""How the reason of a step begins that need not run: what it is made from may come out the same."""


def _after(step: Step, required: Step, why: str, stale: Callable[[], str | None]) -> str:
    """Why a step runs that is made from one that runs, and whether it is certain to."""
    begins = f"made from {required.name}, which"
    if not step.folder.exists():
        return f"{begins} runs"
    try:
        own = stale()
    except PipelineError:  # what it is made from is not there, or damaged
        own = None
    if own is not None:
        return own
    return f"{MAY_RUN}: {begins} {MAY_RUN if why.startswith(MAY_RUN) else 'runs'}"


def execute(
    context: RunContext,
    selection: Selection,
    observer: Observer,
    store: Shared | None = None,
    running: Running | None = None,
    audited: float = 0.0,
) -> Outcome:
    """Run what is selected and out of date; a step that fails stops only what needs it.

    Args:
        context: What the steps work with.
        selection: Which steps.
        observer: Is told what happens.
        store: Is asked before a step is built, and given what was built.
        running: Runs steps side by side elsewhere; None to run one after the other here.
        audited: Share of what is made that is made once more, see `pipeline.scheduler.audit`.
    """
    planned = plan(context)
    steps = selection.select(planned)
    observer.planned(steps)
    run = _Run(context, selection, observer, store, running)
    waiting = list(steps)
    while waiting or (running is not None and len(running)):
        waiting = [step for step in waiting if not run.begins(step, waiting)]
        if cut := run.cuts.take_new():
            waiting = [*cut, *waiting]
        elif running is not None and len(running):
            run.takes_over(*running.next())
    results = [run.ended[step.name] for step in steps]
    if audited:
        from pipeline.scheduler.audit import audit  # here: few runs make anything once more
        from pipeline.scheduler.side_by_side import one_process

        found = audit(steps, results, audited, running, lambda: one_process(context.config))
        observer.audited(found.lines(audited))
        results = found.corrected(results)
        for line in found.lines(audited):
            context.log(line)
    return Outcome(results, [step.name for step in planned if step not in steps])


@dataclass
class _Run:
    """A run on its way; see `execute`.

    Attributes:
        ended: How steps ended, by name.
        cuts: Steps whose shards run before them.
    """

    context: RunContext
    selection: Selection
    observer: Observer
    store: Shared | None
    running: Running | None
    ended: dict[str, StageResult] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=Cuts)

    def begins(self, step: Step, waiting: Sequence[Step]) -> bool:
        """Begin a step, if it can now; whether it did. Here it ends at once."""
        running = self.running
        if running is not None:
            is_made = {begun.step for begun in running.begun}
            needed = (*step.requires, *self.cuts.shards_of(step))
            if any(each in waiting or each in is_made for each in needed):
                return False
            if self.cuts.is_in_vain(step, self.ended):
                return True
            if not running.has_room(step):
                return False
        start = time.monotonic()
        wanted = step.requires
        if blocked := _blocked(step, self.ended):
            self._end(step, StageResult(step.stage, step.name, State.SKIPPED, blocked))
            return True
        missing = tuple(each.name for each in wanted if each not in step.requires)
        result = self._guarded(step, start, lambda: self._begin(step, missing))
        if result is not None:
            self._end(step, result)
        return True

    def takes_over(self, begun: Begun, made: Made) -> None:
        """Take over what came of a step elsewhere."""
        step = begun.step

        def look() -> str:
            self.context.stated.forget()
            self.context.artifacts.pop(step.name, None)
            step.notes.extend(made.notes)
            if made.error is not None:
                raise made.error
            if not made.given:
                self._give(step)
            step.forget_shards()
            return begun.why

        result = self._guarded(step, self.cuts.since.get(step, begun.start), look)
        assert result is not None
        self._end(step, result)

    def _begin(self, step: Step, missing: tuple[str, ...]) -> str | None:
        """Bring a step up to date; why that was needed, "" if not, None while it runs."""
        forced = self.selection.forces(step)
        elsewhere = None if self.running is None else self.running.elsewhere
        why = ASKED_FOR if forced else step.stale(elsewhere=elsewhere)
        if why is None:
            step.restate()
            return ""
        if step not in self.cuts.since:
            if step not in self.cuts.wholes:
                _require_whole(step, self.ended)
                self.observer.started(step, why)
            self.context.log(f"{step.name}: {why}")
            # A step's key here says nothing of the machine where it will run: a worker asks itself.
            is_asked = elsewhere is None or not machine_of(step.parts()["inputs"])
            if self.store is not None and not forced and is_asked and self.store.take(step):
                return why
            if self.running is not None and self.cuts.cut(step):
                return None
        if self.running is not None:
            self.context.source.hashes.save()
            self.running.begin(step, why, missing)
            return None
        step.run()
        self._give(step)
        return why

    def _give(self, step: Step) -> None:
        if self.store is not None:
            self.store.give(step)

    def _end(self, step: Step, result: StageResult) -> None:
        signals.raise_received()  # a step may have failed because a signal cut something short
        self.ended[step.name] = result
        if step in self.cuts.wholes:
            self._tell_of_shards(self.cuts.wholes[step])
        else:
            self.observer.finished(result)
        self.context.source.hashes.save()

    def _tell_of_shards(self, whole: Step) -> None:
        """Tell how far a step is; its shards are no steps that anybody asked for."""
        names = [shard.name for shard in self.cuts.shards_of(whole)]
        ended = sum(name in self.ended for name in names)
        self.observer.progress(ended, len(names), f"shards of {whole.name}")

    def _guarded(
        self, step: Step, start: float, work: Callable[[], str | None]
    ) -> StageResult | None:
        """How a step ended, whatever its work raises; None while it runs elsewhere."""
        try:
            why = work()
        except PipelineError as error:
            self.context.log(f"{step.name} failed: {error}")
            seconds = time.monotonic() - start
            return StageResult(step.stage, step.name, State.FAILED, str(error), seconds, error)
        except Exception as error:
            # Whatever a library or this program did not foresee fails this step alone.
            self.context.log(f"{step.name} failed:\n{''.join(traceback.format_exception(error))}")
            advice = f"please report it with what {LOG_FILE} says"
            failure = failure_of(step.name, error, advice)
            seconds = time.monotonic() - start
            return StageResult(step.stage, step.name, State.FAILED, str(failure), seconds, failure)
        if why is None:
            return None
        if not why:
            return StageResult(step.stage, step.name, State.UP_TO_DATE)
        told = "; ".join([why, *step.notes])
        return StageResult(step.stage, step.name, State.DONE, told, time.monotonic() - start)


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
