"""How images are arranged in folders, on a disk or in a tar file."""

from __future__ import annotations

from pathlib import PurePath

from pipeline.core.errors import DataError

SPLITS = ("train", "validation", "calibration")

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
