"""Which training images a calibration looks at: balanced over the classes, seeded, and hashed.

    chosen = draw(open_dataset(uri, "train"), 512, validation=hashes_of(open_dataset(uri)))

Images that judge a network must not choose its ranges: an image of the validation split in the
sample, found by its hash, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import digest_of
from pipeline.core.network import Images

FEWEST = 8
"""A sample of fewer images is refused: its ranges would be those of single images."""

ENOUGH = 128
"""A smaller sample is taken with a warning."""


class Dataset(Protocol):
    """Labelled images, addressed by index from 0."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of the labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Any:
        """An image, in the form that the `preprocess` given to `load` takes."""

    def label(self, index: int) -> int:
        """Its class."""

    def hash(self, index: int) -> str:
        """SHA-256 of the encoded file, or of its pixels."""


@dataclass(frozen=True)
class Sample:
    """Images of a dataset. Any first part of it is as balanced over the classes as it can be.

    Attributes:
        indices: Their places in the dataset.
        labels: Their classes.
        hashes: SHA-256 of each.
        seed: What chose them.
        warnings: What a report must say about the sample.
    """

    indices: tuple[int, ...]
    labels: tuple[int, ...]
    hashes: tuple[str, ...]
    seed: int
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the images' hashes, in order."""
        return digest_of(self.hashes)


def hashes_of(dataset: Dataset) -> frozenset[str]:
    """Hashes of all images of a dataset. Reads every file once.

    Raises:
        DataError: There is no image: an overlap with nothing proves nothing.
    """
    if not len(dataset):
        raise DataError("the validation split holds no images: check its path")
    return frozenset(dataset.hash(index) for index in range(len(dataset)))


def draw(
    dataset: Dataset, count: int, *, validation: Collection[str] = frozenset(), seed: int = 0
) -> Sample:
    """Choose images of the training split.

    Classes take turns in random order, each giving a random image of its own, until there are
    enough; classes that run out are passed over. An image that occurs twice is taken once.

    Args:
        dataset: The training split, or a calibration split that comes from it.
        count: How many images.
        validation: Hashes of the images that will judge the network, see `hashes_of`.
        seed: Equal seeds choose equally on every machine.

    Raises:
        ConfigError: `count` is below `FEWEST`.
        DataError: The dataset has too few distinct images, or the sample holds a validation image.
    """
    if count < FEWEST:
        raise ConfigError(
            f"calibration needs at least {FEWEST} images, not {count}: raise the count"
        )
    indices: list[int] = []
    hashes: dict[str, int] = {}
    for index in _turns(dataset, np.random.default_rng(seed)):
        content = dataset.hash(index)
        if content in hashes:
            continue
        hashes[content] = index
        indices.append(index)
        if len(indices) == count:
            break
    _refuse_overlap(hashes, validation)
    if len(indices) < FEWEST:
        raise DataError(
            f"the calibration split has {len(indices)} distinct images where at least {FEWEST} are "
            "needed: add images of the training split"
        )
    labels = tuple(int(dataset.label(index)) for index in indices)
    warnings = _warnings(len(indices), count, set(labels), len(dataset.classes))
    return Sample(tuple(indices), labels, tuple(hashes), seed, warnings)


def _turns(dataset: Dataset, rng: np.random.Generator) -> Iterator[int]:
    """All indices, class by class in turns, in random order."""
    labels = np.array([dataset.label(index) for index in range(len(dataset))], dtype=np.int64)
    waiting = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    turn = 0
    while waiting:
        for place in rng.permutation(len(waiting)):
            yield int(waiting[place][turn])
        turn += 1
        waiting = [members for members in waiting if len(members) > turn]


def _refuse_overlap(hashes: dict[str, int], validation: Collection[str]) -> None:
    known = validation if isinstance(validation, set | frozenset) else frozenset(validation)
    shared = [index for content, index in hashes.items() if content in known]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(hashes)} calibration images are also in the validation split "
            f"(the first is image {shared[0]}): calibrate on the training split; stray duplicates "
            "there can be removed, or avoided with another seed"
        )


def _warnings(found: int, asked: int, labels: set[int], classes: int) -> tuple[str, ...]:
    warnings = []
    if found < asked:
        warnings.append(f"{asked} calibration images were asked for, the split has {found}")
    if found < ENOUGH:
        warnings.append(f"{found} calibration images are few: ranges are safer with {ENOUGH}")
    if found >= classes > len(labels):
        warnings.append(f"{classes - len(labels)} of {classes} classes have no calibration image")
    return tuple(warnings)


@dataclass(frozen=True)
class CalibrationSet:
    """Images from the training split, for ranges and for decisions about precision.

    Attributes:
        images: Preprocessed images, (images, channels, height, width).
        labels: Their classes, (images,).
        hashes: SHA-256 of every source image, in the same order.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    hashes: tuple[str, ...]
