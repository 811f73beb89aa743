"""Signals while a network is trained: save at the next step, then end (or go on).

    SIGTERM, SIGHUP, SIGINT   save, then end with 128 and the signal's number
    SIGUSR1                   save and go on, as before the end of a slot of Slurm

A signal only raises a flag. At the end of each step all processes learn of each other's flags, so
that they save after the same step. A signal that comes later ends the program at once, and so does
the first one where it could not be answered within `GRACE` seconds, such as while a process waits
for one that is gone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch

from care.distributed import World
from pipeline.core.signals import Ended

GRACE = 20.0
"""Seconds from a signal to the end of the program at the latest: schedulers kill after 30."""

_ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)
)
_SAVING = getattr(signal, "SIGUSR1", None)
_CHECK = 0.5

_SAME = 2.0
"""Seconds within which two signals are one event: a terminal's Ctrl-C reaches the processes, and
torchrun sends it to them once more."""


class Wishes:
    """What was asked for, by signals and by the clock, in any of the processes.

    Args:
        world: This process among its siblings.
        seconds: Seconds between two checkpoints; 0 for none by the clock.

    Attributes:
        signum: The signal that asked this process to end, or 0.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.signum = 0
        self.at_once = False
        self._saves = False
        self._saved = time.monotonic()
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._heard = 0.0
        self._answered = threading.Event()

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self._saved = time.monotonic()
        self._saves = False

    def agreed(self) -> tuple[bool, int]:
        """Whether to save now, and the signal to end with (0: go on); the same in all processes.

        Called once a step. With several processes the answer is that of the step before: the
        question travels while the step is computed.
        """
        due = bool(self.seconds) and time.monotonic() - self._saved >= self.seconds
        own = torch.tensor([int(self._saves or (due and self.world.is_main)), self.signum])
        if self.world.size == 1:
            return self._decided(own)
        before, self._pending = self._pending, self.world.ask_all(own)
        if before is None:
            return False, 0
        work, answer = before
        work.wait()
        return self._decided(answer)

    def finish(self) -> None:
        """Wait for a question that still travels."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _decided(self, wishes: torch.Tensor) -> tuple[bool, int]:
        saves, signum = (int(value) for value in wishes)
        return bool(saves or signum), signum

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where nothing would be lost, a signal ends the program at once.

        Raises:
            Ended: By such a signal, or one that came before.
        """
        self.at_once = True
        try:
            if self.signum:
                raise Ended(self.signum)
            yield
        finally:
            self.at_once = False

    @contextmanager
    def heard(self) -> Iterator[Wishes]:
        """Answer signals; outside of the main thread, where Python allows no handlers, none."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [*_ENDING, *([_SAVING] if _SAVING is not None else [])]
        before = {number: signal.getsignal(number) for number in numbers}
        chosen = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
        source, target = os.pipe()
        os.set_blocking(target, False)
        wakes = signal.set_wakeup_fd(target, warn_on_full_buffer=False)
        for number in chosen:  # what nohup lets be ignored stays so
            signal.signal(number, self._hear)
        watch = threading.Thread(target=self._watch, args=(source,), daemon=True)
        watch.start()
        try:
            yield self
        finally:
            for number in chosen:
                signal.signal(number, before[number])
            signal.set_wakeup_fd(wakes)
            self._answered.set()
            with suppress(BlockingIOError):  # full: then it is awake
                os.write(target, b"\0")
            watch.join()
            os.close(source)
            os.close(target)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if signum == _SAVING:
            self._saves = True
            return
        first = not self.signum
        self._heard = self._heard or time.monotonic()
        if self.at_once or not (first or time.monotonic() - self._heard < _SAME):
            signal.signal(signum, signal.SIG_DFL)
            self.signum = signum
            raise KeyboardInterrupt if signum == signal.SIGINT else Ended(signum)
        self.signum = self.signum or signum

    def _watch(self, source: int) -> None:
        """End the program where a signal was not answered in time.

        Python answers signals only between two of its own instructions; a process that waits for
        another one hears nothing. What the system writes into `source` arrives all the same.
        """
        asked, signum = 0.0, 0
        while not self._answered.is_set():
            if select.select([source], [], [], _CHECK)[0]:
                heard = [number for number in os.read(source, 64) if number in _ENDING]
                if heard and not signum:
                    asked, signum = time.monotonic(), heard[0]
            if signum and time.monotonic() - asked > GRACE:
                print(
                    f"error: process {self.world.rank} could not save within {GRACE:.0f} s of "
                    "the signal: going on starts at the checkpoint before",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + signum)
