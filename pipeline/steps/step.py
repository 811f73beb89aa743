"""What a stage is: one step that makes one artifact from others, and knows when it has to.

A step's key is the content hash of everything that can change its result: its settings, what it is
made from, versions of tools, and this project's code. What it is made from counts by content, not
by date or place: a step whose inputs come out the same need not run again. The parts of a key are
kept with the artifact, so that a step that has to run again says what changed.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.core.files import digest_of
from pipeline.steps import artifact, keys
from pipeline.steps.artifact import Artifact
from pipeline.steps.stated import Stated

MACHINE, LACKS = "machine", "what this machine lacks"
OF_A_MACHINE = (MACHINE, LACKS)
"""Beginnings of the inputs that say on which machine a step runs, and how it can run there."""


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


class Configured(Protocol):
    """All that a step has to know of a configuration."""

    @property
    def folder(self) -> Path:
        """Where the configuration's results lie."""


@dataclass(frozen=True)
class Context:
    """What every step works with; the stages' own one knows more, see `pipeline.stages.context`.

    Attributes:
        config: The configuration.
        log: Takes a line for the log file.
        progress: Where the running step tells how far it is.
        code: This project's own code, for the keys of the steps.
    """

    config: Configured
    log: Callable[[str], None]
    progress: Progress
    code: keys.Code = field(default_factory=keys.project)

    @property
    def folder(self) -> Path:
        """Where the configuration's results lie."""
        return self.config.folder

    @cached_property
    def stated(self) -> Stated:
        """Seals that the results' folder states."""
        return Stated(self.folder)

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        """Artifacts by name, as a step last read or made them: manifests are read once a run."""
        return {}


class Elsewhere(Protocol):
    """Knows of the machines on which the steps of a run run, where that is not this one."""

    def why_not(self, step: Step, made: Artifact) -> str | None:
        """Why an artifact cannot count as made by them; None if it can.

        Args:
            step: The step that makes it.
            made: Of all that does not depend on a machine what the step makes now.
        """


@dataclass(frozen=True)
class Place:
    """The machine on which a step ran, or shall run, as the parts of its key tell of it.

    Attributes:
        inputs: Flat, see `Step.parts`; those count that say something of the machine.
        tools: Versions by package.
    """

    inputs: Mapping[str, Any]
    tools: Mapping[str, str]

    def inputs_there(self, here: Mapping[str, Any]) -> dict[str, Any]:
        """A step's flat inputs with what they say of the machine as it is in this place."""
        others = {name: value for name, value in here.items() if not is_of_a_machine(name)}
        return others | machine_of(self.inputs)

    def tools_there(self, here: Mapping[str, str]) -> dict[str, str]:
        """A step's tools: those that one of the two machines lacks as they are in this place."""
        found = dict(here)
        for name in here.keys() | self.tools.keys():
            mine, theirs = here.get(name, keys.MISSING), self.tools.get(name)
            if keys.MISSING in (mine, theirs or keys.MISSING):
                found.pop(name, None)
                found |= {} if theirs is None else {name: theirs}
        return found


def is_of_a_machine(name: str) -> bool:
    """Whether an input, by its flat name, says on which machine a step runs."""
    return name.startswith(OF_A_MACHINE)


def machine_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of flat inputs that say on which machine a step runs."""
    return {name: value for name, value in inputs.items() if is_of_a_machine(name)}


class Step(ABC):
    """One step: makes the artifact `name` under the results' folder.

    Attributes:
        stage: The stage that it belongs to.
        name: Name and relative folder of the artifact.
        requires: Steps whose artifacts it is made from.
        target: The target that it belongs to, or None if it serves all.
        notes: What the user should know of how it was made.
        beside: What `build` tells of the making and is no claim: fields of
            `pipeline.steps.artifact.Made`.
    """

    stage: ClassVar[str]

    def __init__(
        self, context: Context, name: str, requires: Sequence[Step] = (), target: str | None = None
    ) -> None:
        self.context = context
        self.name = name
        self.requires = tuple(requires)
        self.target = target
        self.notes: list[str] = []
        self.beside: dict[str, Any] = {}
        self._place: Place | None = None

    @property
    def measures(self) -> bool:
        """Whether it measures time, and has to be alone on the machine."""
        return False

    @property
    def folder(self) -> Path:
        """Where the artifact lies."""
        return self.context.folder / self.name

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Everything beside the required artifacts that can change the result, as plain values.

        Names are for people, who read "changed: settings export.opset" of
        {"settings export": {"opset": 20}}. Nothing in it says where a file lies.
        """

    def made_from(self) -> dict[str, str]:
        """Digests of what the artifact is made from, by name."""
        return {step.name: step.artifact().digest for step in self.requires}

    def seals(self) -> dict[str, str]:
        """Seals of the artifacts that it is made from, by name: stated, and part of no key."""
        return {step.name: step.artifact().seal for step in self.requires}

    def differs(self) -> str:
        """Why two machines may make different bytes of the same inputs; "" if they may not."""
        return "chosen by timing" if self.measures else ""

    def again(self, folder: Path) -> Artifact:
        """Make the artifact once more, in another place; the first is neither read nor replaced."""
        parts = self.parts()
        return artifact.make(
            folder,
            kind=self.stage,
            name=self.name,
            key=self._key_of(parts),
            build=self.build,
            made_from=parts["made_from"],
            tools=parts["tools"],
            inputs=parts["inputs"],
            code=parts["code"],
        )

    def shards(self) -> Sequence[Step]:
        """Parts of the work that others may do before it, once all that it requires is there.

        A shard's artifact is found by the step where it is up to date, and made by it where it is
        not: with and without shards a step makes the same.
        """
        return ()

    def forget_shards(self) -> None:  # noqa: B027
        """Remove what lies here of the shards: the artifact is there."""

    def do_without(self, missing: Sequence[Step]) -> bool:
        """Go on without some of what the step requires; whether it can.

        Args:
            missing: Steps that failed, or were skipped, or are not built.
        """
        return False

    def tools(self) -> dict[str, str]:
        """Versions of the packages that decide the result."""
        return {}

    def modules(self) -> list[str]:
        """Modules of which the key holds all that they import: those that do the work."""
        return [type(self).__module__]

    def code(self) -> dict[str, str]:
        """Hash of every module of this project that can change the result, by file name."""
        return self.context.code.hashes(self.modules())

    @abstractmethod
    def build(self, folder: Path) -> Mapping[str, Any]:
        """Write the artifact's files into `folder` and return the facts about it."""

    def parts(self) -> dict[str, dict[str, Any]]:
        """Everything that can change the result, by kind and name."""
        inputs, tools = flat(self.inputs()), self.tools()
        if self._place is not None:
            inputs, tools = self._place.inputs_there(inputs), self._place.tools_there(tools)
        return {
            "made_from": self.made_from(),
            "inputs": inputs,
            "tools": tools,
            "code": self.code(),
        }

    @contextmanager
    def seen_from(self, place: Place) -> Iterator[None]:
        """Let the parts of the key be those that the step has on another machine.

        So they can be compared where nothing is known of that machine but what an artifact, or the
        run of a fleet, says of it.
        """
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def of_the_machine(self, name: str, here: Callable[[], Any]) -> Any:
        """An input of the machine: as the place says from which the step is seen, or as here."""
        if self._place is None or name not in self._place.inputs:
            return here()
        return self._place.inputs[name]

    def key(self) -> str:
        """Content hash of everything that can change the result."""
        return self._key_of(self.parts())

    def _key_of(self, parts: Mapping[str, Any]) -> str:
        return digest_of({"stage": self.stage, "name": self.name, **parts})

    def artifact(self) -> Artifact:
        """The finished artifact, read once a run.

        Raises:
            ArtifactError: There is none.
        """
        known = self.context.artifacts
        if self.name not in known:
            known[self.name] = Artifact.read(self.folder)
        return known[self.name]

    def stale(self, *, verify: bool = True, elsewhere: Elsewhere | None = None) -> str | None:
        """Why the step has to run, or None if its artifact is up to date and undamaged.

        Args:
            verify: Whether to hash its files, too: of many images that takes a while.
            elsewhere: Says which machines' artifacts count; None: those of machines like this one.
        """
        self.context.artifacts.pop(self.name, None)
        if not self.folder.exists():
            return "not built yet"
        try:
            existing = self.verified() if verify else self.artifact()
        except ArtifactError as error:
            return f"damaged: {error}"
        if existing.inputs is None:
            return "built by an earlier version"
        if elsewhere is None:
            return self._what_changed(existing)
        # Nobody here knows what another machine is like. What the artifact says of it is taken, and
        # all else compared; whether such a machine counts is another question.
        with self.seen_from(Place(existing.inputs, existing.tools)):
            return self._what_changed(existing) or elsewhere.why_not(self, existing)

    def _what_changed(self, existing: Artifact) -> str | None:
        parts = self.parts()
        return what_changed(existing, parts) if existing.key != self._key_of(parts) else None

    def verified(self) -> Artifact:
        """The finished artifact, whole and as the results' folder states it.

        Raises:
            ArtifactError: It is not.
        """
        existing = self.artifact()
        existing.verify()
        self.context.stated.require(self.name, existing.seal)
        return existing

    def restate(self) -> None:
        """State the seals of what the artifact is made from anew, where they changed.

        What is made again may come out the same and tell something else, such as another tool's
        version. All that is made from it stays up to date, and names the new seal from now on.

        Raises:
            ArtifactError: The folder cannot be written.
        """
        existing, seals = self.artifact(), self.seals()
        if existing.seals == seals:
            return
        for name, seal in seals.items():
            if seal not in self.context.stated.of(name):
                return  # it was changed, and not by us: no reason to agree with it
        text, seal = existing.restated(seals)
        self.context.stated.announce(self.name, seal)
        self.context.artifacts[self.name] = artifact.rewrite_manifest(existing, text)
        self.context.log(f"{self.name}: states the seals of {', '.join(seals)} anew")

    def run(self) -> Artifact:
        """Make the artifact."""
        start = time.monotonic()

        def build(folder: Path) -> Mapping[str, Any]:
            facts = self.build(folder)
            self.beside["seconds"] = round(time.monotonic() - start, 3)
            return facts

        return self.make(build)

    def make(self, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Make the artifact by what `build` writes, such as something measured elsewhere."""

        def say(line: str) -> None:
            self.notes.append(line)
            self.context.log(f"{self.name}: {line}")

        def announce(seal: str) -> None:
            self.context.stated.announce(self.name, seal)

        parts = self.parts()
        made = artifact.make(
            self.folder,
            kind=self.stage,
            name=self.name,
            key=self._key_of(parts),
            build=build,
            say=say,
            seals=self.seals(),
            beside=self.beside,
            announce=announce,
            **parts,
        )
        self.context.artifacts[self.name] = made
        self.forget_shards()
        return made


MOST_NAMED = 4
"""Changes that are named; of more the number is told."""

LONGEST_VALUE = 80
"""Characters of a value that is kept as it is; of a longer one its hash is."""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by one name each, such as "settings export.opset"; long ones by their hash.

    Lists and empty mappings are values.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{name}.{inner}": each for inner, each in flat(value).items()}
        else:
            long = len(json.dumps(value, default=str)) > LONGEST_VALUE
            found[name] = f"sha256:{digest_of(value)}" if long else value
    return found


def what_changed(existing: Artifact, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Name what an artifact was made with that differs now.

    Args:
        existing: The artifact.
        parts: What it would be made with now, see `Step.parts`.
    """
    before = {
        "made_from": existing.made_from,
        "inputs": existing.inputs or {},
        "tools": existing.tools,
        "code": existing.code,
    }
    changed = []
    for kind, now in parts.items():
        # As JSON, in which what there was is kept: a tuple is a list there.
        old, new = before[kind], json.loads(json.dumps(now, default=str))
        for name in dict.fromkeys([*new, *old]):
            if old.get(name) != new.get(name):
                versions = f" {old.get(name, 'none')} -> {new.get(name, 'none')}"
                changed.append(f"{name}{versions}" if kind == "tools" else name)
    named = ", ".join(changed[:MOST_NAMED])
    more = len(changed) - MOST_NAMED
    return f"changed: {named or 'its name'}{f' and {more} more' if more > 0 else ''}"
