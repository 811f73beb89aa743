"""What every dataset offers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.preprocess import Exif, decode

Labels = npt.NDArray[np.int64]

MOST_BYTES = 500_000_000
"""Largest encoded image: a file may call itself one and fill the memory."""


UNLABELLED = -1
"""Label of an image that has none."""


class Dataset(ABC):
    """Labelled images, addressed by index.

    Attributes:
        classes: Class names, in the order of the labels.
        labels: int64 of shape (images,): the class index of every image.
        names_known: Whether the dataset states its classes; otherwise `classes` are numbers up to
            the largest label that occurs.
        transform: What `dataset[i]` applies to the image, unless None.
        exif: Whether an orientation tag turns an image.
    """

    def __init__(self, classes: Sequence[str], labels: Labels, names_known: bool = True) -> None:
        self.classes: tuple[str, ...] = tuple(classes)
        self.labels = labels
        self.names_known = names_known
        self.transform: Callable[[Image.Image], Any] | None = None
        self.exif: Exif = "apply"

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
        """An image, RGB, and upright as far as `exif` says so.

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

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """The encoded file and where it is, or None where images are kept otherwise.

        Raises:
            DataError: The file cannot be read.
        """
        del index
        return None

    def size(self, index: int) -> int:
        """Bytes of the encoded file; where images are kept otherwise, they have none.

        Raises:
            DataError: There is no file.
        """
        raise DataError(f"{self.name(index)} is no file")

    def identity(self) -> str:
        """SHA-256 (hexadecimal) of names, classes and labels: which images, in which order."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        self._digest_names(digest)
        return digest.hexdigest()

    def _digest_names(self, digest: Any) -> None:
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "surrogateescape") + b"\n")


class Names(Sequence[str]):
    """Names, packed: processes that share them copy nothing, as they would with Python's strings.

    Args:
        names: Of any number.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def packed(cls, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Names:
        """Names that were packed before, such as in a mapped file."""
        names = cls()
        names.text, names.ends = text, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


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

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """See `Dataset.encoded`."""
        return self.dataset.encoded(int(self.indices[index]))

    def _digest_names(self, digest: Any) -> None:
        digest.update(self.dataset.identity().encode())
        digest.update(np.ascontiguousarray(self.indices).tobytes())


class EncodedDataset(Dataset):
    """Images that are kept as encoded files, wherever these are."""

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        labels: Labels,
        names_known: bool = True,
    ) -> None:
        super().__init__(classes, labels, names_known)
        self.names = names if isinstance(names, Names) else Names(names)

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
        return decode(self._encoded(index), self._location(index), self.exif)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """See `Dataset.encoded`."""
        return self._encoded(index), self._location(index)

    def _digest_names(self, digest: Any) -> None:
        digest.update(np.ascontiguousarray(self.names.ends).tobytes())
        digest.update(np.ascontiguousarray(self.names.text).tobytes())

    def name(self, index: int) -> str:
        """See `Dataset.name`."""
        return self.names[index]

    def hash(self, index: int) -> str:
        """See `Dataset.hash`."""
        return hashlib.sha256(self._encoded(index)).hexdigest()
