"""`folder:PATH`: a folder per class."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from care.data.base import MOST_BYTES, UNLABELLED, Dataset, EncodedDataset, Labels
from pipeline.core.inputs import read_at_most
from pipeline.core.listing import Folders, list_folder


class FolderDataset(EncodedDataset):
    """Image files below a folder.

    Args:
        root: The folder.
        names: Paths of the images below it.
        classes: Class names, in the order of the labels.
        labels: int64 of shape (images,).
    """

    def __init__(
        self, root: Path, names: list[str], classes: Sequence[str], labels: Labels
    ) -> None:
        super().__init__(names, classes, labels)
        self.root = root

    def _location(self, index: int) -> str:
        return str(self.root / self.names[index])

    def size(self, index: int) -> int:
        """See `Dataset.size`."""
        return (self.root / self.names[index]).stat().st_size

    def _read(self, index: int) -> bytes:
        file = self.root / self.names[index]
        if not stat.S_ISREG(file.stat().st_mode):
            raise OSError("it is a device or a pipe")  # reading it might never end
        with file.open("rb") as stream:
            data = read_at_most(stream, MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise OSError(f"it is larger than {MOST_BYTES / 1e6:g} MB")
        return data


def open_folder(path: str, split: str) -> Dataset:
    """Open a folder of class folders, or of split folders that hold these.

    Images may lie at any depth below their class folder. Classes are in alphabetical order, which
    for ImageNet's folder names is the order of the published labels; folders called 0, 1, 2 and so
    on, as ImageNet-V2's, are in the order of these numbers.

    Raises:
        DataError: The folder is missing, empty or arranged otherwise, or holds other files.
    """
    return _opened(list_folder(path, split))


def open_image_folder(path: str, split: str) -> Dataset:
    """Open a folder of images, labelled by class folders or not at all.

    Without class folders it has no classes, and the label of every image is -1.

    Raises:
        DataError: As for `open_folder`, but images need no class folders.
    """
    listed = list_folder(path, split, labels_needed=False)
    if listed.labelled:
        return _opened(listed)
    names = [f"{folder}/{file.name}" for folder, files in listed.images() for file in files]
    unknown = np.full(len(names), UNLABELLED, dtype=np.int64)
    return FolderDataset(listed.root, names, (), unknown)


def _opened(listed: Folders) -> Dataset:
    index = {name: label for label, name in enumerate(listed.classes)}
    names: list[str] = []
    labels: list[int] = []
    for folder, files in listed.images():
        names += [f"{folder}/{file.name}" for file in files]
        labels += [index[folder.partition("/")[0]]] * len(files)
    return FolderDataset(listed.root, names, listed.classes, np.array(labels, dtype=np.int64))
