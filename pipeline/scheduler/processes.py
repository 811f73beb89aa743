"""Steps in local processes: only a step's name and the configuration travel there.

Each process plans anew, finds the step by its name, and makes its artifact in the results' folder,
whose lock the run holds. A process that dies takes no other with it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import Config, from_mapping
from pipeline.core import signals
from pipeline.core.errors import PipelineError, failure_of
from pipeline.core.plain import parse_json
from pipeline.scheduler.plan import make_context, plan, step_named
from pipeline.steps.folders import LOG_FILE
from pipeline.steps.log import Log
from pipeline.steps.step import Step

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.connection import Connection

T = TypeVar("T")
Planner = Callable[[str, Callable[[str], None]], Sequence[Step]]
"""Makes the steps of a configuration, given as JSON, that write to a log."""

PATIENCE_S = 5.0
"""How long a process may clean up after it is told to end."""


@dataclass(frozen=True)
class Job:
    """A step to run in another process.

    Attributes:
        name: The step.
        config: The configuration as JSON.
        planner: Makes its steps.
        missing: Names of what the step goes on without.
    """

    name: str
    config: str
    planner: Planner
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """How a step ended in another process.

    Attributes:
        notes: What the user should know of it.
        error: What failed.
        given: The store has it already.
    """

    notes: tuple[str, ...]
    error: PipelineError | None = None
    given: bool = False


def described(config: Config) -> str:
    """A configuration as JSON, without the store: what is secret does not travel.

    What it leaves out stays left out: said aloud, some defaults contradict other settings.
    """
    return config.model_dump_json(exclude={"store", "fleet"}, exclude_unset=True)


def planned(text: str, log: Callable[[str], None]) -> Sequence[Step]:
    """The steps of a configuration that `described` wrote."""

    def quiet(done: int, total: int | None = None, what: str = "") -> None:
        """Progress is shown by the run alone."""

    config = from_mapping(parse_json(text, "a configuration")).config
    return plan(make_context(config, log, quiet))


def make(job: Job) -> Made:
    """Run a step by its name; called in another process."""
    try:
        with signals.raised():
            return _make(job)
    except signals.Ended:
        os._exit(1)  # cleaned up by now, and nobody waits for an answer


def repeat(job: Job) -> str | PipelineError:
    """Make a step's artifact once more, in a temporary folder; called in another process.

    Returns:
        Its digest, or what failed.
    """
    steps = job.planner(job.config, lambda line: None)
    step = step_named(steps, job.name)
    assert step is not None, f"the run planned {job.name}, and its process does not"
    try:
        with signals.raised():
            return digest_again(step)
    except signals.Ended:
        os._exit(1)  # see `make`


def digest_again(step: Step) -> str | PipelineError:
    """Digest of an artifact that is made once more and goes then; or what failed."""
    try:
        with tempfile.TemporaryDirectory(prefix="audit-") as folder:
            return step.again(Path(folder, "again")).digest
    except PipelineError as error:
        return type(error)(str(error))
    except Exception as error:
        return failure_of(step.name, error, "it was made for the audit alone")


def _make(job: Job) -> Made:
    lines: list[str] = []
    steps = job.planner(job.config, lines.append)
    step = step_named(steps, job.name)
    assert step is not None, f"the run planned {job.name}, and its process does not"
    log = Log(step.context.folder / LOG_FILE)
    try:
        with log.captured():
            return _run(step, [each for each in steps if each.name in job.missing])
    finally:
        for line in lines:
            log(line)
        log.close()


def _run(step: Step, missing: Sequence[Step]) -> Made:
    if missing:
        step.do_without(missing)
        step.notes.clear()  # the run notes that itself
    try:
        step.run()
    except PipelineError as error:
        return Made(tuple(step.notes), type(error)(str(error)))
    except Exception as error:
        # The traceback stays here: what a library raises may not be fit to travel.
        step.context.log("".join(traceback.format_exception(error)))
        return Made(tuple(step.notes), failure_of(step.name, error, f"see {LOG_FILE}"))
    return Made(tuple(step.notes))


class Processes(Executor):
    """Runs each call in one of several processes.

    A pool of `concurrent.futures` is broken as a whole where one of its processes dies: here each
    process is a pool of its own, so that the others go on.

    Args:
        count: How many processes.
    """

    def __init__(self, count: int) -> None:
        import multiprocessing  # here: a run with one step at a time needs no processes

        self.count = count
        self._method = multiprocessing.get_context("spawn")
        # Nothing is ever sent: its end tells the processes that the run ended, however it did.
        self._listen, self._lifeline = self._method.Pipe(duplex=False)
        self._idle: list[ProcessPoolExecutor] = []
        self._all: list[ProcessPoolExecutor] = []
        self._lock = threading.Lock()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call a function in a process that has nothing to do; in a new one, if none has."""
        with self._lock:
            pool = self._idle.pop() if self._idle else self._new()
        future = pool.submit(fn, *args, **kwargs)
        future.add_done_callback(lambda done: self._ended(pool, done))
        return future

    def _new(self) -> ProcessPoolExecutor:
        from concurrent.futures import ProcessPoolExecutor

        pool = ProcessPoolExecutor(
            1, mp_context=self._method, initializer=_begin, initargs=(self._listen,)
        )
        self._all.append(pool)
        return pool

    def _ended(self, pool: ProcessPoolExecutor, done: Future[Any]) -> None:
        if done.exception() is None:
            with self._lock:
                self._idle.append(pool)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes, also those that are busy."""
        self._lifeline.close()
        for pool in self._all:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._listen.close()


def _begin(listen: Connection) -> None:
    """Let a process end with the run: on Linux at once, else as soon as it hears of it."""
    signals.die_with_parent()
    threading.Thread(target=_end_with, args=(listen,), daemon=True).start()


def _end_with(listen: Connection) -> None:
    try:
        listen.recv_bytes()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(PATIENCE_S)
        os._exit(1)
