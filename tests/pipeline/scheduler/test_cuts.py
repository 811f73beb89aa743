"""Steps in shards: several processes share the work, and the whole is as if one had done it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.commands.console import QuietConsole
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.scheduler import execute
from pipeline.scheduler.execute import Outcome
from pipeline.scheduler.plan import Selection, step_named
from pipeline.scheduler.processes import Job, Made, Processes
from pipeline.scheduler.side_by_side import Begun, Local, Running
from pipeline.stages.context import RunContext
from pipeline.stages.shards import forget, place_of_shards
from pipeline.steps.artifact import Artifact
from pipeline.steps.step import State, Step
from pipeline.store.shared import Shared
from tests.pipeline.scheduler.toys import Settings, context_of

LETTERS = "abcd"


class Plain(Step):
    stage = "validate"

    @property
    def said(self) -> Mapping[str, Any]:
        return cast(Settings, self.context.config).said

    def mark(self, what: str) -> None:
        marks = self.context.folder.parent / "marks"
        marks.mkdir(exist_ok=True)
        with (marks / what).open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    def inputs(self) -> Mapping[str, Any]:
        return {"setting": 1}

    def build(self, folder: Path) -> Mapping[str, Any]:
        (folder / "file").write_text(self.name)
        return {}


class Part(Plain):
    def __init__(self, whole: Whole, letter: str) -> None:
        name = f"{place_of_shards(whole)}/{LETTERS.index(letter):05d}"
        super().__init__(whole.context, name, whole.requires)
        self.letter = letter

    def build(self, folder: Path) -> Mapping[str, Any]:
        self.mark(self.letter)
        if self.letter == self.said.get("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.letter == self.said.get("refused"):
            raise BuildError("the runtime refused")
        (folder / "file").write_text(self.letter)
        return {}


class Whole(Plain):
    def shards(self) -> list[Step]:
        (self.requires[0].folder / "file").read_text()  # as samples have to be there
        return [Part(self, letter) for letter in LETTERS]

    def forget_shards(self) -> None:
        for shard in self.shards():
            if shard.folder.exists():
                self.mark("forgotten")
        forget(self.context.folder / place_of_shards(self))

    def build(self, folder: Path) -> Mapping[str, Any]:
        self.mark("whole")
        text = ""
        for shard in self.shards():
            if shard.stale() is not None:
                self.mark("by the whole")
                text += cast(Part, shard).letter
            else:
                text += (shard.folder / "file").read_text()
        (folder / "file").write_text(text)
        return {}


def steps_of(context: RunContext) -> list[Step]:
    first = Plain(context, "first")
    whole = Whole(context, "whole", [first])
    return [first, whole, Plain(context, "last", [whole])]


def planner(text: str, log: Callable[[str], None]) -> Sequence[Step]:
    said = json.loads(text)
    return steps_of(context_of(Settings(Path(said.pop("folder")), **said), log))


class Telling(QuietConsole):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.told: list[str] = []

    def started(self, step: Step, why: str) -> None:
        self.told.append(f"{step.name} started")

    def finished(self, result: Any) -> None:
        self.told.append(f"{result.name} {result.state}")

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        self.told.append(f"{what} {done}/{total}")


@pytest.fixture(autouse=True)
def _toy_plan(monkeypatch: pytest.MonkeyPatch, forked_processes: None) -> None:
    monkeypatch.setattr(execute, "plan", steps_of)


def run(
    settings: Settings, jobs: int, *, store: Shared | None = None, force: bool = False
) -> tuple[Outcome, list[str]]:
    settings.folder.mkdir(parents=True, exist_ok=True)
    console, selection = Telling(), Selection(force=force)
    if jobs == 1:
        outcome = execute.execute(context_of(settings), selection, console, store)
        return outcome, console.told
    with Processes(jobs) as executor:
        text = settings.text()
        running = Local(executor, jobs, lambda name, missing: Job(name, text, planner, missing))
        outcome = execute.execute(context_of(settings), selection, console, store, running)
    return outcome, console.told


def marks(settings: Settings) -> dict[str, int]:
    """How often what was done."""
    found = (settings.folder.parent / "marks").iterdir()
    return {path.name: len(path.read_text().split()) for path in found}


ONCE = dict.fromkeys(LETTERS, 1)


def test_shards_run_before_the_whole(tmp_path: Path) -> None:
    alone = Settings(tmp_path / "alone" / "run")
    run(alone, 1)
    assert marks(alone) == {"whole": 1, "by the whole": 4}
    for jobs in (2, 3):
        settings = Settings(tmp_path / f"by{jobs}" / "run")
        outcome, told = run(settings, jobs)
        assert [(end.name, end.state) for end in outcome.results] == [
            (name, State.DONE) for name in ("first", "whole", "last")
        ]
        assert marks(settings) == {**ONCE, "whole": 1, "forgotten": 4}
        assert not (settings.folder / ".evaluations").exists()
        digests = {Artifact.read(each.folder / "whole").digest for each in (alone, settings)}
        assert len(digests) == 1
        assert told == [
            *("first started", "first done", "whole started"),
            *(f"shards of whole {done}/4" for done in (1, 2, 3, 4)),
            *("whole done", "last started", "last done"),
        ]


def test_what_is_up_to_date_is_not_cut(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run")
    run(settings, 2)
    outcome, told = run(settings, 2)
    assert {end.state for end in outcome.results} == {State.UP_TO_DATE}
    assert marks(settings) == {**ONCE, "whole": 1, "forgotten": 4}
    assert not any("shards" in line for line in told)


def test_a_shard_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run")
    settings.folder.mkdir()
    first, whole, _ = steps_of(context_of(settings))
    first.run()
    whole.shards()[1].run()
    run(settings, 2)
    assert marks(settings) == {**ONCE, "whole": 1, "forgotten": 4}
    run(settings, 2, force=True)
    assert marks(settings)["b"] == 2, "asked for"


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_what_a_shard_cannot_the_whole_finds(tmp_path: Path, how: str) -> None:
    settings = Settings(tmp_path / "run", **{how: "b"})
    outcome, _ = run(settings, 2)
    assert [end.state for end in outcome.results] == [State.DONE] * 3
    found = marks(settings)
    assert found["b"] == (2 if how == "killed" else 1)
    assert found["by the whole"] >= 1
    assert Artifact.read(settings.folder / "whole").path("file").read_text() == LETTERS


class OneByOne(Running):
    """Ends a step as soon as somebody asks; refuses one shard."""

    def has_room(self, step: Step) -> bool:
        return not self._begun

    def _submit(self, begun: Begun) -> None:
        self._begun[Future()] = begun

    def again(self, step: Step) -> Callable[[], tuple[str, str]]:
        raise AssertionError("nobody asked")

    def next(self) -> tuple[Begun, Made]:
        _, begun = self._begun.popitem()
        try:
            begun.step.run()
        except BuildError as error:
            return begun, Made((), error)
        return begun, Made(())


def test_after_one_has_failed_other_shards_are_left_to_the_whole(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run", refused="b")
    settings.folder.mkdir()
    outcome = execute.execute(context_of(settings), Selection(), Telling(), None, OneByOne())
    assert [end.state for end in outcome.results] == [State.DONE] * 3
    assert marks(settings) == {"a": 1, "b": 1, "by the whole": 3, "whole": 1, "forgotten": 1}


def test_shards_are_taken_from_a_store_and_given_to_it(tmp_path: Path) -> None:
    def store() -> Shared:
        return Shared.open(str(tmp_path / "store"), push=True, required=True, warn=print)

    one = Settings(tmp_path / "one" / "run")
    one.folder.mkdir(parents=True)
    first, whole, _ = steps_of(context_of(one))
    first.run()
    for shard in whole.shards()[:2]:
        shard.run()
        store().give(shard)
    other = Settings(tmp_path / "other" / "run")
    run(other, 2, store=store())
    assert marks(other) == {"c": 1, "d": 1, "whole": 1, "forgotten": 4}
    third = Settings(tmp_path / "third" / "run")
    run(third, 2, store=store())
    assert not (tmp_path / "third" / "marks" / "whole").exists(), "the whole was given as well"


def test_steps_and_shards_are_found_by_name(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run")
    settings.folder.mkdir()
    steps = steps_of(context_of(settings))
    assert step_named(steps, "last") is steps[2]
    with pytest.raises(FileNotFoundError):
        step_named(steps, ".evaluations/whole/00001")
    steps[0].run()
    found = step_named(steps, ".evaluations/whole/00001")
    assert isinstance(found, Part)
    assert found.letter == "b"
    for name in (".evaluations/whole/00004", ".evaluations/first/00000", "other"):
        assert step_named(steps, name) is None
    with pytest.raises(ArtifactError):
        Artifact.read(steps[1].folder)
