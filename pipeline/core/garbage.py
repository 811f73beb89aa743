"""How often, and where, Python looks for circles of objects that nothing refers to."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

GARBAGE = (20_000, 20, 20)
"""How often Python looks for circles that nothing refers to. Modules and graphs are made of
millions of objects that stay, and with numbers of its own, 700, 10 and 10, Python goes through them
again and again: 3 of the 140 CPU seconds of a run, a sixteenth of one with nothing to do."""


_FROM_THE_START = gc.get_freeze_count()
"""Python 3.12 sets hundreds of its own objects aside."""


def set_aside() -> bool:
    """Whether this program set objects of its own aside; Python counts all that lie there."""
    return gc.get_freeze_count() > _FROM_THE_START


@contextmanager
def only_new() -> Iterator[None]:
    """Look for circles among what is made within alone.

    PyTorch's exporter and coremltools ask for a whole collection at the end of their work: beside
    both packages each takes a quarter of a second to go through what has been there before.
    """
    # A program that set its own objects aside does not get them back.
    if set_aside():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
