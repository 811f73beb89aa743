"""Datasets of labelled images, each opened by a name like a URI.

    folder:PATH      a folder per class (ImageNet's layout), or train/ and val/ with such folders
    tar:PATH         the same inside one uncompressed tar file, read in place
    imagenet:PATH    ILSVRC 2012's two archives, as they were downloaded, in one folder
    wds:PATTERN      WebDataset shards, such as wds:/data/val-{00..63}.tar, with KEY.jpg and KEY.cls
    fashion-mnist    embedded test and calibration images; fashion-mnist:FOLDER to train

    dataset = open_dataset("folder:/data/imagenet", "validation")
    image, label = dataset[0]

Every dataset is map-style: its index is built when it is opened, and images are decoded when they
are asked for, in any order and from any number of processes. `dataset.transform` is what timm's
`create_loader` sets. Hidden files (`.DS_Store`, `._x.jpg`) are ignored; any other file among the
images is an error, for numbers measured on unclear content mean nothing.

A new kind of dataset is one module beside this one, one entry in `_OPENERS`, and its files in
`pipeline.core.listing`, which also says when a dataset has changed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from care.data.base import Dataset, Subset
from care.data.fashion_mnist import open_fashion_mnist
from care.data.folders import open_folder, open_image_folder
from care.data.imagenet import open_imagenet
from care.data.tars import open_shards, open_tar
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.listing import SPLITS, parse
from pipeline.core.words import nearest

__all__ = [
    "SPLITS",
    "Dataset",
    "Subset",
    "check_classes",
    "hold_out",
    "open_dataset",
    "open_images",
]

_OPENERS: dict[str, Callable[[str, str], Dataset]] = {
    "folder": open_folder,
    "tar": open_tar,
    "wds": open_shards,
    "imagenet": open_imagenet,
    "fashion-mnist": open_fashion_mnist,
}


def open_dataset(uri: str, split: str = "validation") -> Dataset:
    """Open a dataset by name (see the module's description).

    Args:
        uri: `folder:PATH`, `tar:PATH`, `wds:PATTERN`, `imagenet:PATH`, `fashion-mnist` or
            `fashion-mnist:FOLDER`.
        split: "train", "validation" or "calibration". A folder or tar file without sub-folders for
            splits, and a WebDataset pattern, are taken as they are for every split.

    Raises:
        DataError: The dataset is not there, or not what it should be; says what to do.
    """
    if split not in SPLITS:
        raise DataError(
            f"no split {split!r}: there are {', '.join(SPLITS)}{nearest(split, SPLITS)}"
        )
    kind, path = parse(uri)
    return _OPENERS[kind](path, split)


def open_images(uri: str, split: str) -> Dataset:
    """Open a dataset of which only the images count: as `open_dataset`, or a folder of images.

    Raises:
        DataError: The dataset is not there, or not what it should be; says what to do.
    """
    kind, path = parse(uri)
    return open_image_folder(path, split) if kind == "folder" else open_dataset(uri, split)


def check_classes(dataset: Dataset, num_classes: int) -> None:
    """Check that a model with `num_classes` outputs can be trained or judged on the dataset.

    Raises:
        DataError: The number of classes differs; for WebDataset shards without class names, whose
            classes are the labels that occur: a label exceeds the model's.
    """
    found = len(dataset.classes)
    if found == num_classes or (found < num_classes and not dataset.names_known):
        return
    sample = ", ".join(dataset.classes[:3]) + (", …" if found > 3 else "")
    raise DataError(
        f"the dataset has {found} classes ({sample}), the model {num_classes}: create the model "
        f"with num_classes={found}, or choose the dataset that it was trained for"
    )


def hold_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a dataset in two, every class by the same fraction.

    Args:
        dataset: Left unchanged.
        fraction: Share of every class that is held out, in (0, 1), rounded to whole images.
        seed: Chooses the images; equal seeds choose equally on every machine.

    Returns:
        What remains, and what is held out; both in the dataset's order.

    Raises:
        ConfigError: `fraction` is not in (0, 1).
        DataError: A class is too small to leave images on both sides.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out is between 0 and 1, not {fraction}")
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(dataset.labels):
        members = np.flatnonzero(dataset.labels == label)
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise DataError(
                f"class {dataset.classes[label]} has {len(members)} images, of which {fraction:g} "
                "cannot be held out: add images or change the fraction"
            )
        held_out[rng.permutation(members)[:count]] = True
    return Subset(dataset, np.flatnonzero(~held_out)), Subset(dataset, np.flatnonzero(held_out))
