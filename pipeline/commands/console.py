"""What a run shows: progress for people, nothing, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Self, TextIO

from pipeline.core.words import printable
from pipeline.steps.step import StageResult, State, Step

if TYPE_CHECKING:
    from rich.progress import Progress

_STYLES = {
    State.DONE: "green",
    State.UP_TO_DATE: "dim",
    State.FAILED: "bold red",
    State.SKIPPED: "yellow",
}


class QuietConsole(AbstractContextManager["QuietConsole"]):
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

    def planned(self, steps: Sequence[Step]) -> None:
        """The steps that will be looked at."""

    def started(self, step: Step, why: str) -> None:
        """A step begins."""

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        """How far the running step is."""

    def finished(self, result: StageResult) -> None:
        """A step ended."""
        if result.state is State.FAILED:
            self.screen.write(printable(f"{result.name} failed: {result.why}") + "\n")

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""
        self.screen.write(printable(f"warning: {text}") + "\n")


class JsonConsole(QuietConsole):
    """Writes one JSON object a line for every event."""

    def started(self, step: Step, why: str) -> None:
        """A step begins."""
        self._write({"event": "started", "stage": step.stage, "name": step.name, "why": why})

    def finished(self, result: StageResult) -> None:
        """A step ended."""
        plain = {k: v for k, v in asdict(result).items() if k != "error"}
        self._write({"event": "finished", **plain})

    def warn(self, text: str) -> None:
        """Something went wrong that ends nothing."""
        self._write({"event": "warning", "text": text})

    def _write(self, event: dict[str, object]) -> None:
        self.screen.write(json.dumps(event) + "\n")
        self.screen.flush()


class RichConsole(QuietConsole):
    """Shows a line for every step that ended, and a bar for the one that runs."""

    def __init__(self, screen: TextIO) -> None:
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

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
        super().close()

    def planned(self, steps: Sequence[Step]) -> None:
        """The steps that will be looked at."""
        self.total = len(steps)

    def started(self, step: Step, why: str) -> None:
        """A step begins."""
        self.name = f"{self.ended + 1}/{self.total} {step.name}"
        self.progress(0)

    def progress(self, done: int, total: int | None = None, what: str = "") -> None:
        """How far the running step is; without a step, what is being done."""
        text = printable(" · ".join(part for part in (self.name, what) if part))
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
