"""What a machine computes wrongly, and hashes that, is found by making it once more elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.commands.console import JsonConsole, QuietConsole, RichConsole
from pipeline.core.errors import BuildError
from pipeline.scheduler import execute, side_by_side
from pipeline.scheduler.audit import is_chosen
from pipeline.scheduler.execute import Outcome
from pipeline.scheduler.plan import Selection
from pipeline.scheduler.processes import Job, Processes
from pipeline.scheduler.side_by_side import Local, Running
from pipeline.stages.context import RunContext
from pipeline.steps.artifact import Artifact
from pipeline.steps.step import State, Step
from tests.pipeline.scheduler.toys import Settings, context_of

HERE = os.getpid()


class Plain(Step):
    """Says in what it writes whether another process makes it, where it is told to."""

    stage = "build"

    @property
    def measures(self) -> bool:
        return self.name == "bench"

    def differs(self) -> str:
        return "two builds differ" if self.name == "engine" else super().differs()

    def inputs(self) -> Mapping[str, Any]:
        return {"setting": 1}

    def build(self, folder: Path) -> Mapping[str, Any]:
        said = cast(Settings, self.context.config).said
        is_other = os.getpid() != said["here"]
        if is_other and self.name == said.get("refused"):
            raise BuildError("the runtime refused")
        wrong = is_other and self.name == said.get("wrong")
        (folder / "file").write_text(f"{self.name}{wrong}")
        return {}


def steps_of(context: RunContext) -> list[Step]:
    first, other = Plain(context, "first"), Plain(context, "other")
    return [first, other, Plain(context, "engine", [first]), Plain(context, "bench", [other])]


def planner(text: str, log: Callable[[str], None]) -> Sequence[Step]:
    said = json.loads(text)
    return steps_of(context_of(Settings(Path(said.pop("folder")), **said), log))


class Telling(QuietConsole):
    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.lines: list[str] = []

    def audited(self, lines: Sequence[str]) -> None:
        self.lines += lines


def audited(
    folder: Path, monkeypatch: pytest.MonkeyPatch, share: float = 1.0, **said: Any
) -> tuple[Outcome, list[str], list[str]]:
    """A run in this process, whose repetitions are another one's."""
    settings = Settings(folder, here=HERE, **said)
    folder.mkdir(exist_ok=True)

    @contextmanager
    def one_process(config: Any) -> Iterator[Running]:
        with Processes(1) as executor:
            job = lambda name, missing: Job(name, settings.text(), planner, missing)  # noqa: E731
            yield Local(executor, 1, job)

    monkeypatch.setattr(execute, "plan", steps_of)
    monkeypatch.setattr(side_by_side, "one_process", one_process)
    console, log = Telling(), list[str]()
    context = context_of(settings, log.append)
    outcome = execute.execute(context, Selection(), console, audited=share)
    return outcome, console.lines, log


LEFT_OUT = "not audited: bench (chosen by timing), engine (two builds differ)"


def test_what_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, lines, log = audited(tmp_path / "run", monkeypatch)
    assert {end.state for end in outcome.results} == {State.DONE}
    assert lines == ["audit of 1: 2 steps made once more, 2 the same", LEFT_OUT]
    assert set(lines) <= set(log)
    again, lines, _ = audited(tmp_path / "run", monkeypatch)
    assert {end.state for end in again.results} == {State.UP_TO_DATE}
    assert lines == ["audit of 1: 0 steps made once more, 0 the same"], "this run made nothing"


def test_a_difference_names_step_places_and_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, lines, log = audited(tmp_path / "run", monkeypatch, wrong="other")
    found = {end.name: end for end in outcome.results}
    mine = Artifact.read(tmp_path / "run" / "other").digest
    assert found["other"].state is State.FAILED
    assert found["other"].why.startswith(
        f"other is not what it was: this machine made {mine}, and another process "
    )
    other = found["other"].why.partition("another process ")[2].split(",")[0]
    assert len(other) == 64
    assert other != mine
    assert lines[0] == "audit of 1: 2 steps made once more, 1 the same"
    assert found["other"].why in lines
    assert found["other"].why in log
    assert found["first"].state is State.DONE
    assert outcome.exit_code == 3
    assert (tmp_path / "run" / "other" / "file").read_text() == "otherFalse", "it stays"


def test_what_cannot_be_made_once_more_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, _ = audited(tmp_path / "run", monkeypatch, refused="first")
    assert outcome.results[0].why == "first cannot be audited: the runtime refused"
    assert outcome.exit_code == 3


def test_the_key_decides_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"key {number}" for number in range(2000)]
    few = {key for key in keys if is_chosen(key, 0.1)}
    assert 140 < len(few) < 260
    assert few < {key for key in keys if is_chosen(key, 0.3)}
    assert all(is_chosen(key, 1) for key in keys)
    assert not any(is_chosen(key, 0) for key in keys)
    monkeypatch.setattr("pipeline.scheduler.audit.is_chosen", lambda key, share: False)
    _, lines, _ = audited(tmp_path / "run", monkeypatch, share=0.5)
    assert lines == ["audit of 0.5: 0 steps made once more, 0 the same", LEFT_OUT]


def test_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines, _ = audited(tmp_path / "run", monkeypatch, share=0, wrong="other")
    assert lines == []


@pytest.mark.parametrize("console", [QuietConsole, JsonConsole, RichConsole])
def test_people_are_told(console: type[QuietConsole], capsys: pytest.CaptureFixture[str]) -> None:
    with console(sys.stdout) as shown:
        shown.audited(["audit of 1: [2 steps]"])
    assert "audit of 1: [2 steps]" in capsys.readouterr().out
