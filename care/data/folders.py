"""`folder:PATH`: a folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from care.data.base import Dataset, EncodedDataset, Labels
from care.data.layout import SPLIT_FOLDERS, choose_split, is_hidden, is_image, require_image
from pipeline.core.errors import DataError


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
        return (self.root / self.names[index]).read_bytes()


def open_folder(path: str, split: str) -> Dataset:
    """Open a folder of class folders, or of split folders that hold these.

    Images may lie at any depth below their class folder. Classes are in alphabetical order, which
    for ImageNet's folder names is the order of the published labels.

    Raises:
        DataError: The folder is missing, empty or arranged otherwise, or holds other files.
    """
    root = Path(path).expanduser()
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
    """The folder of a split, where `root` has such.

    A class may be called "train", too: a split's folder holds folders, a class's folder images.
    """
    present = []
    for name in _visible(root)[0]:
        if name in SPLIT_FOLDERS:
            folders, files = _visible(root / name)
            if folders and not any(map(is_image, files)):
                present.append(name)
    return root / choose_split(present, split, str(root)) if present else root


def _images_below(root: Path, folder: str) -> Iterator[str]:
    """Sorted paths below `root` of all images in `folder`."""
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
