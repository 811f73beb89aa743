from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest

from pipeline.core import memory

FAULTS = """
import resource
import numpy as np
from pipeline.core.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a, b = np.ones(3_000_000, np.uint8), np.ones(3_000_000, np.uint8)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    faults()
    kept = faults()
print(kept)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_memory_is_asked_for_once() -> None:
    # In a process of its own: the settings are the whole process's.
    run = [sys.executable, "-c", FAULTS]
    kept = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert int(kept) < 200  # 29,000 without it, one for each page of each array


def test_nothing_happens_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.freed_memory_kept():
        pass


def test_settings_are_taken_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        calls: ClassVar[list[tuple[int, ...]]] = []

        def mallopt(self, *setting: int) -> None:
            self.calls.append(setting)

        def malloc_trim(self, pad: int) -> None:
            self.calls.append((pad,))

    monkeypatch.setattr(memory, "_glibc", Library)
    with pytest.raises(KeyError), memory.freed_memory_kept():
        raise KeyError
    assert Library.calls == [(-3, 2**25), (-1, 2**30), (-1, 2**26), (0,)]
