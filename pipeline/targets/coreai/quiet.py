"""What Core AI's packages say goes to a log instead of the screen."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

_STDERR = 2


@contextlib.contextmanager
def logged(log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Send output and warnings to `log`, a line a call; by default nowhere.

    On import coreai-torch and coreai-opt warn of torch versions that they were not tested with; a
    conversion draws a progress bar; the runtime, which is no Python, writes to file descriptor 2.
    """
    stream = io.StringIO()
    try:
        with (
            _descriptor(log),
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for line in stream.getvalue().splitlines():
            if line.strip():
                log(line.strip())
        repeated = Counter(f"{w.category.__name__}: {w.message}" for w in caught)
        for line, times in repeated.items():
            log(line if times == 1 else f"{line} ({times} times)")


@contextlib.contextmanager
def _descriptor(log: Callable[[str], None]) -> Iterator[None]:
    """Catch what is written to file descriptor 2, whoever writes it."""
    sys.stderr.flush()
    kept = os.dup(_STDERR)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            sink.seek(0)
            for line in sink.read().decode(errors="replace").splitlines():
                if line.strip():
                    log(line.strip())
