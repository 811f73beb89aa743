"""Busy processes live as long as a measurement, and no longer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.core import contention
from pipeline.core.contention import contended, rivals


def busy() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if contention._BUSY in child.cmdline()]


def until(holds: Callable[[], bool]) -> None:
    """Wait for it; a process has no words of its own before it has begun."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it never held")


def test_they_end_with_the_measurement() -> None:
    with contended(2):
        until(lambda: len(busy()) == 2)
        running = busy()
        until(lambda: all(process.cpu_times().user > 0.05 for process in running))
    assert not busy()
    assert not any(process.is_running() for process in running)


def test_they_end_with_an_error_too() -> None:
    with pytest.raises(KeyError), contended(1):
        raise KeyError
    assert not busy()


KILLED = """
import os, signal
from pipeline.core.contention import contended
with contended(1):
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_they_end_with_a_process_that_is_killed() -> None:
    measuring = psutil.Popen([sys.executable, "-c", KILLED], cwd=Path(__file__).parents[3])
    until(lambda: measuring.status() == psutil.STATUS_STOPPED)
    (rival,) = measuring.children()
    until(lambda: contention._BUSY in rival.cmdline())
    measuring.kill()
    measuring.wait()
    psutil.wait_procs([rival], timeout=30)
    assert not rival.is_running() or rival.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 1), (3, 1), (8, 4)])
def test_one_for_every_two_cpus(monkeypatch: pytest.MonkeyPatch, cpus: int, count: int) -> None:
    monkeypatch.setattr(contention, "granted", lambda: cpus)
    assert rivals() == count
