"""Files at addresses of fsspec, read in place: what of a path readers of data need.

    file = located("s3://bucket/val-000.tar")   # a `RemotePath`; of "/data/val.tar" a `Path`
    with file.open("rb") as stream: ...
    file.part(1024, 512)                        # bytes in the middle, by one request

Keys and passwords come from the environment or the driver's own settings: an address that holds any
is refused, so that addresses may stand in logs and artifacts. What drivers raise becomes a
`DataError`, and none is waited for without end.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.core.address import EXTRAS, Address, parse
from pipeline.core.errors import DataError, InputError
from pipeline.core.inputs import expanded

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

LIMIT_S = 60.0
"""How long a driver may take for an answer, in seconds."""

BLOCK = 4 * 2**20
"""Bytes that are read ahead: headers of a tar file lie closer than that, so that it is streamed."""

_STAMPS = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "created")
"""What drivers tell of a file that is another one once its content is."""


class LateError(Exception):
    """Nothing answered in time."""


@dataclass(frozen=True)
class RemoteStat:
    """What tells whether a file is as it was, named as `os.stat_result` does.

    Attributes:
        st_size: Bytes.
        st_mtime_ns: A number that stands for its version; another one at each look where the driver
            tells none.
        st_ino: 0.
    """

    st_size: int
    st_mtime_ns: int
    st_ino: int = 0


class RemotePath:
    """A file, or a folder, at an address.

    Args:
        address: Where it lies.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    @classmethod
    def at(cls, text: str) -> RemotePath:
        """The file of an address.

        Raises:
            DataError: It is none, or holds what is secret.
        """
        if problem := why_no_address(text):
            raise DataError(problem)
        return cls(parse(text))

    def __str__(self) -> str:
        return self.address.shown

    def __repr__(self) -> str:
        return f"RemotePath({self.address.shown!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.address.url == self.address.url

    def __hash__(self) -> int:
        return hash(self.address.url)

    @property
    def name(self) -> str:
        """Its last part."""
        return posixpath.basename(self._path)

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return RemotePath.at(posixpath.dirname(self.address.url))

    def with_name(self, name: str) -> RemotePath:
        """The file beside it."""
        return self.parent / name

    def __truediv__(self, name: str) -> RemotePath:
        return self if name == "." else RemotePath.at(f"{self.address.url.rstrip('/')}/{name}")

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def below(self, root: RemotePath) -> str:
        """Its path below a folder."""
        return posixpath.relpath(self._path, root._path)

    def is_file(self) -> bool:
        """Whether it is there.

        Raises:
            DataError: The driver is missing, or does not answer.
        """
        return bool(self._ask(lambda files, path: files.isfile(path)))

    def names(self) -> list[str]:
        """Names of what lies in the folder.

        Raises:
            DataError: It is not there, or the driver does not answer.
        """
        found = self._ask(lambda files, path: files.ls(path, detail=False))
        return [posixpath.basename(str(each).rstrip("/")) for each in found]

    def stat(self) -> RemoteStat:
        """Size, and what stands for the version.

        Raises:
            DataError: See `names`.
        """
        info = self._ask(lambda files, path: files.info(path))
        size = info.get("size")
        if not isinstance(size, int):
            raise DataError(f"{self} tells no size: pack it as a plain tar file")
        told = [str(info[key]) for key in _STAMPS if info.get(key)]
        digest = hashlib.sha256("\n".join(told).encode()).digest()
        version = int.from_bytes(digest[:7]) if told else time.time_ns()
        return RemoteStat(size, version)

    def open(self, mode: Literal["rb"]) -> io.BufferedReader:
        """Open it to read it, the more so from front to back.

        Raises:
            DataError: See `names`; later reads raise it, too.
        """
        opened = self._ask(
            lambda files, path: files.open(path, mode, block_size=BLOCK, cache_type="readahead")
        )
        return io.BufferedReader(_Stream(self, opened), 2**16)

    def part(self, offset: int, length: int) -> bytes:
        """Bytes from its middle; fewer where it ends.

        Raises:
            DataError: See `names`.
        """
        if not length:
            return b""
        found: bytes = self._ask(
            lambda files, path: files.cat_file(path, start=offset, end=offset + length)
        )
        return found

    @property
    def _path(self) -> str:
        return self.address.url.partition("://")[2].rstrip("/")

    def _ask(self, call: Callable[[AbstractFileSystem, str], Any]) -> Any:
        def asked() -> Any:
            return call(*self.address.open("the data at", DataError))

        return self.answer(asked)

    def answer(self, call: Callable[[], T]) -> T:
        """What a call of the driver gives.

        Raises:
            DataError: Whatever went wrong.
        """
        try:
            return in_time(call, LIMIT_S)
        except DataError:
            raise
        except LateError:
            raise DataError(f"{self} does not answer within {LIMIT_S:g} s") from None
        except FileNotFoundError:
            raise DataError(f"no file at {self}: check the address") from None
        except Exception as error:
            # Drivers raise anything, and quote what they were told: only clean text leaves here.
            raise DataError(
                f"{self} cannot be read: {self.address.clean(error)}: see that it can be reached, "
                "and that the environment holds the keys"
            ) from None


class _Stream(io.RawIOBase):
    """A driver's file, whose errors are ours."""

    def __init__(self, path: RemotePath, opened: Any) -> None:
        self.path, self.opened = path, opened

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place: nothing is asked for that."""
        return int(self.opened.seek(offset, whence))

    def tell(self) -> int:
        """The place."""
        return int(self.opened.tell())

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as fit, or are there."""
        data = self.path.answer(lambda: self.opened.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close it."""
        if not self.closed:
            self.opened.close()
        super().close()


def is_address(text: str) -> bool:
    """Whether a text is an address rather than a path."""
    return "://" in text


def why_no_address(text: str) -> str | None:
    """Why data cannot be read at an address, if it cannot; shows nothing secret."""
    try:
        address = parse(text)
    except InputError:
        known = ", ".join(f"{scheme}://" for scheme in EXTRAS)
        return f"data is read at addresses of {known}: write one like s3://bucket/val.tar"
    if address.scheme == "file":
        return "data on this machine has a path: write it without file://"
    rest = text.partition("://")[2]
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user or "?" in rest:
        return (
            "an address of data holds no password and no query: let keys and options come from the "
            "environment, as the driver reads them (AWS_ACCESS_KEY_ID, FSSPEC_S3_ENDPOINT_URL)"
        )
    return None


def located(text: str) -> Path | RemotePath:
    """A path with the home folder for `~`, or the file of an address.

    Raises:
        DataError: The address is none, or holds what is secret.
    """
    return RemotePath.at(text) if is_address(text) else Path(expanded(text))


def common_folder(files: Sequence[RemotePath]) -> RemotePath:
    """The folder that holds several files, directly or not."""
    scheme = files[0].address.scheme
    return RemotePath.at(f"{scheme}://{posixpath.commonpath([f.parent._path for f in files])}")


def in_time(call: Callable[[], T], limit_s: float) -> T:
    """What a call returns, or raises, if it does so in time.

    Drivers have limits of their own, or none. A call that is late goes on in a thread that ends
    with the program; nobody looks at what it says then.

    Raises:
        LateError: It did not.
    """
    import queue  # here: all paths are looked at by this module, and few are remote

    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answers.get(timeout=limit_s)
    except queue.Empty:
        raise LateError from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None only where the call returns it
