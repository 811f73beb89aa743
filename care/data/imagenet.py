"""`imagenet:PATH`: ILSVRC 2012's own archives, read in place.

PATH is a folder with

    ILSVRC2012_img_train.tar          a tar file for each class, of its images
    ILSVRC2012_img_val.tar            all validation images
    ILSVRC2012_devkit_t12.tar.gz      says which class each of these shows; in its place may lie
    ILSVRC2012_validation_synset_labels.txt   with a class such as n01440764 a line

Tar files keep their members whole at fixed offsets, one inside another too. Where each image lies
is found once, and kept in an index that all processes map into their memory: beside the archives,
or in the cache folder of the user where that cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import filelock
import numpy as np
import numpy.typing as npt

from care.data.base import Dataset, Names
from care.data.matlab import read_structs
from care.data.tars import Member, TarDataset, members
from pipeline.core.errors import DataError
from pipeline.core.inputs import expanded
from pipeline.core.listing import IMAGENET_ARCHIVES, imagenet_files
from pipeline.core.plain import read_json
from pipeline.core.words import shown

TRAIN, VALIDATION, DEVKIT, LABELS = IMAGENET_ARCHIVES

_FORMAT = "1"
_FOLDER = ".care-index"
_WAIT = 3600.0
_LARGEST_TEXT = 50_000_000
_MOST_DEVKIT = 1_000
"""Members of the development kit; it has about 50."""

_SYNSET = re.compile(r"n\d{8}")
_TRAIN_TAR = re.compile(r"(n\d{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d{1,8}\.JPEG")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class Found(NamedTuple):
    """An image in an archive."""

    name: str
    label: int
    offset: int
    length: int


def open_imagenet(path: str, split: str) -> Dataset:
    """Open a split of the archives; the first time, they are indexed.

    Args:
        path: Folder of the archives.
        split: "train" and "calibration" are the training images.

    Raises:
        DataError: An archive is missing, half, compressed or another one.
    """
    folder = Path(expanded(path))
    files = imagenet_files(path, split)
    archive, *truth = (folder / name for name in files)
    index = _index_of(archive, truth, split == "validation")
    arrays = {
        name: np.load(index / f"{name}.npy", mmap_mode="r")
        for name in ("places", "labels", "text", "ends")
    }
    classes = read_json(index / "classes.json", DataError)
    names = Names.packed(arrays["text"], arrays["ends"])
    return TarDataset([archive], arrays["places"], names, classes, arrays["labels"])


def _index_of(archive: Path, truth: list[Path], validation: bool) -> Path:
    """The folder of the index of an archive, which is made where it is missing."""
    stated = [_FORMAT, *(_identity(path) for path in (archive, *truth))]
    name = f"{archive.stem}-{hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]}"
    for parent in (archive.parent / _FOLDER, _cache()):
        if (parent / name).is_dir():
            return parent / name
    writable = _writable(archive.parent / _FOLDER) or _writable(_cache())
    if writable is None:
        raise DataError(
            f"the index of {archive} can be written neither beside it nor into {_cache()}: make "
            "one of the two writable (XDG_CACHE_HOME says where the second lies)"
        )
    # The processes of a machine come at once: one of them makes the index.
    index = writable / name
    with filelock.FileLock(writable / f"{name}.lock", timeout=_WAIT):
        if not index.is_dir():
            click.echo(f"indexing {archive}, once", err=True)
            images = _scan_validation(archive, truth) if validation else _scan_train(archive)
            _write(index, *images)
    return index


def _identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "care-deploy"


def _writable(folder: Path) -> Path | None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def _write(folder: Path, classes: list[str], images: list[Found]) -> None:
    """Write an index, whole or not at all."""
    names = Names(image.name for image in images)
    places = [(0, image.offset, image.length) for image in images]
    arrays: dict[str, npt.NDArray[Any]] = {
        "places": np.array(places, dtype=np.int64),
        "labels": np.array([image.label for image in images], dtype=np.int64),
        "text": names.text,
        "ends": names.ends,
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        (temporary / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
        temporary.replace(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scan_train(archive: Path) -> tuple[list[str], list[Found]]:
    """Classes and images of the training archive."""
    tars: dict[str, Member] = {}
    for member in members(archive):
        found = _TRAIN_TAR.fullmatch(member.path)
        if found is None or member.is_folder:
            raise DataError(
                f"{archive} holds {shown(member.path)}, not one tar file a class (n01440764.tar): "
                "it is not ILSVRC 2012's training archive"
            )
        tars[found[1]] = member
    if not tars:
        raise DataError(f"{archive} is empty: copy or download it again")
    classes = sorted(tars)
    images: list[Found] = []
    for label, name in enumerate(classes):
        tar = tars[name]
        for member in members(archive, (tar.offset, tar.length), f"{name}.tar in {archive}"):
            known = _TRAIN_IMAGE.fullmatch(member.path)
            if known is None or known[1] != name or member.is_folder:
                raise DataError(
                    f"{name}.tar in {archive} holds {shown(member.path)}, not images of its class "
                    f"({name}_18.JPEG): it is not ILSVRC 2012's training archive"
                )
            images.append(Found(f"{name}/{member.path}", label, member.offset, member.length))
    images.sort(key=lambda image: image.name)
    return classes, images


def _scan_validation(archive: Path, truth: list[Path]) -> tuple[list[str], list[Found]]:
    """Classes and images of the validation archive."""
    shows = read_truth(truth[0])
    classes = sorted(set(shows))
    index = {name: label for label, name in enumerate(classes)}
    images: list[Found] = []
    for member in members(archive):
        known = _VALIDATION_IMAGE.fullmatch(member.path)
        if known is None or member.is_folder:
            raise DataError(
                f"{archive} holds {shown(member.path)}, not ILSVRC2012_val_00000001.JPEG and so "
                "on: it is not ILSVRC 2012's validation archive"
            )
        number = int(known[1])
        if not 1 <= number <= len(shows):
            raise DataError(
                f"{archive} holds image {number}, but {truth[0]} knows {len(shows)}: one of the "
                "two is another year's"
            )
        name = shows[number - 1]
        images.append(Found(f"{name}/{member.path}", index[name], member.offset, member.length))
    if len(images) != len(shows):
        raise DataError(
            f"{archive} holds {len(images):,} images, {truth[0]} knows {len(shows):,}: one of the "
            "two is incomplete or another year's"
        )
    images.sort(key=lambda image: image.name)
    return classes, images


def read_truth(path: Path) -> list[str]:
    """Which class each validation image shows, by the images' numbers.

    Args:
        path: The development kit, or a text file with a class a line.

    Raises:
        DataError: It is damaged or something else.
    """
    if path.name != DEVKIT:
        return _classes_of_lines(_text(path), path)
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    content = _from_devkit(path, wanted)
    try:
        rows = read_structs(content[wanted[0]], "synsets")
        # Classes come first, with their numbers from 1; synsets above them have children.
        number_of = {
            int(row["ILSVRC2012_ID"][0]): str(row["WNID"])
            for row in rows
            if int(row["num_children"][0]) == 0
        }
        numbers = [int(line) for line in content[wanted[1]].decode().split()]
        shows = [number_of[number] for number in numbers]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): download it again") from error
    return _classes_of_lines("\n".join(shows), path)


def _classes_of_lines(text: str, path: Path) -> list[str]:
    names = text.split()
    for line, name in enumerate(names, start=1):
        if not _SYNSET.fullmatch(name):
            raise DataError(f"{path}:{line}: {shown(name)} is no class such as n01440764")
    if not names:
        raise DataError(f"{path} is empty: download it again")
    return names


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEXT:
        raise DataError(f"{path} is too large for a class a line")
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no text of a class a line") from error


def _from_devkit(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Files of the development kit, by their names without folders."""
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in _first(tar):
                name = member.name.rpartition("/")[2]
                stream = tar.extractfile(member) if member.isfile() and name in wanted else None
                if stream is not None:
                    content[name] = stream.read(_LARGEST_TEXT)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): download it again") from error
    if missing := [name for name in wanted if name not in content]:
        raise DataError(f"{path} lacks {missing[0]}: it is not ILSVRC 2012's development kit")
    return content


def _first(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for _ in range(_MOST_DEVKIT):
        member = tar.next()
        if member is None:
            return
        yield member
