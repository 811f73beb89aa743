"""A built model that answers."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from pipeline.core.figures import Throughput
from pipeline.core.network import Batch, Images, Logits, Pixels
from pipeline.core.plain import Facts

if TYPE_CHECKING:
    from pipeline.core.preprocess import Pictures


@dataclass(frozen=True)
class Numerics(Facts):
    """What values a network had while an executor ran it, rounded to its types.

    Attributes:
        overflowed_values: Values that left the range of their type.
        overflowed_tensors: Some of the tensors that hold values which are not finite, for people.
        more: Whatever else the executor tells.
    """

    overflowed_values: int = 0
    overflowed_tensors: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceState(Facts):
    """What a device said of itself while it ran.

    Attributes:
        throttled: Reasons for which it ran slower than it could.
        more: Whatever else it tells.
    """

    throttled: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timed:
    """One timed call.

    Attributes:
        logits: What it answered, (batch, classes).
        phases: Milliseconds by phase. "engine" is always there: the runtime's own call. A runtime
            with its own memory also gives "copies": the same with inputs and outputs copied from
            and to the host.
    """

    logits: Logits
    phases: Mapping[str, float]


class Opened(AbstractContextManager[Any]):
    """What holds something until it is closed, at the latest where its context ends."""

    def close(self) -> None:
        """Free what is held. Can be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PhotoRunner(Opened):
    """A built model that prepares photographs itself: use it as a context manager.

    Attributes:
        device: What runs it, for people.
    """

    device: str

    @abstractmethod
    def __call__(self, photo: Pixels) -> Logits:
        """Logits of one decoded photograph, (1, classes).

        Args:
            photo: RGB and upright, uint8 (height, width, 3), of any size.

        Raises:
            InputError: Shape or type do not fit.
        """


class Runner(Opened):
    """A built model that answers: use it as a context manager.

    Attributes:
        takes: What it is called with: "images", which are normalized, or "pixels", which it
            normalizes itself.
        device: What runs it, for people: runtime, version, device, threads.
        smallest: Smallest batch that it takes.
        largest: Largest batch that it takes; None if there is no limit.
        divides: How many batches it would rather have at once, to divide them among threads; 1 for
            what leaves that to others.
    """

    takes: ClassVar[Literal["images", "pixels"]] = "images"
    device: str
    smallest: int = 1
    largest: int | None = None
    divides: int = 1

    @abstractmethod
    def __call__(self, images: Batch) -> Logits:
        """Logits of images in the form that it `takes`; any batch size that the artifact takes.

        Raises:
            InputError: Shape, type or batch size do not fit.
        """

    def expect(self, labels: npt.NDArray[np.int64]) -> None:
        """Hear which images follow, before the first call; of use where a few stand for all.

        Args:
            labels: The right class of each image that will come, in their order, (images,).
        """

    def input_of(self, pictures: Pictures | Images) -> Batch:
        """What the runner is called with for these pictures; an array is that already."""
        if isinstance(pictures, np.ndarray):
            return pictures
        return pictures.pixels if self.takes == "pixels" else pictures.images

    def timed(self, images: Batch) -> Timed:
        """Run once and time it."""
        start = time.perf_counter()
        logits = self(images)
        return Timed(logits, {"engine": 1e3 * (time.perf_counter() - start)})

    def throughput(self, calls: int) -> list[Throughput]:
        """Time calls that follow each other in a queue, at batch sizes of the runner's own choice.

        Args:
            calls: How many of each batch size.

        Returns:
            One for each batch size; none where the runtime has no queue.
        """
        return []

    def numerics(self) -> Numerics | None:
        """What values the network had so far; None where nothing looks at them."""
        return None

    def noted(self) -> Any:
        """What `numerics` needs of the images so far, as JSON has it, for a run that goes on later.

        None where nothing looks at the values.
        """
        return None

    def go_on(self, images: int, noted: Any) -> None:
        """Take up what another such runner had noted, in place of what this one has seen.

        Args:
            images: How many images that one had seen.
            noted: See `noted`.

        Raises:
            ArtifactError, LookupError, TypeError, ValueError: It is nothing of the kind; nothing
                is taken up.
        """

    def begin(self, images: int) -> None:
        """Forget what was noted: the images that follow are a part of all, looked at on its own.

        Args:
            images: How many images stand before it.
        """

    def joined(self, noted: Sequence[Any]) -> Any:
        """What `noted` says of all images, from what it said of consecutive parts of them.

        Args:
            noted: See `noted`; of each part, in order, after it began with `begin`.
        """
        return None

    def narrow_sums(self) -> Runner | None:
        """The same artifact with sums of products as an accumulator in half precision has them.

        None where it runs for real, or where nothing sums products in half precision.
        """
        return None

    def device_state(self) -> DeviceState | None:
        """What the device says of itself since the start; None where it cannot tell."""
        return None
