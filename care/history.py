"""The checkpoints that a run goes on from: the newest, some before it, each sealed.

    last.pt             the newest
    step-00008340.pt    those before it, by the number of steps taken

A seal is the SHA-256 of all that a file holds, in the comment that the zip format has at its end.
torch.load reads a file with flipped bits without a word; here every byte counts, and a file that
does not pass is left aside for the one before it. A file without a seal is taken if the checksums
of its records hold.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from care import checkpoint
from pipeline.core.checkpoints import METADATA_KEY
from pipeline.core.errors import CheckpointError

_MARK = b"sha256:"
_LENGTH = len(_MARK) + 64
_END = b"PK\x05\x06"
"""Begins the last record of a zip file, 22 bytes; its last two are the length of the comment."""

_OLDER = re.compile(r"step-(\d{8,})\.pt")


class History:
    """The checkpoints of a run.

    Args:
        folder: Of the run.
        keep: How many checkpoints stay.

    Attributes:
        last: The newest.
        step: Steps taken where `last` was saved; None if it is not there or damaged.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.last = folder / "last.pt"
        self.step: int | None = None

    def older(self) -> list[Path]:
        """The checkpoints before the newest, the latest first."""
        return sorted((p for p in self.folder.glob("step-*.pt") if _number(p)), reverse=True)

    def read(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Args:
            say: Tells the user of each one that is damaged.

        Raises:
            CheckpointError: There are some, but none is whole.
        """
        problems: list[str] = []
        for path in (self.last, *self.older()):
            if not path.exists():
                continue
            try:
                verify(path)
                state = checkpoint.read_all(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                say(f"warning: {problem}; going on from {path.name}, saved before it")
            if path == self.last:
                self.step = int(state["steps"])
            return state
        if problems:
            raise CheckpointError(
                f"{problems[0]}; no other checkpoint of the run is whole: start anew with "
                "--overwrite, or another --name"
            )
        return None

    def save(self, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Write the newest checkpoint, whole or not at all; the one before it stays beside it.

        Args:
            state: What `care.learner.Learner.state` gives, with `steps`.
            metadata: What the checkpoint says about itself.

        Raises:
            CheckpointError: It cannot be written, such as on a full disk; all that was there stays.
        """
        steps = int(state["steps"])
        temporary = self.folder / f".last.pt.{os.getpid()}.tmp"
        try:
            write_sealed(temporary, {**state, METADATA_KEY: dict(metadata)})
            if self.step is not None and self.step != steps and self.keep > 1:
                self.last.replace(self.folder / f"step-{self.step:08d}.pt")
            temporary.replace(self.last)
        except OSError as error:
            raise CheckpointError(_why_not_saved(self.last, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.step = steps
        for path in self.older()[self.keep - 1 :]:
            path.unlink()

    def clear(self) -> None:
        """Remove all checkpoints."""
        for path in (self.last, *self.older()):
            path.unlink(missing_ok=True)
        self.step = None


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of torch.save with a seal, flushed to the disk.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(dict(content), cast(BinaryIO, hashing))
        except RuntimeError as error:  # torch hides what the file said behind one of its own
            raise hashing.error or OSError(errno.EIO, str(error).splitlines()[0]) from error
        end = hashing.held
        if end[:4] != _END or end[-2:] != b"\0\0":
            raise OSError(errno.EIO, "torch.save did not end its file as zip files end")
        hashing.digest.update(end)
        seal = _MARK + hashing.digest.hexdigest().encode()
        file.write(end[:-2] + struct.pack("<H", _LENGTH) + seal)
        file.flush()
        os.fsync(file.fileno())


def verify(path: Path) -> None:
    """Check the seal of a checkpoint.

    Raises:
        CheckpointError: A byte is not what was written.
    """
    try:
        length = path.stat().st_size - _LENGTH
        with path.open("rb") as file:
            file.seek(max(length, 0))
            seal = file.read()
            file.seek(0)
            digest = hashlib.sha256()
            left = length - 2
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
            stated = file.read(2)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if _is_unsealed(seal) and _records_hold(path):
        return
    digest.update(b"\0\0")
    whole = seal == _MARK + digest.hexdigest().encode()
    if not whole or stated != struct.pack("<H", _LENGTH):
        raise CheckpointError(f"{path} is damaged: bytes are missing, or not what was written")


def _is_unsealed(end: bytes) -> bool:
    """Whether a file ends as torch.save leaves it; no single flipped bit makes a seal look so."""
    return end[-22:-18] == _END and end[-2:] == b"\0\0"


def _records_hold(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        return False


class _Hashing:
    """A file that hashes what is written, and holds back the last record of a zip file.

    Args:
        file: Where it goes.

    Attributes:
        digest: Of all that went there.
        held: The last 22 bytes, not yet written.
        error: Why the file took no more.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.held = b""
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Take bytes."""
        view = memoryview(data).cast("B")
        if len(view) < 22:
            self._pass(self.held + bytes(view), 22)
        else:
            self._pass(self.held, 0)
            self._pass(view, 22)
        return len(view)

    def flush(self) -> None:
        """Hand on what the file holds back itself."""
        self.file.flush()

    def _pass(self, data: bytes | memoryview, keep: int) -> None:
        """Write all but the last bytes, which are kept."""
        split = max(len(data) - keep, 0)
        self.held = bytes(data[split:])
        try:
            self.file.write(data[:split])
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data[:split])


def _why_not_saved(path: Path, error: OSError) -> str:
    free = shutil.disk_usage(path.parent).free
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = f"the disk is full, {free / 1e6:.0f} MB are free" if full else error.strerror or error
    return f"{path} cannot be written: {what}; the checkpoint before it is still there"


def _number(path: Path) -> int:
    found = _OLDER.fullmatch(path.name)
    return int(found[1]) if found else 0
