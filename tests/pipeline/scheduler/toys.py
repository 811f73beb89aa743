"""Steps that other processes can plan: their settings travel as JSON."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import BuildError
from pipeline.stages.context import RunContext
from pipeline.steps.step import Step


class Settings:
    """Stands for configuration and source."""

    def __init__(self, folder: Path, **said: Any) -> None:
        self.folder, self.said, self.hashes = folder, said, self

    def save(self) -> None:
        """Stands for the cache of hashes."""

    def text(self) -> str:
        return json.dumps({"folder": str(self.folder), **self.said})


class ToyStep(Step):
    stage = "build"

    @property
    def settings(self) -> Settings:
        return cast(Settings, self.context.config)

    @property
    def measures(self) -> bool:
        return self.name.startswith("bench")

    def inputs(self) -> Mapping[str, Any]:
        return {"setting": 1}

    def build(self, folder: Path) -> Mapping[str, Any]:
        marks = self.settings.folder.parent / "marks"
        marks.mkdir(exist_ok=True)
        started = marks / f"{self.name}-{os.getpid()}"
        started.touch()
        beside = sorted(path.name for path in marks.glob("*.runs"))
        mine = marks / f"{self.name}.runs"
        mine.touch()
        try:
            self._work(marks)
        finally:
            mine.unlink()
        (folder / "file").write_text(self.name)
        self.notes.append(f"made by {os.getpid()}")
        self.beside["data"] = json.dumps(beside)
        return {"name": self.name}

    def _work(self, marks: Path) -> None:
        said = self.settings.said
        if (
            self.name == said.get("killed")
            and len(list(marks.glob(f"{self.name}-*"))) <= said["times"]
        ):
            (marks / f"{self.name}.runs").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == said.get("refused"):
            raise BuildError("the runtime refused")
        if self.name == said.get("odd"):
            raise ZeroDivisionError("by nothing")
        if self.name == said.get("full"):
            raise MemoryError("8 GiB")
        if self.name == said.get("waits"):
            time.sleep(60)
        if self.name in said.get("meet", ()):
            # Each of them ends only when all of them run: side by side, or never.
            end = time.monotonic() + 60
            while len(list(marks.glob("meet*-*"))) < len(said["meet"]):
                assert time.monotonic() < end, "nobody came"
                time.sleep(0.01)


def steps_of(context: RunContext) -> list[Step]:
    first = ToyStep(context, "first")
    meeting = [ToyStep(context, f"meet{number}", [first]) for number in range(3)]
    bench = ToyStep(context, "bench", [meeting[0]])
    other = ToyStep(context, "bench2", [first])
    return [first, *meeting, bench, other, ToyStep(context, "last", [bench, meeting[1]])]


def context_of(settings: Settings, log: Callable[[str], None] = lambda line: None) -> RunContext:
    anything: Any = settings

    def quiet(done: int, total: int | None = None, what: str = "") -> None: ...

    return RunContext(config=anything, source=anything, log=log, progress=quiet)


def planner(text: str, log: Callable[[str], None]) -> Sequence[Step]:
    said = json.loads(text)
    return steps_of(context_of(Settings(Path(said.pop("folder")), **said), log))
