"""Signals that end a program: raised as exceptions, so that temporaries and children go first.

Python's own answer to SIGTERM and SIGHUP ends the process at once: folders that are being made
would stay, and child processes would live on.

An exception can get lost on its way: libraries catch everything in places (`except:`, as around
imports), and Python drops what is raised in a destructor or a callback. The run would go on as if
nobody had asked it to end, after something in it went wrong. So what arrived is remembered, and
raised again where the program looks, see `raise_received`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

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


class _Received:
    """The signal that asked this process to end; None if none did."""

    number: ClassVar[int | None] = None


def raise_received() -> None:
    """Raise again what a signal raised in this process, if it got lost; else do nothing.

    In the main thread alone, as Python does.

    Raises:
        Ended: SIGTERM or SIGHUP arrived.
        KeyboardInterrupt: Ctrl-C did.
    """
    if threading.current_thread() is threading.main_thread() and _Received.number is not None:
        raise _ending(_Received.number)


def _ending(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


@contextmanager
def raised() -> Iterator[None]:
    """Raise `Ended` where SIGTERM or SIGHUP arrives; a second one ends the process at once.

    Signals that are ignored, as nohup does with SIGHUP, stay ignored. Outside of the main thread,
    where Python allows no handlers, nothing changes. What got lost on its way, that of Ctrl-C too,
    is raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, *_ENDING)}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    chosen = {s: handler for s, handler in before.items() if handler in usual}

    def answer(number: int, frame: FrameType | None) -> None:
        signal.signal(number, chosen[signal.Signals(number)])
        _Received.number = number
        raise _ending(number)

    for number in chosen:
        signal.signal(number, answer)
    try:
        yield
        raise_received()
    except (Ended, KeyboardInterrupt):
        raise
    except BaseException as error:
        # It may have failed only because the signal cut something short.
        if _Received.number is not None:
            raise _ending(_Received.number) from error
        raise
    finally:
        if chosen:  # else it is that of the block around this one
            _Received.number = None
        for number, handler in chosen.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends, however that ends; on Linux alone."""
    if sys.platform == "linux":
        import ctypes  # here: every command loads this module, and only workers need it

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
