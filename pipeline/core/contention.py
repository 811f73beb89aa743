"""Other processes that want the CPUs: what a measurement meets where other work is done too.

Threads that wait actively for work are fastest on a quiet machine and the slowest on a busy one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.machine import granted

_BUSY = """
import os, sys, threading
def end():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=end).start()
while True: pass
"""
"""Works until its standard input ends: with the measurement, or with a process that was killed."""


def rivals() -> int:
    """Busy processes that stand for contention here: one for every two CPUs that are granted."""
    return max(1, granted() // 2)


@contextmanager
def contended(count: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile.

    Args:
        count: How many; 0 for none.
    """
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", _BUSY], stdin=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
