"""Hashes of input files and of whole datasets, remembered between runs.

A file is hashed again where its size, date or inode differ from what they were when it was hashed.
What is remembered lies in one SQLite file. A folder of images is one row of it: a run over a known
dataset compares one hash a folder, not a million rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import DataError
from pipeline.core.files import digest_of, file_hash
from pipeline.core.listing import Files, Folders
from pipeline.core.remote import RemotePath
from pipeline.core.words import printable

KEEP_SECONDS = 3.0
"""How often hashes are written down while a dataset is hashed: a kill costs this much work."""

SAMPLED = 1024
"""Files whose content a fingerprint reads, in all; at least one of each folder."""

PIECE_BYTES = 2**20
PIECES = 16
"""Of a larger file, a fingerprint reads so many pieces."""

Kind = Literal["content", "fingerprint"]
Progress = Callable[[int, int], None]
"""Is told how many files of how many are hashed."""

_SQLITE = b"SQLite format 3\0"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files
    (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, inode INTEGER, sha256 TEXT);
CREATE TABLE IF NOT EXISTS folders
    (path TEXT PRIMARY KEY, stamp BLOB, digest TEXT, files BLOB);
"""

# The files of a folder are one text: faster to make, to compare and to keep than a row for each.
# Its fields end with a slash, which no file's name holds.
_LISTED = 4  # name, size, date, inode
_HASHED = 5  # … and hash

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Identity:
    """What a split of a dataset is, wherever it lies.

    Attributes:
        digest: SHA-256 over names, relative to the dataset, and contents of its files.
        files: How many these are.
        kind: "content": of all files; "fingerprint": names and sizes of all, contents of some.
    """

    digest: str
    files: int
    kind: Kind


class HashCache:
    """SHA-256 of files, remembered as long as size, date and inode stay the same.

    A touched file is hashed again; its hash stays what it was, so nothing is built again. What
    cannot be read or written down only costs time; no folder is made for it.

    Args:
        path: The SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved = time.monotonic()
        self._files: dict[str, tuple[Stamp, str]] | None = None
        self._folders: dict[str, tuple[bytes, str]] | None = None
        self._new_files: dict[str, tuple[Any, ...]] = {}
        self._new_folders: dict[str, tuple[Any, ...]] = {}

    @staticmethod
    def is_cache(path: Path) -> bool:
        """Whether a file is of the kind that is written here."""
        with path.open("rb") as stream:
            return stream.read(len(_SQLITE)) == _SQLITE

    def hash(self, file: Path | RemotePath) -> str:
        """SHA-256 of a file, in hexadecimal."""
        stamp = _stamp(file)  # before it is read: a change while that goes on shows next time
        known = self.known(file)
        if known is not None:
            return known
        path, found = _key(file), file_hash(file)
        self._known_files()[path] = (stamp, found)
        self._new_files[path] = (path, *stamp, found)
        return found

    def known(self, file: Path | RemotePath) -> str | None:
        """SHA-256 of a file, where it need not be read for it."""
        stamp, found = self._known_files().get(_key(file), (None, None))
        return found if stamp == _stamp(file) else None

    def folder_digest(self, folder: Path, stamp: bytes) -> str | None:
        """Digest of a folder's files, if they are as they were when it was made."""
        known = self._known_folders().get(_key(folder))
        return known[1] if known is not None and known[0] == stamp else None

    def folder_files(self, folder: Path) -> dict[str, str]:
        """Hashes of a folder's files, by name, size, date and inode in one text."""
        path = _key(folder)
        blobs: list[Any] = [self._new_folders[path][3]] if path in self._new_folders else []
        query = "SELECT files FROM folders WHERE path = ?"
        for blob in blobs or [row[0] for row in self._read(query, path)]:
            fields = os.fsdecode(blob).split("/")
            return {
                "/".join(fields[i : i + _LISTED]): fields[i + _LISTED]
                for i in range(0, len(fields) - _LISTED, _HASHED)
            }
        return {}

    def keep_folder(
        self, folder: Path, files: Iterable[str], stamp: bytes = b"", digest: str = ""
    ) -> None:
        """Remember a folder's files; without a stamp, that they are not hashed to the end."""
        path = _key(folder)
        self._known_folders()[path] = (stamp, digest)
        self._new_folders[path] = (path, stamp, digest, os.fsencode("".join(files)))

    def save(self) -> None:
        """Write down what was learned."""
        self.saved = time.monotonic()
        if not (self._new_files or self._new_folders) or not self.path.parent.is_dir():
            return
        try:
            self._write()
        except sqlite3.OperationalError:
            return  # read-only, full, or in use by another run: try again with the next save
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)  # damaged: begin a new one
            with contextlib.suppress(sqlite3.Error):
                self._write()

    def _write(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(_SCHEMA)
            with connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", self._new_files.values()
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO folders VALUES (?, ?, ?, ?)",
                    self._new_folders.values(),
                )
        self._new_files.clear()
        self._new_folders.clear()

    def _known_files(self) -> dict[str, tuple[Stamp, str]]:
        if self._files is None:
            rows = self._read("SELECT path, size, mtime, inode, sha256 FROM files")
            self._files = {path: ((size, mtime, inode), h) for path, size, mtime, inode, h in rows}
        return self._files

    def _known_folders(self) -> dict[str, tuple[bytes, str]]:
        if self._folders is None:
            rows = self._read("SELECT path, stamp, digest FROM folders")
            self._folders = {path: (stamp, digest) for path, stamp, digest in rows}
        return self._folders

    def _read(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        if not self.path.is_file():
            return []
        try:
            with contextlib.closing(sqlite3.connect(self.path)) as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.Error:
            return []  # damaged or in use: all is hashed again


def identify(
    split: Folders | Files,
    cache: HashCache,
    kind: Kind = "content",
    progress: Progress | None = None,
) -> Identity:
    """What a split of a dataset is, by names and contents of its files.

    Where it lies, and when its files were written, does not matter. What was hashed is written down
    every few seconds, so that an interrupted run goes on where it was.

    Args:
        split: Which files it consists of.
        cache: Hashes that are known.
        kind: "content" hashes every file once; "fingerprint" trusts that files of the same names
            and sizes are the same, but for a sample.
        progress: Is told how many files of how many are hashed.

    Raises:
        DataError: A file cannot be read, or the folders are arranged otherwise.
    """
    try:
        if isinstance(split, Files):
            return _identify_files(split, cache, kind, progress or _silent)
        if kind == "fingerprint":
            return _sample_folders(split, cache)
        return _hash_folders(split, cache, progress or _silent)
    except OSError as error:
        raise DataError(
            f"{error.filename or split.root} cannot be read ({error.strerror or error}): check "
            "that it is still there and readable"
        ) from error
    finally:
        cache.save()


def _silent(done: int, total: int) -> None:
    """Nobody asked."""


def _key(path: Path | RemotePath) -> str:
    """A path as it is remembered; SQLite takes no name that is not UTF-8."""
    return printable(str(path.absolute()))


def _stamp(file: Path | RemotePath) -> Stamp:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _identify_files(split: Files, cache: HashCache, kind: Kind, progress: Progress) -> Identity:
    """Hash files as a whole; or, for a fingerprint, pieces of them."""
    rows = []
    for done, name in enumerate(split.names):
        file = split.root / name
        if kind == "fingerprint":
            found = _hash_pieces(file)
        else:
            if cache.known(file) is None:
                progress(done, len(split.names))
            found = cache.hash(file)
            if time.monotonic() - cache.saved > KEEP_SECONDS:
                cache.save()
        rows.append((name, found))
    return Identity(digest_of([kind, rows]), len(rows), kind)


def _hash_folders(split: Folders, cache: HashCache, progress: Progress) -> Identity:
    """Hash what is not known; the rest is told apart by names, sizes, dates and inodes alone."""
    rows: list[list[Any]] = []
    unknown: list[tuple[int, str]] = []
    for name, listed, count in _listed(split):
        stamp = hashlib.sha256(os.fsencode(listed)).digest()
        digest = cache.folder_digest(split.root / name, stamp)
        if digest is None:
            unknown.append((len(rows), listed))
        rows.append([name, count, digest])
    total = sum(rows[place][1] for place, _ in unknown)
    done = 0
    for place, listed in unknown:
        name, count, _ = rows[place]
        ticks = _Ticks(progress, done, total)
        rows[place][2] = _hash_folder(split.root / name, listed, cache, ticks)
        done += count
    return Identity(digest_of(["content", rows]), sum(count for _, count, _ in rows), "content")


@dataclass
class _Ticks:
    """Tells how far the hashing is."""

    progress: Progress
    done: int
    total: int

    def __call__(self) -> None:
        self.progress(self.done, self.total)
        self.done += 1


def _hash_folder(folder: Path, listed: str, cache: HashCache, tick: Callable[[], None]) -> str:
    """Digest of names and contents of a folder's files; keeps their hashes, come what may."""
    known = cache.folder_files(folder)
    before = [f"{stamp}/{found}/" for stamp, found in known.items()]
    kept: list[str] = []
    contents: list[str] = []
    try:
        for name, stamp in _files_of(listed):
            found = known.get(stamp) or file_hash(folder / name)
            kept.append(f"{stamp}/{found}/")
            contents.append(f"{name}/{found}/")
            tick()
            if time.monotonic() - cache.saved > KEEP_SECONDS:
                cache.keep_folder(folder, [*kept, *before])
                cache.save()
    except BaseException:
        cache.keep_folder(folder, [*kept, *before])
        raise
    digest = hashlib.sha256(os.fsencode("".join(contents))).hexdigest()
    cache.keep_folder(folder, kept, hashlib.sha256(os.fsencode(listed)).digest(), digest)
    return digest


def _sample_folders(split: Folders, cache: HashCache) -> Identity:
    """Names and sizes of all files, and the content of some of each folder, always the same."""
    folders = list(_listed(split))
    each = max(1, SAMPLED // len(folders))
    rows: list[Any] = []
    for name, listed, count in folders:
        names = [file for file, _ in _files_of(listed)]
        sizes = listed.split("/")[1::_LISTED]
        chosen = random.Random(os.fsencode(name)).sample(names, min(each, count))
        contents = [(file, cache.hash(split.root / name / file)) for file in sorted(chosen)]
        rows.append((name, count, digest_of([names, sizes]), contents))
    return Identity(digest_of(["fingerprint", rows]), sum(row[1] for row in rows), "fingerprint")


def _listed(split: Folders) -> Iterator[tuple[str, str, int]]:
    """Every folder with images: its name, its files in one text (see `_LISTED`), their number."""
    for name, files in split.images():
        fields = []
        for file in files:
            stat = file.stat()
            fields.append(f"{file.name}/{stat.st_size}/{stat.st_mtime_ns}/{stat.st_ino}/")
        yield name, "".join(fields), len(files)


def _files_of(listed: str) -> Iterator[tuple[str, str]]:
    """Name of each file, and its name, size, date and inode in one text."""
    fields = listed.split("/")
    for i in range(0, len(fields) - 1, _LISTED):
        yield fields[i], "/".join(fields[i : i + _LISTED])


def _hash_pieces(file: Path | RemotePath) -> str:
    """Hash of the size and of pieces of a file, always the same ones: all of a small file."""
    size = file.stat().st_size
    last = max(0, size - PIECE_BYTES)
    places = {0, last, *random.Random(size).sample(range(last + 1), min(PIECES, last + 1))}
    if size <= PIECES * PIECE_BYTES:
        places = set(range(0, size, PIECE_BYTES))
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for place in sorted(places):
            stream.seek(place)
            found.update(stream.read(PIECE_BYTES))
    return found.hexdigest()
