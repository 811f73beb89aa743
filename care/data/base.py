"""What every dataset offers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.preprocess import decode

Labels = npt.NDArray[np.int64]

MOST_BYTES = 500_000_000
"""Largest encoded image: a file may call itself one and fill the memory."""


class Dataset(ABC):
    """Labelled images, addressed by index.

    Attributes:
        classes: Class names, in the order of the labels.
        labels: int64 of shape (images,): the class index of every image.
        names_known: Whether the dataset states its classes; otherwise `classes` are numbers up to
            the largest label that occurs.
        transform: What `dataset[i]` applies to the image, unless None.
    """

    def __init__(self, classes: Sequence[str], labels: Labels, names_known: bool = True) -> None:
        self.classes: tuple[str, ...] = tuple(classes)
        self.labels = labels
        self.names_known = names_known
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.label(index)

    def label(self, index: int) -> int:
        """Class index of an image."""
        return int(self.labels[index])

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """An image, upright and RGB.

        Raises:
            DataError: The image cannot be read or decoded; names the file.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """A name that is unique in the dataset and the same on every machine."""

    @abstractmethod
    def hash(self, index: int) -> str:
        """SHA-256 (hexadecimal) of the encoded file, or of the pixels where there is no file.

        Raises:
            DataError: The file cannot be read.
        """


class Subset(Dataset):
    """Some images of another dataset, with a transform of their own.

    Args:
        dataset: The whole.
        indices: int64 of shape (images,): which of its images, in which order.
    """

    def __init__(self, dataset: Dataset, indices: npt.NDArray[np.int64]) -> None:
        super().__init__(dataset.classes, dataset.labels[indices], dataset.names_known)
        self.dataset = dataset
        self.indices = indices

    def image(self, index: int) -> Image.Image:
        """See `Dataset.image`."""
        return self.dataset.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        """See `Dataset.name`."""
        return self.dataset.name(int(self.indices[index]))

    def hash(self, index: int) -> str:
        """See `Dataset.hash`."""
        return self.dataset.hash(int(self.indices[index]))


class EncodedDataset(Dataset):
    """Images that are kept as encoded files, wherever these are."""

    def __init__(
        self,
        names: list[str],
        classes: Sequence[str],
        labels: Labels,
        names_known: bool = True,
    ) -> None:
        super().__init__(classes, labels, names_known)
        self.names = names

    @abstractmethod
    def _location(self, index: int) -> str:
        """Where the image is, for messages."""

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The encoded file; raises OSError."""

    def _encoded(self, index: int) -> bytes:
        try:
            return self._read(index)
        except OSError as error:
            raise DataError(
                f"{self._location(index)} cannot be read ({error.strerror or error}): check that "
                "it is still there and readable"
            ) from error

    def image(self, index: int) -> Image.Image:
        """See `Dataset.image`."""
        return decode(self._encoded(index), self._location(index))

    def name(self, index: int) -> str:
        """See `Dataset.name`."""
        return self.names[index]

    def hash(self, index: int) -> str:
        """See `Dataset.hash`."""
        return hashlib.sha256(self._encoded(index)).hexdigest()
