"""What a run shows: progress for people, nothing, or one JSON object a line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Self, TextIO

from pipeline.core.words import duration, printable
from pipeline.scheduler.execute import Observer
from pipeline.steps.step import StageResult, State, Step

if TYPE_CHECKING:
    from rich.progress import Progress

_STYLES = {
    State.DONE: "green",
    State.UP_TO_DATE: "dim",
    State.FAILED: "bold red",
    State.SKIPPED: "yellow",
}


EVERY_S = 60.0
"""Seconds between two lines of progress where there is no screen to draw a bar on."""


class _Pace:
    """Says when a line of progress is due, and how long what it tells of will take.

    Args:
        clock: Tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.last = clock()
        self._first: tuple[object, int, float] | None = None

    def begin(self) -> None:
        """A step begins: its first line is due after a while only."""
        self.last = self.clock()
        self._first = None

    def left(self, done: int, total: int | None, what: str) -> float | None:
        """Seconds until all of it is done, at the pace since it was first told of.

        Args:
            done: How much is done.
            total: Of how much; None if that is unknown.
            what: What is being done: of something else the pace is another.
        """
        now = self.clock()
        if self._first is None or self._first[0] != (what, total) or done < self._first[1]:
            self._first = ((what, total), done, now)
        _, before, start = self._first
        if total is None or done <= before:
            return None
        return (now - start) / (done - before) * (total - done)

    def is_due(self) -> bool:
        """Whether enough time has passed since the last line."""
        if self.clock() - self.last < EVERY_S:
            return False
        self.last = self.clock()
        return True


class QuietConsole(Observer, AbstractContextManager["QuietConsole"]):
    """Shows failures only.

    Args:
        screen: Where to write.
    """

    def __init__(self, screen: TextIO) -> None:
        self.screen = screen

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Show what is not shown yet."""
        self.screen.flush()

    def costs(self, lines: Callable[[], Sequence[str]]) -> None:
        """What the run takes, before it begins: told by who asks, since it takes a second plan."""

    def finished(self, result: StageResult) -> None:
        """A step ended."""
        if result.state is State.FAILED:
            self.screen.write(printable(f"{result.name} failed: {result.why}") + "\n")

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""
        self.screen.write(printable(f"warning: {text}") + "\n")

    def audited(self, lines: Sequence[str]) -> None:
        """What was made once more, and what was not."""
        for line in lines:
            self.screen.write(printable(line) + "\n")

    def logged(self, line: str) -> None:
        """A line of the log, where these are asked for."""
        self.screen.write(printable(line) + "\n")


class JsonConsole(QuietConsole):
    """Writes one JSON object a line for every event; the last one sums the run up.

    Args:
        screen: Where to write.
        clock: Tells the time in seconds.
    """

    def __init__(self, screen: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(screen)
        self.pace = _Pace(clock)
        self.name = ""

    def costs(self, lines: Callable[[], Sequence[str]]) -> None:
        """What the run takes, before it begins."""
        self._write({"event": "costs", "lines": list(lines())})

    def started(self, step: Step, why: str) -> None:
        """A step begins."""
        self.name = step.name
        self.pace.begin()
        self._write({"event": "started", "stage": step.stage, "name": step.name, "why": why})

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        """How far the running step is, every so often."""
        left = self.pace.left(done, total, what)
        if self.pace.is_due():
            event = {"event": "progress", "name": self.name, "done": done, "total": total}
            self._write({**event, "what": what, "left_s": None if left is None else round(left)})

    def finished(self, result: StageResult) -> None:
        """A step ended."""
        plain = {k: v for k, v in asdict(result).items() if k != "error"}
        self._write({"event": "finished", **plain})

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""
        self._write({"event": "warning", "text": text})

    def audited(self, lines: Sequence[str]) -> None:
        """What was made once more, and what was not."""
        self._write({"event": "audit", "lines": list(lines)})

    def logged(self, line: str) -> None:
        """A line of the log, where these are asked for."""
        self._write({"event": "log", "text": line})

    def summary(self, **told: object) -> None:
        """How the run ended."""
        self._write({"event": "summary", **told})

    def _write(self, event: dict[str, object]) -> None:
        self.screen.write(json.dumps(event) + "\n")
        self.screen.flush()


class RichConsole(QuietConsole):
    """Shows a line for every step that ended, and a bar for the one that runs.

    In a pipe, where no bar can be drawn, a line says every so often how far it is.

    Args:
        screen: Where to write.
        clock: Tells the time in seconds.
    """

    def __init__(self, screen: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from pipeline.core.screen import Screen

        super().__init__(screen)
        self.console = Screen(file=screen)
        self.bar: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.total = 0
        self.ended = 0
        self.name = ""
        self.pace = _Pace(clock)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
        super().close()

    def costs(self, lines: Callable[[], Sequence[str]]) -> None:
        """What the run takes, before it begins."""
        from pipeline.core.screen import styled

        for line in lines():
            self.console.print(styled(printable(line), "dim"), soft_wrap=True)

    def planned(self, steps: Sequence[Step]) -> None:
        """The steps that will be looked at."""
        self.total = len(steps)

    def started(self, step: Step, why: str) -> None:
        """A step begins."""
        self.name = f"{self.ended + 1}/{self.total} {step.name}"
        self.pace.begin()
        self.progress(0)

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        """How far the running step is; without a step, what is being done."""
        text = printable(" · ".join(part for part in (self.name, what) if part))
        left = self.pace.left(done, total, what)
        if not self.console.is_terminal and self.pace.is_due():
            far = f" {done}/{total}" if total else ""
            until = "" if left is None else f", about {duration(left)} left"
            self.console.print(f"{text}{far}{until}", soft_wrap=True)
        if not self.bar.task_ids:
            self.bar.add_task(text, total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=text)

    def finished(self, result: StageResult) -> None:
        """A step ended."""
        from rich.text import Text

        from pipeline.core.screen import styled

        self.ended += 1
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        seconds = f"{result.seconds:6.1f} s" if result.seconds else " " * 8
        line = Text.assemble(
            printable(f"{self.ended:2}/{self.total} {result.name:32} {seconds}  "),
            styled(str(result.state), _STYLES[result.state]),
            styled(f"  {result.why}" if result.why else "", "dim"),
        )
        self.console.print(line, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""
        from pipeline.core.screen import styled

        self.console.print(styled(f"warning: {text}", "yellow"), soft_wrap=True)

    def audited(self, lines: Sequence[str]) -> None:
        """What was made once more, and what was not."""
        for line in lines:
            self.console.print(printable(line), soft_wrap=True, markup=False)

    def logged(self, line: str) -> None:
        """A line of the log, where these are asked for."""
        from pipeline.core.screen import styled

        self.console.print(styled(line, "dim"), soft_wrap=True)
