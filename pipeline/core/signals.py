"""Signals that end a program: raised as exceptions, so that temporaries and children go first.

Python's own answer to SIGTERM and SIGHUP ends the process at once: folders that are being made
would stay, and child processes would live on.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_PR_SET_PDEATHSIG = 1


class Ended(BaseException):
    """A signal asks the program to end.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def name(self) -> str:
        """The signal's name, such as "SIGTERM"."""
        return signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        """Exit status, as shells have it: 128 and the signal's number."""
        return 128 + self.signum


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Ended` where SIGTERM or SIGHUP arrives; a second one ends the process at once.

    Signals that are ignored, as nohup does with SIGHUP, stay ignored. Outside of the main thread,
    where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in _ENDING}
    chosen = [s for s, handler in before.items() if handler is signal.SIG_DFL]

    def answer(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise Ended(signum)

    for number in chosen:
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends, however that ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
