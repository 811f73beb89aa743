"""`tar:PATH` and `wds:PATTERN`: images inside tar files, read in place, here or at an address.

Opening scans the headers only. An uncompressed tar file keeps every member whole at a known offset,
so any image can be read without unpacking the rest.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from care.data.base import MOST_BYTES, Dataset, EncodedDataset, Labels
from pipeline.core.errors import DataError
from pipeline.core.labels import read_labels, require_distinct
from pipeline.core.listing import (
    CLASS_NAMES,
    IMAGE_EXTENSIONS,
    by_label,
    expand_shards,
    is_hidden,
    require_image,
    require_tar,
)
from pipeline.core.remote import RemotePath, located
from pipeline.core.splits import choose_split, is_split, require_classes
from pipeline.core.words import shown

_MOST_CLASSES = 1_000_000
_LONGEST_NUMBER = 20
_PATH = 300
"""Characters of a path in a message: a tar file may state any."""


class Member(NamedTuple):
    """A file or folder in a tar file.

    Attributes:
        parts: Of its path.
        is_folder: It is a folder.
        offset: Where its content begins.
        length: Of its content, in bytes.
    """

    parts: tuple[str, ...]
    is_folder: bool
    offset: int
    length: int

    @property
    def path(self) -> str:
        """Its path in the tar file."""
        return "/".join(self.parts)


class TarDataset(EncodedDataset):
    """Image files inside tar files.

    Args:
        tars: The tar files.
        places: For every image: which tar file, offset and length in bytes.
        names: For every image, its path inside.
        classes: Class names, in the order of the labels.
        labels: int64 of shape (images,).
        names_known: See `Dataset`.
    """

    def __init__(
        self,
        tars: Sequence[Path | RemotePath],
        places: Sequence[tuple[int, int, int]] | npt.NDArray[np.int64],
        names: Sequence[str],
        classes: Sequence[str],
        labels: Labels,
        names_known: bool = True,
    ) -> None:
        super().__init__(names, classes, labels, names_known)
        self.tars = list(tars)
        self.places = np.asarray(places, dtype=np.int64).reshape(-1, 3)

    def _location(self, index: int) -> str:
        return f"{shown(self.names[index], _PATH)} in {self.tars[int(self.places[index, 0])]}"

    def size(self, index: int) -> int:
        """See `Dataset.size`."""
        return int(self.places[index, 2])

    def _read(self, index: int) -> bytes:
        tar, offset, length = (int(value) for value in self.places[index])
        if length > MOST_BYTES:
            raise OSError(f"it is larger than {MOST_BYTES / 1e6:g} MB")
        file = self.tars[tar]
        if isinstance(file, RemotePath):
            data = file.part(offset, length)
        else:
            data = _part(file, offset, length)
        if len(data) != length:
            raise OSError("the tar file has become shorter")
        return data


def _part(file: Path, offset: int, length: int) -> bytes:
    # Opened anew for every image, so that processes share no file position; next to decoding
    # the image this takes no time.
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def open_tar(path: str, split: str) -> Dataset:
    """Open a tar file of class folders, or of split folders that hold these.

    Folders above, such as imagenet/ in imagenet/val/n01440764/x.JPEG, are passed over.

    Raises:
        DataError: The file is missing, compressed, damaged or arranged otherwise.
    """
    file = located(path)
    found = [member for member in members(file) if not any(map(is_hidden, member.parts))]
    images = sorted(member for member in found if not member.is_folder)
    if not images:
        raise DataError(f"{file} holds no files: it should hold a folder of images per class")
    above = _folders_above([member.parts for member in images], split, str(file))
    depth = len(above)
    images = [member for member in images if member.parts[:depth] == above]
    for member in images:
        if len(member.parts) < depth + 2:
            raise DataError(
                f"{shown(member.path, _PATH)} in {file} lies outside the class folders: move it "
                "into one"
            )
        require_image(member.parts[-1], f"{shown(member.path, _PATH)} in {file}")
    classes = by_label(member.parts[depth] for member in images)
    require_classes(_folders_in(images, depth), f"{file}/{'/'.join(above)}".rstrip("/"))
    require_distinct(classes, str(file))
    for member in found:
        if member.is_folder and member.parts[:-1] == above and member.parts[-1] not in classes:
            raise DataError(
                f"class folder {shown(member.path, _PATH)} in {file} has no images: fill or "
                "remove it"
            )
    index = {name: label for label, name in enumerate(classes)}
    return TarDataset(
        [file],
        [(0, member.offset, member.length) for member in images],
        [member.path for member in images],
        classes,
        np.array([index[member.parts[depth]] for member in images], dtype=np.int64),
    )


def _folders_in(images: list[Member], depth: int) -> dict[str, set[str]]:
    """For every folder at a depth, the folders right below it."""
    found: dict[str, set[str]] = {}
    for member in images:
        inner = found.setdefault(member.parts[depth], set())
        if len(member.parts) > depth + 2:
            inner.add(member.parts[depth + 1])
    return found


def open_shards(pattern: str, split: str) -> Dataset:
    """Open WebDataset shards: samples of an image KEY.jpg (or .png, …) and its label KEY.cls.

    The pattern may hold braces (`{000..146}`, `{a,b}`) and, in the files' name, wildcards. It names
    the images of one split, so that `split` changes nothing. Class names are read from classes.txt
    (one a line) beside the first shard, where there is one.

    Images come by class and key, however they are spread over the shards: in the order of a folder
    with the same files, so that a training takes the same steps on both.

    Raises:
        DataError: A shard is missing, compressed or damaged, or a sample lacks image or label.
    """
    del split
    shards = expand_shards(pattern)
    found = sorted(
        (label, key, number, image.offset, image.length)
        for number, shard in enumerate(shards)
        for key, image, label in _samples(shard)
    )
    places = [(number, offset, length) for _, _, number, offset, length in found]
    names = [f"{shards[number].name}/{key}" for _, key, number, _, _ in found]
    labels = [label for label, *_ in found]
    if not places:
        raise DataError(f"{shards[0]} and the other shards hold no samples (KEY.jpg and KEY.cls)")
    listed = shards[0].with_name(CLASS_NAMES)
    known = listed.is_file()
    count = max(labels) + 1
    classes = read_labels(listed)[0] if known else tuple(str(n) for n in range(count))
    if count > len(classes):
        raise DataError(
            f"the shards have label {count - 1}, but {listed} ends at {len(classes) - 1}"
        )
    return TarDataset(shards, places, names, classes, np.array(labels, dtype=np.int64), known)


def members(
    file: Path | RemotePath, window: tuple[int, int] | None = None, where: str = ""
) -> Iterator[Member]:
    """All files and folders of an uncompressed tar file, checked to be whole.

    Args:
        file: The tar file, or one that holds it.
        window: Where it lies in `file`, and its length in bytes; by default it is all of it.
        where: What to call it in a message.

    Raises:
        DataError: It is missing, compressed, damaged or holds links.
    """
    start, length = window or (0, require_tar(file).stat().st_size)
    where, end = where or str(file), 0
    try:
        with (
            file.open("rb") as stream,
            tarfile.open(fileobj=_Window(stream, start, length), mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it keeps every header otherwise
                end = _end_of(member, end)
                if end > length:
                    break
                _require_plain(member, where)
                parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
                if parts and (member.isfile() or member.isdir()):
                    yield Member(parts, member.isdir(), start + member.offset_data, member.size)
    except DataError:
        raise
    except Exception as error:  # tarfile meets broken headers with errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where} is compressed, damaged or no tar file ({reason}): "
            "unpack it with gunzip, or copy it again"
        ) from error
    # tarfile takes the end of the file, or half a header there, for the end of the archive, which
    # is a block of zeros after a whole number of blocks.
    blocks = -(-end // tarfile.BLOCKSIZE)
    if length < (blocks + 1) * tarfile.BLOCKSIZE:
        raise DataError(f"{where} is truncated: copy or download it again")


class _Window(io.RawIOBase):
    """A part of a file, as a file.

    Args:
        file: All of it.
        start: Where the part begins.
        length: Of the part, in bytes.
    """

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        self.at = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the part."""
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def tell(self) -> int:
        """The place in the part."""
        return self.at

    def read(self, size: int = -1) -> bytes:
        """Bytes of the part, as many as there are."""
        left = max(self.length - self.at, 0)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data


def _end_of(member: tarfile.TarInfo, start: int) -> int:
    """Where a member ends that begins after `start`."""
    end = member.offset_data + member.size
    if member.size < 0 or end <= start:  # it leads back, and would be read again and again
        raise ValueError("a header states a size that cannot be")
    return end


def _require_plain(member: tarfile.TarInfo, file: str) -> None:
    """Refuse a member whose bytes do not lie in the archive as they are.

    Raises:
        DataError: It is a link, or sparse.
    """
    if member.issym() or member.islnk():
        raise DataError(
            f"{shown(member.name, _PATH)} in {file} is a link: write the tar file again with "
            "--dereference --hard-dereference"
        )
    if member.issparse():
        raise DataError(
            f"{shown(member.name, _PATH)} in {file} is stored with holes: write the tar file again "
            "without --sparse"
        )


def _folders_above(paths: list[tuple[str, ...]], split: str, where: str) -> tuple[str, ...]:
    """The folders above the class folders: those that all images share, and the split's."""
    above: tuple[str, ...] = ()
    while True:
        depth = len(above)
        tops = {path[depth] for path in paths}
        # Below a class folder come images; so a folder that holds a shorter path is a class.
        classes = {path[depth] for path in paths if len(path) < depth + 3}
        splits = {top for top in tops if is_split(top)} - classes
        if splits:
            return (*above, choose_split(splits, split, where))
        if len(tops) > 1 or classes:
            return above
        above = (*above, *tops)


def _samples(shard: Path | RemotePath) -> Iterator[tuple[str, Member, int]]:
    """Key, image and label of each sample of a shard, in the order of their first files."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in members(shard):
        if member.is_folder or any(map(is_hidden, member.parts)):
            continue
        # WebDataset's rule: the key ends at the first dot of the file's name.
        stem, _, field = member.parts[-1].partition(".")
        key = "/".join((*member.parts[:-1], stem))
        kind = images if f".{field.lower()}" in IMAGE_EXTENSIONS else labels
        if kind is labels and field != "cls":
            continue  # samples may carry more, such as .json
        if key in kind:
            raise DataError(
                f"sample {shown(key, _PATH)} in {shard} has two files of one kind: remove one"
            )
        kind[key] = member
    for key in itertools.chain(images, labels):
        if key not in images or key not in labels:
            lacking = "label (.cls)" if key in images else "image (.jpg, .png, …)"
            raise DataError(
                f"sample {shown(key, _PATH)} in {shard} has no {lacking}: write the shard again"
            )
    with shard.open("rb") as file:
        for key, image in images.items():
            file.seek(labels[key].offset)
            text = file.read(min(labels[key].length, _LONGEST_NUMBER + 1))
            if not text.strip().isdigit() or int(text) >= _MOST_CLASSES:
                raise DataError(
                    f"{shown(key, _PATH)}.cls in {shard} holds {text[:20]!r}, not a class number: "
                    "write it again"
                )
            yield key, image, int(text)
