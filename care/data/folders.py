"""`folder:PATH`: a folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from care.data.base import Dataset, EncodedDataset, Labels
from care.data.labels import require_distinct
from care.data.layout import is_hidden, is_image, require_image
from pipeline.core.errors import DataError
from pipeline.core.inputs import expanded, why_no_path
from pipeline.core.splits import choose_split, is_split, require_classes
from pipeline.core.words import shown

_MOST_LEVELS = 16


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

    def _read(self, index: int) -> bytes:
        file = self.root / self.names[index]
        if file.exists() and not file.is_file():
            raise OSError("it is a device or a pipe")  # reading it might never end
        return file.read_bytes()


def open_folder(path: str, split: str) -> Dataset:
    """Open a folder of class folders, or of split folders that hold these.

    Images may lie at any depth below their class folder. Classes are in alphabetical order, which
    for ImageNet's folder names is the order of the published labels.

    Raises:
        DataError: The folder is missing, empty or arranged otherwise, or holds other files.
    """
    root = Path(expanded(path))
    if problem := why_no_path(str(root)):
        raise DataError(f"the folder {shown(root)} {problem}")
    if not root.exists():
        raise DataError(f"no folder at {root}: check the path")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder (a tar file opens with tar:{path})")
    root = _split_folder(root, split)
    classes, files = _visible(root)
    stray = [file for file in files if is_image(file)]
    if not classes:
        content = f"{len(stray)} images but no" if stray else "no"
        raise DataError(
            f"{root} holds {content} class folders: put the images of each class into a folder "
            "of its own"
        )
    if stray:
        raise DataError(f"{root / stray[0]} lies outside the class folders: move it into one")
    require_classes({name: _visible(root / name)[0] for name in classes}, str(root))
    require_distinct(classes, str(root))
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list(_images_below(root, name))
        if not found:
            raise DataError(f"class folder {root / name} has no images: fill or remove it")
        names += found
        labels += [label] * len(found)
    return FolderDataset(root, names, classes, np.array(labels, dtype=np.int64))


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, where `root` has such, or a folder alone in it does.

    A class may be called "train", too: a split's folder holds folders, a class's folder images.
    """
    while True:
        folders, files = _visible(root)
        present = [name for name in folders if is_split(name) and _holds_folders(root / name)]
        if present:
            return root / choose_split(present, split, str(root))
        # As in a tar file, a folder alone that holds folders stands above the classes.
        if len(folders) != 1 or any(map(is_image, files)) or not _holds_folders(root / folders[0]):
            return root
        root = root / folders[0]


def _holds_folders(folder: Path) -> bool:
    folders, files = _visible(folder)
    return bool(folders) and not any(map(is_image, files))


def _images_below(root: Path, folder: str) -> Iterator[str]:
    """Sorted paths below `root` of all images in `folder`."""
    if folder.count("/") > _MOST_LEVELS:
        raise DataError(
            f"{root / folder} lies more than {_MOST_LEVELS} folders deep: does a link lead back up?"
        )
    folders, files = _visible(root / folder)
    for file in files:
        require_image(file, str(root / folder / file))
        yield f"{folder}/{file}"
    for inner in folders:
        yield from _images_below(root, f"{folder}/{inner}")


def _visible(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the sub-folders and of the files that are not hidden."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_hidden(entry.name):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from error
    return sorted(folders), sorted(files)
