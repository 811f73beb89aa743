"""Keeps the runtimes' chatter off the screen: it goes to a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class Log:
    """A log file that people and runtimes write to.

    Args:
        path: The file; lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = path.open("a", encoding="utf-8", buffering=1)
        self.lock = threading.Lock()

    def __call__(self, line: str) -> None:
        """Write a line with the time of day."""
        with self.lock:
            self.stream.write(f"{time.strftime('%H:%M:%S')} {line.rstrip()}\n")

    def close(self) -> None:
        """Close the file."""
        self.stream.close()

    @contextlib.contextmanager
    def captured(self) -> Iterator[TextIO]:
        """Send everything that is printed to the log file, also by libraries below Python.

        Yields:
            A stream that still reaches the screen.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        screen = _screen()
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            for fd, _ in saved:
                os.dup2(self.stream.fileno(), fd)
            with (
                contextlib.redirect_stdout(self.stream),
                contextlib.redirect_stderr(self.stream),
                warnings.catch_warnings(),
            ):
                # What a library warns of is for the log, whatever filters the caller has.
                warnings.simplefilter("default")
                yield screen
        finally:
            self.stream.flush()
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
            screen.flush()
            if screen is not sys.stderr:
                screen.close()


def _screen() -> TextIO:
    """Where progress is shown: the error stream as it is now."""
    try:
        if sys.stderr.fileno() == 2:
            return os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    except (OSError, ValueError):
        pass  # A stream in memory, as in tests: it stays reachable under its own name.
    return sys.stderr
