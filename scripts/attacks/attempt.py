"""Trying one input: what is given, and what came of it."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType

from pipeline.core.errors import PipelineError

_LONGEST_MESSAGE = 4000


class Outcome(Enum):
    """What came of an attempt."""

    REFUSED = "refused clearly"
    LOADED = "loaded"
    WRONG = "loaded, and should not have been"
    TRACEBACK = "tracebacks"
    HANG = "hangs"


FAULTS = (Outcome.WRONG, Outcome.TRACEBACK, Outcome.HANG)


@dataclass(frozen=True)
class Attempt:
    """One input and how to try it.

    Attributes:
        name: Tells it from others of its kind.
        run: Gives the input to the product.
        hostile: It has to be refused; else it may be loaded, too.
    """

    name: str
    run: Callable[[], object]
    hostile: bool = False


@dataclass
class Tally:
    """What came of all attempts.

    Attributes:
        counts: How often each outcome came.
        faults: A line for each that was none of refused and loaded.
    """

    counts: Counter[Outcome] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


_PATIENCE = 6
"""How many times its limit an attempt may wait without working."""


class TooLong(BaseException):
    """An attempt did not end within its time."""


def tally(attempts: Iterable[Attempt], limit_s: float) -> Tally:
    """Try inputs one after the other, each for a limited time.

    Args:
        attempts: The inputs.
        limit_s: Seconds after which an attempt counts as one that hangs.
    """
    result = Tally()
    for attempt in attempts:
        outcome, why = tried(attempt, limit_s)
        result.counts[outcome] += 1
        if outcome in FAULTS:
            result.faults.append(f"{outcome.value}: {attempt.name}: {why}")
    return result


def tried(attempt: Attempt, limit_s: float) -> tuple[Outcome, str]:
    """Try one input; returns what came of it, and where it went wrong."""
    try:
        with watchdog(limit_s), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt.run()
    except PipelineError as error:
        return judged(str(error))
    except TooLong:
        return Outcome.HANG, f"more than {limit_s:g} s"
    except Exception as error:  # that is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:120]
        return (
            Outcome.TRACEBACK,
            f"{type(error).__name__}: {text} ({place.filename}:{place.lineno})",
        )
    return (Outcome.WRONG if attempt.hostile else Outcome.LOADED), ""


def judged(message: str) -> tuple[Outcome, str]:
    """Whether a message is one that people can read: short, and harmless for a terminal."""
    lines = message.split("\n")
    if len(message) > _LONGEST_MESSAGE or len(lines) > 50:
        return Outcome.TRACEBACK, f"a message of {len(message)} characters, {len(lines)} lines"
    if not all(line.isprintable() for line in lines):
        return Outcome.TRACEBACK, f"a message that is not printable: {message[:80]!r}"
    return Outcome.REFUSED, message


@contextmanager
def watchdog(limit_s: float) -> Iterator[None]:
    """Raise TooLong in the main thread after so much work, or a long wait.

    On a busy machine the clock says little: what counts is the process's own time. An attempt that
    waits for something uses none, and has `_PATIENCE` as long.
    """

    def bark(number: int, frame: FrameType | None) -> None:
        raise TooLong

    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, limit_s),
        (signal.ITIMER_REAL, signal.SIGALRM, _PATIENCE * limit_s),
    )
    before = [signal.signal(number, bark) for _, number, _ in timers]
    try:
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        for (_, number, _), handler in zip(timers, before, strict=True):
            signal.signal(number, handler)
