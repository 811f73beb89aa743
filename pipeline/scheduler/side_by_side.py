"""Running several steps at once: those that are ready, and what measures alone."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config
from pipeline.core.errors import BuildError, PipelineError
from pipeline.scheduler.processes import Job, Made, Processes, described, make, planned, repeat
from pipeline.steps.step import Elsewhere, Step

MOST_TRIES = 2
"""A step whose process died, such as by the system for want of memory, is tried once more."""


@dataclass(frozen=True)
class Begun:
    """A step that runs.

    Attributes:
        step: The step.
        why: Why it runs.
        missing: Names of what it goes on without.
        start: When it began, by the monotonic clock, in seconds.
        tries: How often its process was started.
    """

    step: Step
    why: str
    missing: tuple[str, ...]
    start: float
    tries: int = 1


class Running(ABC):
    """Steps that run at this moment, somewhere else than in this process.

    Attributes:
        elsewhere: Knows the machines where they run; None: this one.
    """

    elsewhere: Elsewhere | None = None

    def __init__(self) -> None:
        self._begun: dict[Future[Any], Begun] = {}

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def begun(self) -> list[Begun]:
        """The steps that run."""
        return list(self._begun.values())

    @abstractmethod
    def has_room(self, step: Step) -> bool:
        """Whether the step may begin."""

    def begin(self, step: Step, why: str, missing: tuple[str, ...]) -> None:
        """Let a step run."""
        self._submit(Begun(step, why, missing, time.monotonic()))

    @abstractmethod
    def _submit(self, begun: Begun) -> None:
        """Hand a step to an executor, and remember it by its future."""

    @abstractmethod
    def next(self) -> tuple[Begun, Made]:
        """Wait for a step to end."""

    def made_on(self, step: Step) -> str:
        """Where a step's artifact was made, for people."""
        return "this machine"

    @abstractmethod
    def again(self, step: Step) -> Callable[[], tuple[str, str]]:
        """Begin to make a step's artifact once more, elsewhere than it was made if that can be.

        Returns:
            A function that waits, and gives where it was made and its digest; it raises a
            `PipelineError` where that failed.
        """


class Local(Running):
    """Steps in local processes.

    Args:
        executor: Runs them.
        most: How many at once.
        job: What travels, for a step and the names of what it goes on without.
    """

    def __init__(
        self, executor: Executor, most: int, job: Callable[[str, tuple[str, ...]], Job]
    ) -> None:
        super().__init__()
        self.executor, self.most, self.job = executor, most, job

    def has_room(self, step: Step) -> bool:
        """See `Running`: what measures is alone, and nothing begins beside it."""
        if step.measures:
            return not self._begun
        alone = any(begun.step.measures for begun in self.begun)
        return len(self._begun) < self.most and not alone

    def _submit(self, begun: Begun) -> None:
        job = self.job(begun.step.name, begun.missing)
        self._begun[self.executor.submit(make, job)] = begun

    def next(self) -> tuple[Begun, Made]:
        """See `Running`."""
        while True:
            done, _ = wait(self._begun, return_when=FIRST_COMPLETED)
            future = next(iter(done))
            begun = self._begun.pop(future)
            try:
                return begun, future.result()
            except BrokenExecutor:
                if begun.tries < MOST_TRIES:
                    self._submit(replace(begun, tries=begun.tries + 1))
                    continue
                name = begun.step.name
                error = BuildError(
                    f"{name}: its process was killed {begun.tries} times: see that there is memory "
                    "enough, or give fewer --jobs"
                )
                return begun, Made((), error)

    def again(self, step: Step) -> Callable[[], tuple[str, str]]:
        """See `Running`: in another process."""
        future = self.executor.submit(repeat, self.job(step.name, ()))

        def answer() -> tuple[str, str]:
            try:
                made = future.result()
            except BrokenExecutor:
                raise BuildError(
                    "its process was killed: see that there is memory enough"
                ) from None
            if isinstance(made, PipelineError):
                raise made
            return "another process", made

        return answer


@contextmanager
def one_process(config: Config) -> Iterator[Running]:
    """A process of its own for steps of a run that has none."""
    text = described(config)
    with Processes(1) as executor:
        yield Local(executor, 1, lambda name, missing: Job(name, text, planned, missing))


@contextmanager
def local(config: Config, jobs: int) -> Iterator[Running]:
    """Several local processes for the steps of a configuration.

    Args:
        config: The configuration.
        jobs: How many steps at once.
    """
    text = described(config)
    with Processes(jobs) as executor:
        yield Local(executor, jobs, lambda name, missing: Job(name, text, planned, missing))
