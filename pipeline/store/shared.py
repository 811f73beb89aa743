"""What a run does with a store: it takes what is there, and gives what it built.

A store that fails costs time, never a result: the step is built here. Only where the configuration
says `required` does the run, or the step, end with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.core.address import parse
from pipeline.core.errors import DamagedError, StoreError
from pipeline.steps.step import Step
from pipeline.store.entries import Entries
from pipeline.store.objects import LIMIT_S, Objects

MOST_FAILURES = 3
"""After so many failures, one after the other, a run asks no more."""

TAKEN = "taken from the store"


class Shared:
    """A store, as a run sees it.

    Args:
        entries: The artifacts in it; None if it could not be opened.
        push: Whether to give what is built.
        required: Whether a failure of the store is an error.
        warn: Is told what went wrong.
    """

    def __init__(
        self,
        entries: Entries | None,
        *,
        push: bool,
        required: bool,
        warn: Callable[[str], object],
    ) -> None:
        self.entries, self.push, self.required, self.warn = entries, push, required, warn
        self.failures = 0

    @classmethod
    def open(
        cls,
        address: str,
        options: Mapping[str, Any] | None = None,
        *,
        push: bool,
        required: bool,
        warn: Callable[[str], object],
        limit_s: float = LIMIT_S,
    ) -> Shared:
        """Open a store, and see that it answers.

        Raises:
            StoreError: It does not, and is required.
        """
        entries = None
        try:
            objects = Objects(parse(address, options), limit_s)
            objects.reach()
            entries = Entries(objects)
        except StoreError as error:
            if required:
                raise StoreError(
                    f"{error}: see that it can be reached, or set store.required: false"
                ) from None
            warn(f"{error}: this run goes on without it")
        return cls(entries, push=push, required=required, warn=warn)

    def holds(self, step: Step) -> bool:
        """Whether a step's artifact is there to be taken; not where the store does not answer.

        Raises:
            StoreError: The store does not answer, and is required.
            ArtifactError: What the step is made from is not there.
        """
        if self.entries is None:
            return False
        try:
            return self.entries.find(step.key()) is not None
        except DamagedError:
            return False
        except StoreError:
            if self.required:
                raise
            return False  # who takes it says so, as of damage

    def take(self, step: Step) -> bool:
        """Make a step's artifact from the store; whether it was there.

        Raises:
            StoreError: The store does not answer, and is required.
            ArtifactError: The artifact cannot be put in its place.
        """
        entries = self.entries
        if entries is None:
            return False
        try:
            entry = entries.find(step.key())
            if entry is None:
                return False
            step.make(lambda folder: entries.fetch(entry, folder))
        except DamagedError as error:
            self._say(step, f"{error}: not used")
            return False
        except StoreError as error:
            self._failed(step, error)
            return False
        self.failures = 0
        step.notes.append(TAKEN)
        return True

    def give(self, step: Step) -> None:
        """Give what a step made, if that is wanted.

        Raises:
            StoreError: The store does not take it, and is required.
            ArtifactError: The artifact is damaged.
        """
        if self.entries is None or not self.push:
            return
        try:
            self.entries.give(step.artifact())
            self.failures = 0
        except StoreError as error:
            self._failed(step, error, "; python -m pipeline store push gives it later")

    def _failed(self, step: Step, error: StoreError, advice: str = "") -> None:
        if self.required:
            raise error
        self.failures += 1
        self._say(step, f"{error}{advice}")
        if self.failures >= MOST_FAILURES:
            self.entries = None
            self.warn(f"the store failed {self.failures} times: this run goes on without it")

    def _say(self, step: Step, text: str) -> None:
        step.notes.append(text)
        step.context.log(f"{step.name}: {text}")
        self.warn(f"{step.name}: {text}")
