"""The order of the stages, what of them is out of date, and what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import filelock

from pipeline.artifact import refuse_foreign_file, refuse_foreign_folder
from pipeline.config import Config
from pipeline.errors import ArtifactError, BuildError, GateFailedError, LockedError, PipelineError
from pipeline.gates import failures
from pipeline.quiet import is_log
from pipeline.replacing import cannot_write, sweep
from pipeline.source import HashCache, Source
from pipeline.stages import report
from pipeline.stages.base import Context, StageResult, State, Step
from pipeline.stages.bench import BenchStep
from pipeline.stages.build import BuildStep
from pipeline.stages.graph import ExportStep, PrecisionStep, SimplifyStep
from pipeline.stages.samples import CalibrationStep, SampleStep
from pipeline.stages.validate import ReferenceStep, ValidateStep
from pipeline.targets import TARGETS
from pipeline.targets.base import MODULE

STAGES = ("export", "simplify", "calibrate", "precision", "build", "validate", "bench", "report")
"""The stages, in their order."""

LOCK_FILE = ".lock"
HASHES = ".hashes.json"
LOG_FILE = "run.log"


@dataclass(frozen=True)
class Selection:
    """Which steps to run.

    Attributes:
        only: These stages; empty for all.
        start: This stage and those after it run even if they are up to date.
        targets: These targets and what they are made from; empty for all.
        force: Everything that is selected runs even if it is up to date.
    """

    only: tuple[str, ...] = ()
    start: str | None = None
    targets: tuple[str, ...] = ()
    force: bool = False

    def select(self, steps: Sequence[Step]) -> list[Step]:
        """Those of the steps to look at, in their order."""
        needed = (
            set(steps)
            if not self.targets
            else _with_requirements(step for step in steps if step.target in self.targets)
        )
        return [s for s in steps if s in needed and (not self.only or s.stage in self.only)]

    def forces(self, step: Step) -> bool:
        """Whether the step runs even if it is up to date."""
        after = self.start is not None and STAGES.index(step.stage) >= STAGES.index(self.start)
        return self.force or after


def _with_requirements(steps: Iterable[Step]) -> set[Step]:
    """The steps and all that they are made from, directly or not."""
    found: set[Step] = set()
    waiting = list(steps)
    while waiting:
        step = waiting.pop()
        if step not in found:
            found.add(step)
            waiting.extend(step.requires)
    return found


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


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        results: How every step ended, in order.
        gates: Limits of the configuration that do not hold.
    """

    results: list[StageResult] = field(default_factory=list)
    gates: list[GateFailedError] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 fine, 1 a gate failed, 2 bad input, 3 a build failed."""
        errors = [result.error for result in self.results if result.error]
        if errors:
            return max(error.exit_code for error in errors)
        return GateFailedError.exit_code if self.gates else 0


def plan(context: Context) -> list[Step]:
    """All steps of a configuration, each after those that it requires."""
    config = context.config
    export = ExportStep(context)
    simplify = SimplifyStep(context, export)
    calibration = CalibrationStep(context)
    samples = SampleStep(context)
    reference = ReferenceStep(context, samples)
    forms: dict[str, PrecisionStep] = {}
    builds: list[BuildStep] = []
    for name, target in TARGETS.items():
        for precision in config.precisions(name):
            form = target.precisions[precision]
            if form != MODULE and form not in forms:
                forms[form] = PrecisionStep(context, form, simplify, calibration)
            builds.append(BuildStep(context, name, precision, forms.get(form), calibration))
    validations = [ValidateStep(context, build, samples, reference) for build in builds]
    benches = [
        BenchStep(context, name, [b for b in builds if b.target == name], samples)
        for name in TARGETS
        if config.target(name)
    ]
    steps: list[Step] = [export, simplify]
    if any(calibration in step.requires for step in (*forms.values(), *builds)):
        steps.append(calibration)
    return [*steps, *forms.values(), *builds, samples, reference, *validations, *benches]


@contextmanager
def locked(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock of a results' folder, and clean up after killed runs.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: The results' folder; it is made if it is missing.
        wait_s: How long to wait for another run.

    Raises:
        LockedError: Another run holds it.
        ArtifactError: The folder cannot be written, or its lock is somebody else's file.
    """
    _refuse_foreign_lock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_FILE, timeout=wait_s)
        with lock:
            sweep(folder)
            yield
    except filelock.Timeout as error:
        raise LockedError(
            f"another run works on {folder}: wait for it, or give --wait SECONDS"
        ) from error
    except OSError as error:
        raise ArtifactError(cannot_write(error.filename or folder, error)) from error


def _refuse_foreign_lock(folder: Path) -> None:
    refuse_foreign_file(folder / LOCK_FILE, lambda path: False)  # ours is always empty


def refuse_foreign(context: Context, selection: Selection) -> None:
    """Refuse what somebody else put where this run would write.

    Raises:
        ArtifactError: There is such a thing; nothing was changed.
    """
    for step in selection.select(plan(context)):
        refuse_foreign_folder(step.folder)
    _refuse_foreign_lock(context.folder)
    refuse_foreign_file(context.folder / LOG_FILE, is_log)
    refuse_foreign_file(context.folder / HASHES, HashCache.is_cache)
    report.refuse_foreign(context.folder)


def dry_run(context: Context, selection: Selection) -> list[tuple[Step, str | None]]:
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


def execute(context: Context, selection: Selection, observer: Observer) -> Outcome:
    """Run what is selected and out of date; a step that fails stops only what needs it."""
    outcome = Outcome()
    steps = selection.select(plan(context))
    observer.planned(steps)
    ended: dict[str, StageResult] = {}
    for step in steps:
        result = _run_one(step, selection, ended, context, observer)
        ended[step.name] = result
        outcome.results.append(result)
        observer.finished(result)
        context.source.hashes.save()
    outcome.gates = failures(context.config)
    return outcome


def _run_one(
    step: Step,
    selection: Selection,
    ended: dict[str, StageResult],
    context: Context,
    observer: Observer,
) -> StageResult:
    start = time.monotonic()
    if blocked := _blocked(step, ended):
        return StageResult(step.stage, step.name, State.SKIPPED, blocked)
    try:
        why = "asked for" if selection.forces(step) else step.stale()
        if why is None:
            return StageResult(step.stage, step.name, State.UP_TO_DATE)
        observer.started(step, why)
        context.log(f"{step.name}: {why}")
        step.run()
    except PipelineError as error:
        context.log(f"{step.name} failed: {error}")
        seconds = time.monotonic() - start
        return StageResult(step.stage, step.name, State.FAILED, str(error), seconds, error)
    except MemoryError as error:
        failure = BuildError(f"{step.name}: out of memory: {error}")
        return StageResult(step.stage, step.name, State.FAILED, str(failure), 0, failure)
    seconds = time.monotonic() - start
    return StageResult(step.stage, step.name, State.DONE, "; ".join([why, *step.notes]), seconds)


def _blocked(step: Step, ended: dict[str, StageResult]) -> str:
    """Why the step cannot run, if it cannot."""
    for required in step.requires:
        result = ended.get(required.name)
        if result is not None and result.state in (State.FAILED, State.SKIPPED):
            return f"{required.name} {result.state}"
        if result is None and not required.folder.exists():
            return f"{required.name} is not built and not selected"
    return ""


def make_context(config: Config, log: Callable[[str], None], observer: Observer) -> Context:
    """What the steps of a configuration work with."""
    source = Source(config, HashCache(config.folder / HASHES))
    return Context(config=config, source=source, log=log, progress=observer.progress)
