"""Keeping freed memory in the process while a network runs.

glibc gives large blocks back to the operating system as soon as they are freed, and has to ask for
them again, page by page and zeroed, at the next operation. For a network's activations that costs
about as much as a third of the arithmetic.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of the settings in glibc's malloc.h."""

_LARGEST_BLOCK = 32 * 2**20
"""Most that glibc takes for the second: larger blocks are always the system's."""

_KEPT = 2**30


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep up to 1 GiB of freed memory for the next allocation; afterwards all is given back.

    The peak is what it would be without. It does nothing where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_BLOCK)  # glibc's own upper end
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is one that has these settings."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
