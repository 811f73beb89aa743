"""Toy steps for workers of a fleet. What they do there is told by a file, read by each process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import from_mapping
from pipeline.core.errors import BuildError
from pipeline.scheduler.plan import make_context
from pipeline.stages.context import RunContext
from pipeline.steps.step import Step

NAMES = ["first", "meet0", "meet1", "bench", "last"]


def said(name: str) -> str:
    """What the test tells workers; nothing in the test's own process."""
    file = Path(os.environ.get("TOY_SAID", "nothing"))
    return str(json.loads(file.read_text()).get(name, "")) if file.is_file() else ""


class ToyStep(Step):
    stage = "build"
    context: RunContext

    @property
    def measures(self) -> bool:
        return self.name == "bench"

    def inputs(self) -> Mapping[str, Any]:
        source = self.context.source
        return {
            "checkpoint": source.checkpoint_hash,
            "code": source.network_inputs().get("the code of model.module"),
            "machine": {"kind": said("kind")},
        }

    def tools(self) -> dict[str, str]:
        return {"torch": said("version") or "2.15", "onlyhere": said("kind") or "missing"}

    def build(self, folder: Path) -> Mapping[str, Any]:
        if self.name == said("refuses"):
            raise BuildError("the runtime refused")
        if self.name == said("full"):
            raise MemoryError("8 GiB")
        if self.name == said("odd"):
            raise ZeroDivisionError("by nothing")
        self._end()
        content = "".join((step.folder / "file").read_text() for step in self.requires)
        own = self._first_only() if said("odd_one") == self.name else ""
        (folder / "file").write_text(f"{content}{self.name}{own}\n")
        self.notes.append("a note")
        self.context.log(f"{self.name}: a line")
        return {"checkpoint": self._network(), "kind": said("kind")}

    def _first_only(self) -> str:
        """What only the first who makes it writes."""
        mark = Path(said("marks"), "made")
        was_made = mark.exists()
        mark.touch()
        return "" if was_made else " wrong"

    def _end(self) -> None:
        """Kill this process, or the worker, once."""
        for what, pid in (("kills", os.getppid()), ("dies", os.getpid())):
            mark = Path(said("marks"), f"{what}-{self.name}")
            if said(what) == self.name and not mark.exists():
                mark.touch()
                os.kill(pid, signal.SIGKILL)
                time.sleep(60)

    def _network(self) -> Any:
        """What of the network has arrived."""
        path = self.context.source.checkpoint()
        module = self.context.config.model.module
        if module is not None:
            sys.path.insert(0, str(Path.cwd()))
            __import__(module.partition(":")[0])
        return path.read_text() if path is not None and path.suffix == ".txt" else ""


def steps_of(context: RunContext) -> list[Step]:
    first = ToyStep(context, "first")
    meeting = [ToyStep(context, f"meet{number}", [first]) for number in range(2)]
    bench = ToyStep(context, "bench", [meeting[0]])
    return [first, *meeting, bench, ToyStep(context, "last", [bench, meeting[1]])]


def planner(text: str, log: Callable[[str], None]) -> Sequence[Step]:
    config = from_mapping(json.loads(text)).config
    return steps_of(make_context(config, log, lambda done, total=None, what="": None))
