"""Objects of a store: written once, read with their hash, and never waited for without end.

Every answer of a driver is doubted. What it raises becomes a `StoreError` without secrets, what
it does not answer in time too, and what it hands out is held against its size and SHA-256.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core.address import SFTP, Address
from pipeline.core.errors import ArtifactError, DamagedError, StoreError
from pipeline.core.files import open_regular
from pipeline.core.remote import LateError, in_time

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

PIECE = 4 * 2**20
"""Bytes that are moved at once; each such piece has to be answered in time."""

LIMIT_S = 60.0
"""How long a store may take for an answer, in seconds."""

_IN_PLACE = ("file", "sftp")
"""Schemes whose files are seen while they are written: these are written aside, and moved."""

_ASIDE = ".new-"


@dataclass(frozen=True)
class Listed:
    """A file of a store: its size in bytes, and when it was written, in seconds since 1970."""

    size: int
    written: float


class Objects:
    """The files of a store.

    Args:
        address: Where it lies.
        limit_s: How long it may take for an answer.
        opened: File system and root, where they are known already.
    """

    def __init__(
        self,
        address: Address,
        limit_s: float = LIMIT_S,
        opened: tuple[AbstractFileSystem, str] | None = None,
    ) -> None:
        self.address, self.limit_s = address, limit_s
        self.files, root = opened or self._within(address.open)
        self.root = root.rstrip("/")
        self.damaged: set[str] = set()
        """Objects that were found damaged: written again, although something lies there."""

    def reach(self) -> None:
        """See that the store answers; one that is not there yet, with nothing, counts.

        Raises:
            StoreError: It does not.
        """
        self._ask("be reached", lambda: self.files.exists(self.root))

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is none."""
        try:
            found = self._ask("be read", lambda: self.files.info(self._path(name)))
        except FileNotFoundError:
            return None
        size = found.get("size")
        return size if isinstance(size, int) else None

    def read(self, name: str, most: int) -> bytes | None:
        """A small file as it lies there; None if there is none.

        Raises:
            DamagedError: It is larger than `most` bytes.
            StoreError: The store does not answer.
        """
        try:
            stream = self._ask("be read", lambda: self.files.open(self._path(name), "rb"))
            data: bytes = self._ask("be read", lambda: stream.read(most + 1))
            self._ask("be read", stream.close)
        except FileNotFoundError:
            return None
        if len(data) > most:
            raise DamagedError(f"{self._shown(name)} is larger than {most / 1e6:g} MB")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; see `_put`."""
        self._put(name, iter([data]), len(data))

    def fetch(self, sha256: str, size: int, destination: Path) -> None:
        """Copy an object into a new file, if it is what its name says.

        Raises:
            DamagedError: It is missing, or something else.
            StoreError: The store does not answer.
            OSError: The file cannot be written.
        """
        name = object_name(sha256)
        digest, left = hashlib.sha256(), size
        with destination.open("xb") as target:
            for piece in self.pieces(name, size + 1):
                left -= len(piece)
                digest.update(piece)
                target.write(piece)
        if left or digest.hexdigest() != sha256:
            self.damaged.add(sha256)
            raise DamagedError(f"{self._shown(name)} is damaged")

    def give(self, sha256: str, size: int, source: Path, *, anew: bool = False) -> None:
        """Put a file into the store, unless it lies there.

        Args:
            sha256: Its hash.
            size: Its size in bytes.
            source: The file.
            anew: Write it even if a file of this name and size lies there.

        Raises:
            ArtifactError: The file is another one by now.
            StoreError: The store does not take it.
        """
        name = object_name(sha256)
        if not anew and sha256 not in self.damaged and self.size(name) == size:
            return
        digest = hashlib.sha256()

        def pieces() -> Iterator[bytes]:
            with open_regular(source) as stream:
                while piece := stream.read(PIECE):
                    digest.update(piece)
                    yield piece
            if digest.hexdigest() != sha256:
                raise ArtifactError(f"{source} has changed since it was written")

        self._put(name, pieces(), size)
        self.damaged.discard(sha256)

    def listed(self, folder: str) -> dict[str, Listed]:
        """All files below a folder of the store, by name."""
        try:
            found = self._ask("be listed", lambda: self.files.find(self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        prefix = f"{self.root.lstrip('/')}/"
        return {
            path.lstrip("/").removeprefix(prefix): Listed(int(info.get("size") or 0), _date(info))
            for path, info in found.items()
        }

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already counts as removed."""
        try:
            self._ask("remove a file", lambda: self.files.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def now(self) -> float:
        """The store's own time, in seconds since 1970: this machine's clock may differ.

        Raises:
            StoreError: The store cannot be written.
        """
        name = f"{_ASIDE}{uuid.uuid4().hex}"
        self.write(name, b"what time is it")
        try:
            info = self._ask("be read", lambda: self.files.info(self._path(name)))
        except FileNotFoundError:
            raise StoreError(f"the store {self.address.shown} loses what is written") from None
        finally:
            self.remove(name)
        return _date(info)

    def _put(self, name: str, pieces: Iterator[bytes], size: int) -> None:
        """Write a file, aside where it could be seen half written, and see that all arrived."""
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        aside = self.address.scheme in _IN_PLACE
        written = f"{folder}/{_ASIDE}{last[:8]}-{uuid.uuid4().hex}" if aside else path
        try:
            self._ask("be written", lambda: self.files.makedirs(folder, exist_ok=True))
            stream = self._ask("be written", lambda: self.files.open(written, "wb"))
            for piece in pieces:
                self._ask("be written", partial(stream.write, piece))
            self._ask("be written", stream.close)
            found = self._ask("be read", lambda: self.files.info(written))
            if found.get("size") != size:
                raise StoreError(f"{self._shown(name)} did not arrive whole")
            if aside:
                self._ask("be written", lambda: self.files.mv(written, path))
        except FileNotFoundError:
            raise StoreError(f"the store {self.address.shown} loses what is written") from None
        except ArtifactError:
            self._ask("be written", stream.close)
            self._ask("remove a file", lambda: self.files.rm_file(written))
            raise

    def pieces(self, name: str, most: int = 2**63) -> Iterator[bytes]:
        """Content of a file, no more than so many bytes of it.

        Raises:
            DamagedError: There is no such file.
            StoreError: The store does not answer.
        """
        try:
            stream = self._ask("be read", lambda: self.files.open(self._path(name), "rb"))
        except FileNotFoundError:
            raise DamagedError(f"{self._shown(name)} is missing") from None
        left = most
        while left:
            piece = self._ask("be read", partial(stream.read, min(PIECE, left)))
            if not piece:
                break
            yield piece
            left -= len(piece)
        self._ask("be read", stream.close)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _shown(self, name: str) -> str:
        return f"{self.address.shown}/{name}"

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        """Let the driver do something.

        Raises:
            FileNotFoundError: There is no such file.
            StoreError: Whatever else went wrong.
        """

        def asked() -> Any:
            if self.address.scheme == SFTP:  # hours may lie between two questions
                self.files, _ = self.address.open()
            return call()

        try:
            return self._within(asked)
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            # Drivers raise anything, and quote what they were told: only clean text leaves here.
            raise StoreError(
                f"the store {self.address.shown} cannot {what}: {self.address.clean(error)}"
            ) from None

    def _within(self, call: Callable[[], T]) -> T:
        """What a call returns, or raises, if it does so in time."""
        try:
            return in_time(call, self.limit_s)
        except LateError:
            raise StoreError(
                f"the store {self.address.shown} does not answer within {self.limit_s:g} s"
            ) from None


def object_name(sha256: str) -> str:
    """Where an object lies in a store."""
    return f"objects/{sha256[:2]}/{sha256}"


def _date(info: Any) -> float:
    """When a file was written; drivers call it differently. 0 where none is told."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            return datetime.datetime.fromisoformat(value).timestamp()
    return 0.0
