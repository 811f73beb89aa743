"""Files that a user names: regular ones, of a size that makes sense, and errors that say what is.

A pipe has no end to wait for, and `/dev/zero` has none at all.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.core.errors import DataError, InputError
from pipeline.core.words import shown

if TYPE_CHECKING:
    import numpy.typing as npt

_PIECE = 1 << 24
_LONGEST_NAME = 255
_LONGEST_PATH = 4096
_SYSTEM = {"/proc", "/sys", "/dev"}
"""Where Linux shows itself as files: nobody's results belong there."""
_IN_MEMORY = "/dev/shm"


def read_input(path: Path, most: int, kind: type[InputError], advice: str) -> bytes:
    """Read a whole file.

    Args:
        path: The file.
        most: Largest size in bytes that such a file may have.
        kind: The error to raise.
        advice: What to do instead, such as "name a configuration file".

    Raises:
        InputError: Of that kind: the file is missing, a folder, a device or a pipe, larger than
            that, or cannot be read.
    """
    if problem := why_no_path(str(path)):
        raise kind(f"{shown(path)} {problem}: {advice}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise kind(f"{path} is a folder: {advice}")
        if not stat.S_ISREG(mode):
            raise kind(f"{path} is a device or a pipe, not a file: {advice}")
        with path.open("rb") as stream:
            data = read_at_most(stream, most + 1)
    except FileNotFoundError as error:
        raise kind(f"{path} does not exist: {advice}") from error
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror or error}: {advice}") from error
    if len(data) > most:
        raise kind(f"{path} is larger than {most / 1e6:g} MB: {advice}")
    return data


def read_array(path: Path, most: int, what: str) -> npt.NDArray[Any]:
    """Read the array of a .npy file; no object is unpickled.

    Args:
        path: The file.
        most: Largest size in bytes that such a file may have.
        what: What it should be, such as "array that can be read".

    Raises:
        DataError: It is missing, too large, or holds no such array.
    """
    import numpy as np

    data = read_input(path, most, DataError, "name a .npy file")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no {what}: {shown(error)}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is no {what}: it holds several")
    return array


def read_at_most(stream: IO[bytes], most: int) -> bytes:
    """Read a stream to its end, or to a number of bytes.

    In pieces, as `stream.read(most)` would ask for the memory of all of them beforehand.
    """
    pieces: list[bytes] = []
    while most > 0 and (piece := stream.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def decode_text(data: bytes, path: object, kind: type[InputError]) -> str:
    """A file's content as text.

    Raises:
        InputError: Of that kind: it is not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise kind(f"cannot read {path}:{line}: it is not UTF-8 text: save it as UTF-8") from error


def why_no_path(text: str) -> str | None:
    """What keeps a text from being a path, as far as the text alone tells; None if nothing does."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "has characters that no file name can have"
    if not encoded or b"\0" in encoded:
        return "is no path"
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > _LONGEST_NAME:
        return f"has a name of {longest} bytes, and names end at {_LONGEST_NAME}"
    if len(encoded) >= _LONGEST_PATH:
        return f"has {len(encoded)} bytes, and paths end at {_LONGEST_PATH}"
    return None


def why_no_output(folder: Path) -> str | None:
    """What keeps a folder from being made or filled; None if nothing does.

    Whether it may be written is seen when it is.
    """
    if problem := why_no_path(str(folder)):
        return problem
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if str(place) in _SYSTEM and not real.is_relative_to(_IN_MEMORY):
            return f"lies in {place}, which holds no files of users"
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not place.is_dir():
            return f"cannot be a folder: {place} is none"
    return None


def expanded(text: str) -> str:
    """A path with `~` and `~user` replaced by the home folder, where there is one."""
    return os.path.expanduser(text)  # noqa: PTH111  Path's raises where there is no such user
