"""What the user sees while a network is trained: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.core.screen import Screen

LINE_SECONDS = 30.0
"""Without a terminal a line is printed this often, so that a log shows life but stays readable."""


class Report:
    """Shows the state of a training run.

    Args:
        total: Steps of the whole run.
        done: Steps taken before, by the interrupted run that goes on.
        shown: This process talks to the user.
        bar: Show a progress bar where the output is a terminal.
    """

    def __init__(self, total: int, done: int, shown: bool, bar: bool) -> None:
        self.console = Screen(quiet=not shown, soft_wrap=True)
        self.total, self.done, self.first = total, done, done
        self.images = 0
        self.started = self.printed = time.perf_counter()
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        self.bar = Progress(
            *columns,
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            transient=True,
            disable=not (shown and bar and self.console.is_terminal),
        )
        self.task = self.bar.add_task("", total=total, completed=done, status="")

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    @property
    def rate(self) -> float:
        """Images per second since the start of this program, validation included."""
        return self.images / max(time.perf_counter() - self.started, 1e-9)

    def step(self, epoch: int, images: int, loss: float | None) -> None:
        """A step over `images` images was taken; `loss` is given now and then."""
        self.done += 1
        self.images += images
        if loss is None:
            self.bar.advance(self.task)
            return
        status = f"loss {loss:.4f}  {self.rate:.0f} img/s  {clock(self._remaining())} left"
        self.bar.update(self.task, completed=self.done, description=f"epoch {epoch}", status=status)
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= LINE_SECONDS:
            self.printed = now
            self.say(f"epoch {epoch}  step {self.done}/{self.total}  {status}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line)
        sys.stdout.flush()

    def _remaining(self) -> float:
        """Seconds to the end at the rate so far."""
        taken = time.perf_counter() - self.started
        return taken / max(self.done - self.first, 1) * (self.total - self.done)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
