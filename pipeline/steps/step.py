"""What a stage is: one step that makes one artifact from others, and knows when it has to.

A step's key is the content hash of everything that can change its result. What it is made from
counts by content, not by date: a step whose inputs come out the same need not run again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.core.files import digest_of
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.steps.keys import code_hash

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.source import Source


class State(StrEnum):
    """How a step ended."""

    DONE = "done"
    UP_TO_DATE = "up to date"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class StageResult:
    """How a step ended.

    Attributes:
        stage: The stage, such as "build".
        name: The step, such as "trt/fp16".
        state: How it ended.
        why: Why it ran, or why it did not, or what failed.
        seconds: How long it took.
        error: What failed.
    """

    stage: str
    name: str
    state: State
    why: str = ""
    seconds: float = 0.0
    error: PipelineError | None = field(default=None, repr=False)


class Progress(Protocol):
    """Where a step tells how far it is."""

    def __call__(self, done: int, total: int | None = None, what: str = "") -> None:
        """Say that `done` of `total` (None: unknown) is done, and what is being done."""


@dataclass(frozen=True)
class Context:
    """What every step works with.

    Attributes:
        config: The configuration.
        source: The network and the images that the configuration names.
        log: Takes a line for the log file.
        progress: Where the running step tells how far it is.
    """

    config: Config
    source: Source
    log: Callable[[str], None]
    progress: Progress

    @property
    def folder(self) -> Path:
        """Where the configuration's results lie."""
        return self.config.folder


class Step(ABC):
    """One step: makes the artifact `name` under the results' folder.

    Attributes:
        stage: The stage that it belongs to.
        name: Name and relative folder of the artifact.
        requires: Steps whose artifacts it is made from.
        target: The target that it belongs to, or None if it serves all.
        notes: What the user should know of how it was made.
    """

    stage: ClassVar[str]
    code: tuple[str, ...] = ()
    """Modules of this project that decide the result, beside the step's own."""

    def __init__(
        self, context: Context, name: str, requires: Sequence[Step] = (), target: str | None = None
    ) -> None:
        self.context = context
        self.name = name
        self.requires = tuple(requires)
        self.target = target
        self.notes: list[str] = []

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.context.folder / self.name

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Everything beside the required artifacts that can change the result, as plain values."""

    def made_from(self) -> dict[str, str]:
        """Digests of what the artifact is made from, by name."""
        return {step.name: Artifact.read(step.folder).digest for step in self.requires}

    def tools(self) -> dict[str, str]:
        """Versions of the packages that decide the result."""
        return {}

    @abstractmethod
    def build(self, folder: Path) -> Mapping[str, Any]:
        """Write the artifact's files into `folder` and return the facts about it."""

    def key(self) -> str:
        """Content hash of everything that can change the result."""
        return digest_of(
            {
                "stage": self.stage,
                "name": self.name,
                "inputs": self.inputs(),
                "made_from": self.made_from(),
                "tools": self.tools(),
                "code": code_hash(type(self).__module__, *self.code),
            }
        )

    def artifact(self) -> Artifact:
        """The finished artifact.

        Raises:
            ArtifactError: There is none.
        """
        return Artifact.read(self.folder)

    def stale(self) -> str | None:
        """Why the step has to run, or None if its artifact is up to date and undamaged."""
        if not self.folder.exists():
            return "not built yet"
        try:
            existing = self.artifact()
            existing.verify()
        except ArtifactError as error:
            return f"damaged: {error}"
        if existing.key != self.key():
            return self._what_changed(existing)
        return None

    def _what_changed(self, existing: Artifact) -> str:
        """Name what the old artifact was made with that differs now."""
        made_from, tools = self.made_from(), self.tools()
        changed = [name for name in made_from if existing.made_from.get(name) != made_from[name]]
        changed += [
            f"{tool} {version}"
            for tool, version in tools.items()
            if existing.tools.get(tool) != version
        ]
        return f"changed: {', '.join(changed) or 'settings or code'}"

    def run(self) -> Artifact:
        """Make the artifact."""
        start = time.monotonic()

        def build(folder: Path) -> dict[str, Any]:
            facts = dict(self.build(folder))
            return {**facts, "build_seconds": round(time.monotonic() - start, 3)}

        return self.make(build)

    def make(self, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Make the artifact by what `build` writes, such as something measured elsewhere."""

        def say(line: str) -> None:
            self.notes.append(line)
            self.context.log(f"{self.name}: {line}")

        return artifact.make(
            self.folder,
            kind=self.stage,
            name=self.name,
            key=self.key(),
            made_from=self.made_from(),
            tools=self.tools(),
            build=build,
            say=say,
        )
