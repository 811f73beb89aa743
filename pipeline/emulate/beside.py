"""Work that a second thread does while the first goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

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
