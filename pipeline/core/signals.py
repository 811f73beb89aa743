"""Signals that end a program: raised as exceptions, so that temporaries and children go first.

Python's own answer to SIGTERM and SIGHUP ends the process at once: folders that are being made
would stay, and child processes would live on.

An exception can get lost on its way: libraries catch everything in places (`except:`, as around
imports), and Python drops what is raised in a destructor or a callback. The run would go on as if
nobody had asked it to end, after something in it went wrong. So what arrived is remembered, and
raised again where the program looks, see `raise_received`.

While a module is loaded, nothing is raised: one that stays half made can crash the process, as
those of other languages do, and is what libraries take for a missing one. The signal is sent again
a moment later, until nothing is being loaded; a second one does not wait. A program that loads
libraries before it begins has nothing to tidy up yet, and ends at once: see `leave_while_loading`.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_PR_SET_PDEATHSIG = 1

_PAUSE = 0.02
"""Seconds after which a signal that arrived while a module was loaded is sent again."""

_IMPORTING = "<frozen importlib._bootstrap"
"""How the names of the files begin whose code loads modules."""


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
    """What asked this process to end.

    Attributes:
        number: The signal; None if there was none.
        waits: It arrived while a module was loaded, and will be sent again.
    """

    number: ClassVar[int | None] = None
    waits: ClassVar[bool] = False


def raise_received() -> None:
    """Raise again what a signal raised in this process, if it got lost; else do nothing.

    In the main thread alone, as Python does.

    Raises:
        Ended: SIGTERM or SIGHUP arrived.
        KeyboardInterrupt: Ctrl-C did.
    """
    if threading.current_thread() is threading.main_thread() and _Received.number is not None:
        _Received.waits = False
        raise _ending(_Received.number)


def _ending(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Ended(number)


def _loads_a_module(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(_PAUSE)
    main = threading.main_thread().ident
    if _Received.waits and main is not None:
        _Received.waits = False
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, number)  # a call that blocks the main thread returns
        else:
            signal.raise_signal(number)


def leave_while_loading() -> None:
    """End at once on Ctrl-C, until `raised` begins: for a program that is loading its libraries.

    A Ctrl-C that is ignored, as in a shell's background, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")  # sys.stderr may be what was interrupted
    os._exit(128 + number)


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
    usual = (signal.SIG_DFL, signal.default_int_handler, _leave)
    chosen = {s: handler for s, handler in before.items() if handler in usual}

    def answer(number: int, frame: FrameType | None) -> None:
        _Received.number = number
        if not _Received.waits and _loads_a_module(frame):
            _Received.waits = True
            # Not `threading.Thread`, whose locks the code that was interrupted may hold.
            _thread.start_new_thread(_send_again, (number,))
            return
        _Received.waits = False
        signal.signal(number, chosen[signal.Signals(number)])
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
            _Received.number, _Received.waits = None, False
        for number, handler in chosen.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends, however that ends; on Linux alone."""
    if sys.platform == "linux":
        import ctypes  # here: every command loads this module, and only workers need it

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
