"""What coremltools says goes to a log instead of the screen."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator


class _Lines(io.TextIOBase):
    """A text stream that hands on whole lines; of a progress bar the last state alone."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._rest = log, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if last := line.rpartition("\r")[2].strip():
                self._log(last)
        return len(text)

    def finish(self) -> None:
        if self._rest:
            self.write("\n")


class _Handler(logging.Handler):
    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def logged(log: Callable[[str], None]) -> Iterator[None]:
    """Send output, warnings and coremltools' log messages to `log`, a line a call.

    On import coremltools warns of torch versions that it was not tested with and, off a Mac, of
    libraries that it cannot load; converting, it draws progress bars.
    """
    out, err = sys.stdout, sys.stderr

    def aside(line: str) -> None:
        # A log that prints must not end up here again.
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            log(line)

    stream, logger = _Lines(aside), logging.getLogger("coremltools")
    propagate, handlers = logger.propagate, logger.handlers[:]
    logger.propagate, logger.handlers = False, [_Handler(aside)]
    try:
        with (
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield
    finally:
        stream.finish()
        # A handler that coremltools made on its import would write to the stream above for good.
        logger.propagate, logger.handlers = propagate, handlers
        # coremltools warns of the same thing for every operation.
        repeated = Counter(f"{w.category.__name__}: {w.message}" for w in caught)
        for line, times in repeated.items():
            log(line if times == 1 else f"{line} ({times} times)")
