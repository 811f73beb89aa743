"""Which files a split of a dataset consists of: one listing for who reads and who hashes them.

It knows how images are arranged in folders, on a disk or in a tar file, and reads no image.
Planning asks it too, so that it loads neither numpy nor torch.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.core.errors import DataError
from pipeline.core.inputs import expanded, why_no_path
from pipeline.core.labels import require_distinct
from pipeline.core.remote import RemotePath, common_folder, is_address, located
from pipeline.core.splits import choose_split, is_split, require_classes
from pipeline.core.words import nearest, shown

SPLITS = ("train", "validation", "calibration")

KINDS = ("folder", "tar", "wds", "imagenet", "fashion-mnist")
"""Kinds of datasets: what stands before the colon of a dataset's name."""

AT_ADDRESSES = ("tar", "wds")
"""Kinds that are also read at an address of fsspec, such as s3://bucket/val.tar."""

CLASS_NAMES = "classes.txt"
"""Lies beside WebDataset shards and names their classes, one a line."""

IMAGENET_ARCHIVES = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_validation_synset_labels.txt",
)
"""Training and validation images, and what the latter show: one of the last two says so."""

EMBEDDED = {"validation": "t10k", "calibration": "calibration"}
"""Splits of Fashion-MNIST that the package carries, and how their files begin."""

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)

_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_SHARDS = 1_000_000
_MOST_LEVELS = 16

_ENDINGS = tuple(IMAGE_EXTENSIONS)

_CLUTTER = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini"))


def is_hidden(name: str) -> bool:
    """Whether an operating system put this file or folder beside the user's."""
    return name.startswith(".") or name in _CLUTTER


def is_image(name: str) -> bool:
    """Whether a file calls itself an image."""
    return name.lower().endswith(_ENDINGS)


def images_below(folder: Path) -> Iterator[Path]:
    """Images of a folder and of those in it, in the order of their names; no link is followed."""
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if is_image(path.name) and path.is_file() and not any(map(is_hidden, below.parts)):
            yield path


def require_image(name: str, where: str) -> None:
    """Raise DataError for a file among the images that does not call itself one."""
    if not is_image(name):
        known = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(f"{where} is not an image ({known}): move it out of the class folders")


@dataclass(frozen=True)
class Folders:
    """A split that lies in a folder for each class.

    Attributes:
        root: Where the folders lie.
        classes: Names of the folders, in the order of the labels, see `by_label`.
        labelled: The folders are classes; otherwise there is one, the root itself.
    """

    root: Path
    classes: tuple[str, ...]
    labelled: bool = True

    def images(self) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """Every folder with images, by its path below the root, and its files by name.

        Images may lie at any depth below their class folder. Links are followed. Folders turn out
        to be no classes while their images are listed, since a second pass over all of them would
        take as long as the first.

        Raises:
            DataError: A class has no images, a folder holds other files, or cannot be read; or the
                folders are no classes, but splits or datasets.
        """
        within: dict[str, list[str]] = {}
        for name in self.classes:
            empty = True
            for folder, inner, files in _folders_below(self.root, name):
                if folder == name:
                    within[name] = inner
                    require_classes({name: inner}, str(self.root))
                _require_images(files)
                empty = empty and not files
                if files:
                    yield folder, files
            if empty:
                raise DataError(f"class folder {self.root / name} has no images: fill or remove it")
        require_classes(within, str(self.root))


@dataclass(frozen=True)
class Files:
    """A split that lies in a few files.

    Attributes:
        root: What the names are relative to.
        names: The files, in order.
        labels: Those that state the classes.
    """

    root: Path | RemotePath
    names: tuple[str, ...]
    labels: tuple[str, ...]


def list_split(
    uri: str, split: str, embedded: Path, *, labels_needed: bool = True
) -> Folders | Files:
    """Which files a split consists of.

    Args:
        uri: Name of the dataset, see `care.data`.
        split: One of `SPLITS`.
        embedded: Folder of the data that the package carries.
        labels_needed: Whether a folder has to hold class folders; else images alone will do.

    Raises:
        DataError: The dataset is not there, or not what it should be; says what to do.
    """
    kind, path = parse(uri)
    if kind == "folder":
        return list_folder(path, split, labels_needed=labels_needed)
    if kind == "tar":
        # The file is its own root: what it is called changes none of its images.
        return Files(require_tar(located(path)), (".",), (".",))
    if kind == "wds":
        return list_shards(path)
    if kind == "imagenet":
        names = imagenet_files(path, split)
        return Files(Path(expanded(path)), names, names)
    return Files(embedded, embedded_files(split), ("labels.txt",))


def parse(uri: str) -> tuple[str, str]:
    """Kind and path of a dataset's name; the path may be missing where there is a default.

    Raises:
        DataError: The kind is unknown, or the path is missing.
    """
    kind, _, path = uri.partition(":")
    if kind not in KINDS:
        raise DataError(_unknown_kind(uri, kind))
    if not path and kind != "fashion-mnist":
        raise DataError(f"dataset {uri!r} lacks a path: write {kind}:PATH")
    if is_address(path) and kind not in AT_ADDRESSES:
        raise DataError(
            f"{kind}: is read from a disk: for images at an address pack them, and write "
            "tar:s3://bucket/val.tar, or wds:s3://bucket/val-{000..049}.tar"
        )
    return kind, path


def _unknown_kind(uri: str, kind: str) -> str:
    path = Path(expanded(uri))
    if not why_no_path(str(path)) and path.exists():
        likely = "folder" if path.is_dir() else "tar"
        return f"dataset {uri!r} lacks its kind: write {likely}:{uri}"
    return (
        f"unknown kind of dataset {shown(kind)!r}: there are folder:PATH, tar:PATH, "
        f"wds:PATTERN, imagenet:PATH and fashion-mnist{nearest(kind, KINDS)}"
    )


def list_folder(path: str, split: str, *, labels_needed: bool = True) -> Folders:
    """The class folders of a split, in `path` or in the split's folder there.

    Args:
        path: The folder.
        split: One of `SPLITS`.
        labels_needed: Whether there have to be class folders. Else a folder in which images lie
            beside folders, or alone, is taken as it is, whatever the folders in it are called.

    Raises:
        DataError: The folder is missing or arranged otherwise.
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
    stray = [file.name for file in files if is_image(file.name)]
    if stray and not labels_needed:
        return Folders(root, (".",), labelled=False)
    if not classes:
        content = f"{len(stray)} images but no" if stray else "no"
        raise DataError(
            f"{root} holds {content} class folders: put the images of each class into a folder "
            "of its own"
        )
    if stray:
        raise DataError(f"{root / stray[0]} lies outside the class folders: move it into one")
    require_distinct(classes, str(root))
    return Folders(root, tuple(by_label(classes)))


def by_label(classes: Iterable[str]) -> list[str]:
    """Class folders in the order of their labels: by name, but numbers by their value.

    ImageNet-V2's folders are called 0 to 999: as text, 10 would come before 2.
    """
    known = set(classes)
    numbers = [str(number) for number in range(len(known))]
    return numbers if known == set(numbers) else sorted(known)


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
        alone = len(folders) == 1 and not any(is_image(file.name) for file in files)
        if not alone or not _holds_folders(root / folders[0]):
            return root
        root = root / folders[0]


def _holds_folders(folder: Path) -> bool:
    folders, files = _visible(folder)
    return bool(folders) and not any(is_image(file.name) for file in files)


def _require_images(files: list[os.DirEntry[str]]) -> None:
    for file in files:
        if not is_image(file.name):
            require_image(file.name, file.path)


def _folders_below(
    root: Path, folder: str
) -> Iterator[tuple[str, list[str], list[os.DirEntry[str]]]]:
    """`folder` and those below it: path below `root`, folders in it, and files in it."""
    if folder.count("/") > _MOST_LEVELS:
        raise DataError(
            f"{root / folder} lies more than {_MOST_LEVELS} folders deep: does a link lead back up?"
        )
    folders, files = _visible(root / folder)
    yield folder, folders, files
    for inner in folders:
        yield from _folders_below(root, f"{folder}/{inner}")


def _visible(folder: Path) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Names of the sub-folders, and the files, that are not hidden, sorted by name."""
    folders: list[str] = []
    files: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                    continue
                _require_file(entry)
                files.append(entry)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from error
    return sorted(folders), sorted(files, key=_name)


def _require_file(entry: os.DirEntry[str]) -> None:
    """Refuse what lies among the images and may have no end; a link to nothing is seen later."""
    if not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry)):  # noqa: PTH110
        raise DataError(f"{entry.path} is a device or a pipe: move it out of the dataset")


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


Place = TypeVar("Place", bound=Path | RemotePath)


def require_tar(file: Place) -> Place:
    """The tar file, which has to be there.

    Raises:
        DataError: It is not.
    """
    if isinstance(file, Path) and (problem := why_no_path(str(file))):
        raise DataError(f"the tar file {shown(file)} {problem}")
    if not file.is_file():
        raise DataError(f"no tar file at {file}: check the path")
    return file


def imagenet_files(path: str, split: str) -> tuple[str, ...]:
    """Files of a split of ILSVRC 2012's archives: the images, and what says what they show.

    Args:
        path: Folder of the archives.
        split: Validation has an archive of its own, the others share that for training.

    Raises:
        DataError: One is missing.
    """
    root = Path(expanded(path))
    if problem := why_no_path(str(root)):
        raise DataError(f"the folder {shown(root)} {problem}")
    if not root.is_dir():
        raise DataError(f"no folder at {root}: name the folder that holds the archives")
    train, validation, *truths = IMAGENET_ARCHIVES
    archive = validation if split == "validation" else train
    if not (root / archive).is_file():
        others = sorted(p.name for p in root.glob("ILSVRC*") if p.name not in IMAGENET_ARCHIVES)
        there = f"; {shown(others[0])} is another archive" if others else ""
        raise DataError(f"no {archive} in {root}{there} (for unpacked images write folder:{path})")
    if split != "validation":
        return (archive,)
    known = [name for name in truths if (root / name).is_file()]
    if not known:
        raise DataError(
            f"{root} has the validation images, but nothing says what they show: put "
            f"{truths[0]} or {truths[1]} beside them"
        )
    return archive, known[0]


def list_shards(pattern: str) -> Files:
    """WebDataset shards, and the names of their classes where they lie beside the first.

    Args:
        pattern: Paths with braces (`{000..146}`, `{a,b}`) and, in the files' name, wildcards.

    Raises:
        DataError: A shard is missing.
    """
    shards = expand_shards(pattern)
    listed = shards[0].with_name(CLASS_NAMES)
    root, (*names, stated) = _below_common([*shards, listed])
    if not listed.is_file():
        return Files(root, tuple(names), tuple(names))
    return Files(root, (*names, stated), (stated,))


def _below_common(files: Sequence[Path | RemotePath]) -> tuple[Path | RemotePath, list[str]]:
    """The folder of all files, and their names below it."""
    remote = [file for file in files if isinstance(file, RemotePath)]
    if remote:
        folder = common_folder(remote)
        return folder, [file.below(folder) for file in remote]
    local = [file for file in files if isinstance(file, Path)]
    root = Path(os.path.commonpath([file.parent for file in local]))
    return root, [file.relative_to(root).as_posix() for file in local]


def expand_shards(pattern: str) -> list[Path | RemotePath]:
    """The shards that a pattern names, see `list_shards`.

    Raises:
        DataError: One is missing, or there is none.
    """
    shards: list[Path | RemotePath] = []
    for name in expand_braces(expanded(pattern)):
        if is_address(name) != is_address(pattern):
            raise DataError(f"{pattern} names files here and at an address: name one of them")
        if problem := why_no_path(name):
            raise DataError(f"the shard {shown(name)} {problem}")
        path = located(name)
        magic = any(sign in path.name for sign in "*?[")
        shards += _matching(path) if magic else [path]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}: check "
            "the path"
        )
    if not shards:
        raise DataError(f"no shard matches {pattern}: check the path")
    return shards


def _matching(pattern: Path | RemotePath) -> Sequence[Path | RemotePath]:
    """The files in a folder whose names fit a pattern, sorted; folders below are not looked at."""
    if isinstance(pattern, RemotePath):
        found = fnmatch.filter(pattern.parent.names(), pattern.name)
        return [pattern.with_name(name) for name in sorted(found)]
    try:
        names = [entry.name for entry in os.scandir(pattern.parent)]
    except OSError as error:
        raise DataError(f"folder {pattern.parent} cannot be read: {error.strerror}") from error
    return [pattern.with_name(name) for name in sorted(fnmatch.filter(names, pattern.name))]


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..146}` (leading zeros are kept) as a shell does.

    Raises:
        DataError: A brace is not closed, or nested.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in part for part in parts for brace in "{}"):
        raise DataError(f"braces in {pattern!r} are not in pairs: write {{000..146}} or {{a,b}}")
    count = math.prod(_count(part) for part in parts[1::2])
    if count > _MOST_SHARDS:
        raise DataError(f"{pattern!r} stands for {count:.3g} files: name at most {_MOST_SHARDS}")
    choices = [
        _alternatives(part) if is_brace else [part]
        for part, is_brace in zip(parts, itertools.cycle((False, True)), strict=False)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _count(content: str) -> int:
    """How many alternatives a brace holds."""
    span = _RANGE.fullmatch(content)
    if span is None:
        return content.count(",") + 1
    return max(0, int(span[2]) - int(span[1]) + 1)


def _alternatives(content: str) -> list[str]:
    span = _RANGE.fullmatch(content)
    if span is None:
        return content.split(",")
    first, last = int(span[1]), int(span[2])
    width = len(span[1]) if span[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def embedded_files(split: str) -> tuple[str, str, str]:
    """Files of an embedded split of Fashion-MNIST: names of the classes, images, labels.

    Raises:
        DataError: The package does not carry this split.
    """
    if split not in EMBEDDED:
        raise DataError(f"the package carries no {split} split of fashion-mnist")
    prefix = EMBEDDED[split]
    return "labels.txt", f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
