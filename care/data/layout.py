"""How images are arranged in folders, on a disk or in a tar file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath

from pipeline.core.errors import DataError

SPLITS = ("train", "validation", "calibration")

# Folder names that stand for a split, in order of preference. Calibration images are training
# images unless set apart: validation images must not shape the ranges that they later judge.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "test"),
    "calibration": ("calibration", "calib", "train", "training"),
}
SPLIT_FOLDERS = frozenset(name for names in _SPLIT_FOLDERS.values() for name in names)

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)

_CLUTTER = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))


def is_hidden(name: str) -> bool:
    """Whether an operating system put this file or folder beside the user's."""
    return name.startswith(".") or name in _CLUTTER


def is_image(name: str) -> bool:
    """Whether a file calls itself an image."""
    return PurePath(name).suffix.lower() in IMAGE_EXTENSIONS


def require_image(name: str, where: str) -> None:
    """Raise DataError for a file among the images that does not call itself one."""
    if not is_image(name):
        known = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(f"{where} is not an image ({known}): move it out of the class folders")


def choose_split(present: Collection[str], split: str, where: str) -> str:
    """The sub-folder of `where` that stands for a split.

    Raises:
        DataError: `where` has sub-folders for other splits only.
    """
    for name in _SPLIT_FOLDERS[split]:
        if name in present:
            return name
    raise DataError(
        f"{where} has {', '.join(f'{name}/' for name in sorted(present))} but no "
        f"{'/ or '.join(_SPLIT_FOLDERS[split])}/ for the {split} split: add it, or name a folder "
        "of classes directly"
    )
