"""A built model that answers."""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Self

from pipeline.core.network import Images, Logits


class Runner(AbstractContextManager[Any]):
    """A built model that answers: use it as a context manager.

    Attributes:
        device: What runs it, for people: runtime, version, device, threads.
        smallest: Smallest batch that it takes.
        largest: Largest batch that it takes; None if there is no limit.
    """

    device: str
    smallest: int = 1
    largest: int | None = None

    @abstractmethod
    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images; any batch size that the artifact takes.

        Raises:
            InputError: Shape, type or batch size do not fit.
        """

    def timed(self, images: Images) -> dict[str, float]:
        """Run once and time it, by phase, in milliseconds.

        The phase "engine" is always there: the runtime's own call. A runtime with its own memory
        also gives "copies": the same with inputs and outputs copied from and to the host.
        """
        start = time.perf_counter()
        self(images)
        return {"engine": 1e3 * (time.perf_counter() - start)}

    def throughput(self, calls: int) -> list[dict[str, Any]]:
        """Time calls that follow each other in a queue, at batch sizes of the runner's own choice.

        Args:
            calls: How many of each batch size.

        Returns:
            A row for a batch size: batch, p50_ms, p99_ms, images_per_s; none where the runtime has
            no queue.
        """
        return []

    def notes(self) -> dict[str, Any]:
        """What was noticed while it ran, for the report, such as an emulation's overflows."""
        return {}

    def close(self) -> None:
        """Free what is held. Can be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
