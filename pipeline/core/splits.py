"""How folders are named and arranged that stand for splits: train/ and val/ with class folders.

People write Train/ and VAL/, or name the folder above; that such folders are taken for classes
would be silent and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pipeline.core.errors import DataError
from pipeline.core.words import shown

# Folder names that stand for a split, in order of preference. Calibration images are training
# images unless set apart: validation images must not shape the ranges that they later judge.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "test", "testing"),
    "calibration": ("calibration", "calib", "train", "training"),
}
_NAMES = frozenset(name for names in _SPLIT_FOLDERS.values() for name in names)
_WORDS = re.compile(r"[^a-z]+")


def is_split(name: str) -> bool:
    """Whether a folder's name stands for a split, however it is capitalized."""
    return name.casefold() in _NAMES


def choose_split(present: Collection[str], split: str, where: str) -> str:
    """The sub-folder of `where` that stands for a split.

    Args:
        present: Names of the sub-folders that stand for a split.
        split: "train", "validation" or "calibration".
        where: The folder, for messages.

    Raises:
        DataError: `where` has sub-folders for other splits only, or two of one name.
    """
    for wanted in _SPLIT_FOLDERS[split]:
        found = sorted(name for name in present if name.casefold() == wanted)
        if len(found) > 1:
            raise DataError(f"{where} has {_listed(found)}: keep one of them")
        if found:
            return found[0]
    raise DataError(
        f"{where} has {_listed(sorted(present))} but no "
        f"{'/ or '.join(_SPLIT_FOLDERS[split])}/ for the {split} split: add it, or name a folder "
        "of classes directly"
    )


def require_classes(folders: Mapping[str, Collection[str]], where: str) -> None:
    """Refuse folders that are no classes, but splits or datasets.

    Args:
        folders: For every folder that would be a class, the folders in it.
        where: The folder that they are in, for messages.

    Raises:
        DataError: One holds train/ or val/; or all are called as splits are, and hold the same
            folders, such as seg_train/ and seg_test/.
    """
    for name, inner in folders.items():
        splits = sorted(filter(is_split, inner))
        if splits:
            raise DataError(
                f"{where}/{shown(name)} holds {_listed(splits)}: it is a dataset, not a class; "
                "name this folder"
            )
    contents = {frozenset(inner) for inner in folders.values()}
    called = all(_NAMES & set(_WORDS.split(name.casefold())) for name in folders)
    if len(folders) > 1 and called and len(contents) == 1 and contents != {frozenset()}:
        raise DataError(
            f"{where} has {_listed(sorted(folders))}, which hold the same folders: these are "
            "splits, not classes; name one of them"
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"{shown(name)}/" for name in names)
