"""Keeps the runtimes' chatter off the screen: it goes to a log file."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from pipeline.core.errors import ArtifactError
from pipeline.core.replacing import cannot_write, refuse_foreign, whose_file
from pipeline.core.words import printable

HEADER = "log of CARE Deploy"
_FIRST_LINE = re.compile(rf"{HEADER}$|\d\d:\d\d:\d\d ".encode())


class Log:
    """A log file that people and runtimes write to.

    A disk that is full ends no run for the log's sake: lines are then lost. Names of other people
    may be in them: what a terminal would obey is escaped.

    Args:
        path: The file; lines are appended.
        required: Whether the file has to be written; else, where it cannot be, lines go nowhere.

    Raises:
        ArtifactError: The file is somebody else's, or cannot be written.
    """

    def __init__(self, path: Path, *, required: bool = True) -> None:
        refuse_foreign(path, whose_file(path, is_log), "is no log of ours")
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = _appending(path)
        except OSError as error:
            if required:
                raise ArtifactError(cannot_write(path, error)) from error
            self.stream = _appending(Path(os.devnull))
        self.lock = threading.Lock()
        self.also: Callable[[str], object] | None = None
        """Takes every line as well, such as a screen."""
        if self.stream.tell() == 0:
            self._write(f"{HEADER}\n")

    def __call__(self, line: str) -> None:
        """Write a line with the time of day."""
        with self.lock:
            self._write(f"{time.strftime('%H:%M:%S')} {printable(line.rstrip())}\n")
        if self.also is not None:
            self.also(line.rstrip())

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
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
            with contextlib.suppress(OSError):
                self.stream.flush()
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
            screen.flush()
            if screen is not sys.stderr:
                screen.close()


def _appending(path: Path) -> TextIO:
    # Libraries print names that are not UTF-8, too.
    return path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)


def is_log(path: Path) -> bool:
    """Whether a file is a log of ours."""
    with path.open("rb") as stream:
        return _FIRST_LINE.match(stream.readline(100).rstrip(b"\n")) is not None


def _screen() -> TextIO:
    """Where progress is shown: the error stream as it is now."""
    try:
        if sys.stderr.fileno() == 2:
            return os.fdopen(
                os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1
            )
    except (OSError, ValueError):
        pass  # A stream in memory, as in tests: it stays reachable under its own name.
    return sys.stderr
