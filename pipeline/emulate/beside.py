"""Work that a second thread does while the first goes on, and that several do side by side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch

from pipeline.core.threads import SMALL

WAITING = 2
"""Most calls that wait or run: what they hold is the memory that this costs."""


class Beside:
    """Calls functions in one other thread, in order: use it as a context manager.

    What a call raises is raised in the thread that gave it, by a later `call` or at the end. At the
    end, however it comes, the other thread is over: after an error or an interrupt it finishes the
    call that runs, and those that wait are dropped.

    Args:
        waiting: Most calls that wait or run at a time; `call` blocks until there is room.
    """

    def __init__(self, waiting: int = WAITING) -> None:
        self._waiting = waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._calls: deque[Future[None]] = deque()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called.

        Args:
            function: What to call; it must not need `torch.inference_mode`, which ends at a thread.
            arguments: What it is given. Nobody may write to it until the end.
        """
        while len(self._calls) >= self._waiting:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._calls:
                self._calls.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._calls.clear()


_thread = threading.local()


@contextmanager
def side_by_side(count: int) -> Iterator[Executor]:
    """Threads that each compute with their part of PyTorch's threads.

    An operation that several threads compute together begins and ends for all at once, and all wait
    while Python prepares the next: what has one thread each has neither loss.

    Args:
        count: How many.

    Yields:
        What runs functions in them. At the end, however it comes, the threads are over: after an
        error or an interrupt they finish the calls that run, and those that wait are dropped.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "beside", _take, (max(1, before // count),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # what any thread sets is what later ones begin with


def is_beside() -> bool:
    """Whether this is one of the threads of `side_by_side`."""
    return getattr(_thread, "beside", False)


def _take(threads: int) -> None:
    torch.set_num_threads(threads)
    _thread.beside = True


LEAST = 2
"""Images of a part that has a thread of its own: of one, torch computes some convolutions by other
kernels."""


def even_parts(images: int, most: int, threads: int, values: int = SMALL) -> list[slice]:
    """Images in even parts that suit a CPU's caches, and enough of them for all threads.

    Args:
        images: How many.
        most: Most images of a part. Of small pictures a part has half as many at least.
        threads: Threads that are to have a part, if there are images enough.
        values: Of one image.

    Returns:
        One part at least.
    """
    if values < SMALL:
        threads = min(threads, 2 * images // max(1, most))
    for_caches = -(-images // max(1, most))
    count = max(1, for_caches, min(threads, images // LEAST))
    edges = [images * number // count for number in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]
