"""How many threads a network's operations have, where we run it for its answers.

An operation on a few small pictures ends before a second thread has been woken for it. Between
PyTorch's operations, in Python, that thread waits actively: on two cores one thread takes as long
by the clock as two, and half of the CPU seconds; answers are the same. ONNX Runtime, on 16 pictures
of 64 x 64 pixels at a time as calibration runs it, takes as long as well, and two thirds of the CPU
seconds. What is timed has the threads that it is asked to have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SMALL = 2**15
"""Values of a picture below which one thread is enough: 104 x 104 pixels in three colours.
care_tiny at 64 pixels gains nothing from a second thread, CARE-S0 at 224 does."""


AT_ONCE = 8
"""Batches of small pictures for what divides them among threads: a part of them for each."""


def batches_for(values: int) -> int:
    """Batches at a time for what divides pictures of so many values among threads."""
    return AT_ONCE if values < SMALL else 1


def threads_for(values: int) -> int | None:
    """Threads for pictures of so many values each; None for as many as this process may use."""
    return 1 if values < SMALL else None


@contextmanager
def threads_that_help(values: int) -> Iterator[None]:
    """Let PyTorch take as many threads as make a difference; afterwards as many as before.

    It does nothing where PyTorch is not loaded.

    Args:
        values: Of each picture that is run.
    """
    torch = sys.modules.get("torch")
    wanted = threads_for(values)
    if torch is None or wanted is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
