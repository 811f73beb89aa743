"""`fashion-mnist`: 28x28 gray images of clothes in 10 classes (MIT licence, Zalando SE).

The test split and 1,000 class-balanced training images for calibration are part of this package.
The other training images are read from a folder of idx files: `fashion-mnist:FOLDER`, else the
environment variable CARE_FASHION_MNIST, else the folder of Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from care.data.base import Dataset, Labels
from pipeline.core.errors import DataError
from pipeline.core.inputs import expanded, read_input, why_no_path
from pipeline.core.listing import EMBEDDED, embedded_files
from pipeline.core.preprocess import to_rgb
from pipeline.core.words import shown

ASSETS = Path(__file__).parent.parent / "assets"

_VARIABLE = "CARE_FASHION_MNIST"
_DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
_REMEDY = (
    f'apt-get install dataset-fashion-mnist, or python -c "from torchvision.datasets import '
    f"FashionMNIST; FashionMNIST('data', download=True)\" and {_VARIABLE}=data"
)

_UNSIGNED_BYTE = 0x08  # idx's type code
_SIDE = 28
_TYPE = 4  # bytes that state it
_AXES = 3
_LARGEST = 100_000_000
"""Bytes of a file, packed or not: twice those of the training images."""


class ArrayDataset(Dataset):
    """Gray images in memory.

    Args:
        images: uint8 of shape (images, height, width).
        labels: int64 of shape (images,).
        classes: Class names, in the order of the labels.
        prefix: Goes before an image's number in its name.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], labels: Labels, classes: Sequence[str], prefix: str
    ) -> None:
        super().__init__(classes, labels)
        self.images = images
        self.prefix = prefix

    def image(self, index: int) -> Image.Image:
        """See `Dataset.image`."""
        return to_rgb(Image.fromarray(self.images[index]))

    def name(self, index: int) -> str:
        """See `Dataset.name`."""
        return f"{self.prefix}/{range(len(self))[index]:05d}"

    def hash(self, index: int) -> str:
        """See `Dataset.hash`."""
        return hashlib.sha256(self.images[index].tobytes()).hexdigest()


def open_fashion_mnist(folder: str, split: str) -> Dataset:
    """Open a split: "validation" and "calibration" are embedded, "train" is read from idx files.

    Args:
        folder: Where the training split's idx files are; empty for the default places.
        split: "train", "validation" or "calibration".

    Raises:
        DataError: The files are missing, damaged or of another dataset.
    """
    classes = tuple(_verified("labels.txt").read_text().split("\n")[:-1])
    if split in EMBEDDED:
        _, image_file, label_file = embedded_files(split)
        images, labels = read_idx(_verified(image_file)), read_idx(_verified(label_file))
        return _dataset(images, labels, classes, split, str(ASSETS))
    root = _training_folder(folder)
    images = read_idx(_either(root / "train-images-idx3-ubyte"))
    labels = read_idx(_either(root / "train-labels-idx1-ubyte"))
    return _dataset(images, labels, classes, split, str(root))


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped if its name ends in .gz.

    The format: two zero bytes, the type code, the number of axes, each axis's length (big-endian,
    4 bytes), the values.

    Raises:
        DataError: The file is missing, truncated, damaged or of another format.
    """
    data = io.BytesIO(read_input(path, _LARGEST, DataError, _REMEDY))
    try:
        with _opened(data, path) as stream:
            shape = _shape(stream, path)
            # No more than is stated, and one byte that shows whether there is more: packed, a
            # small file may stand for gigabytes.
            stated = math.prod(shape)
            values = np.frombuffer(stream.read(stated + 1), np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): copy or download it again") from error
    if values.size != stated:
        more = " or more" if values.size > stated else ""
        raise DataError(
            f"{path} holds {values.size}{more} bytes of {'x'.join(map(str, shape))}: it is "
            "truncated or damaged, copy or download it again"
        )
    return values.reshape(shape)


def _opened(data: IO[bytes], path: Path) -> IO[bytes]:
    """The content of a file, unpacked."""
    return cast(IO[bytes], gzip.open(data)) if path.suffix == ".gz" else data


def _shape(stream: IO[bytes], path: Path) -> tuple[int, ...]:
    """Lengths of the axes, from the beginning of an idx file."""
    start = stream.read(_TYPE)
    axes = start[-1] if len(start) == _TYPE else 0
    lengths = stream.read(4 * axes) if 1 <= axes <= _AXES else b""
    if start[:-1] != bytes((0, 0, _UNSIGNED_BYTE)) or not lengths or len(lengths) < 4 * axes:
        raise DataError(f"{path} is not an idx file of bytes: copy or download it again")
    shape = tuple(int(length) for length in np.frombuffer(lengths, ">u4"))
    if math.prod(shape) > _LARGEST:
        raise DataError(f"{path} would hold more than Fashion-MNIST does: copy it again")
    return shape


def _dataset(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    classes: Sequence[str],
    split: str,
    where: str,
) -> Dataset:
    if images.shape[1:] != (_SIDE, _SIDE) or labels.shape != images.shape[:1] or not len(images):
        raise DataError(
            f"{where} holds images of shape {images.shape} and labels of shape {labels.shape}, not "
            f"28x28 images with a label each: this is not Fashion-MNIST"
        )
    if labels.max() >= len(classes):
        raise DataError(f"{where} has label {labels.max()}, but Fashion-MNIST's end at 9")
    return ArrayDataset(images, labels.astype(np.int64), classes, split)


def _training_folder(folder: str) -> Path:
    stated = folder or os.environ.get(_VARIABLE, "")
    root = Path(expanded(stated or _DEBIAN_FOLDER))
    if problem := why_no_path(str(root)):
        raise DataError(f"the folder {shown(root)} {problem}: {_REMEDY}")
    # torchvision's download puts the files two folders deeper.
    for candidate in (root, root / "FashionMNIST" / "raw"):
        for name in ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
            if (candidate / name).is_file():
                return candidate
    raise DataError(f"{root} has no train-images-idx3-ubyte[.gz] of Fashion-MNIST: {_REMEDY}")


def _either(path: Path) -> Path:
    """The file unpacked, where present, else gzipped."""
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _verified(name: str) -> Path:
    """Path of an embedded file whose SHA-256 is the recorded one."""
    path = ASSETS / name
    recorded = _checksums(ASSETS / "SHA256SUMS").get(name)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): reinstall care") from error
    if found != recorded:
        raise DataError(f"{path} differs from its checksum in SHA256SUMS: reinstall care")
    return path


@functools.cache
def _checksums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): reinstall care") from error
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
