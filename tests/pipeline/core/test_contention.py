"""Busy processes live as long as a measurement, and no longer."""

from __future__ import annotations

import time

import psutil
import pytest

from pipeline.core import contention
from pipeline.core.contention import contended, rivals


def busy() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if contention._BUSY in child.cmdline()]


def test_they_end_with_the_measurement() -> None:
    with contended(2):
        running = busy()
        for _ in range(1000):  # a process has no words of its own before it has begun
            if len(running) == 2:
                break
            time.sleep(0.01)
            running = busy()
        assert len(running) == 2
    assert not busy()
    assert not any(process.is_running() for process in running)


def test_they_end_with_an_error_too() -> None:
    with pytest.raises(KeyError), contended(1):
        raise KeyError
    assert not busy()


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 1), (3, 1), (8, 4)])
def test_one_for_every_two_cpus(monkeypatch: pytest.MonkeyPatch, cpus: int, count: int) -> None:
    monkeypatch.setattr(contention, "granted", lambda: cpus)
    assert rivals() == count
