"""A teacher whose answers are kept: another run on the same images does not ask it again.

    cached = CachedTeacher(teacher, store, hard=True)
    cached.expect(step, part, batch.pixels)
    answers = cached(images)

What a teacher is shown is a function of the seed and of the number of a step, see `care.sampling`:
so students of one recipe, or one student trained again, meet the same answers. They lie in a file
for each epoch and process, in a folder named by everything that decides them. A record counts only
with its own checksum and that of the pixels that it is about.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.core.errors import ArtifactError, ConfigError
from pipeline.core.files import write_atomically

_CHECKS = 8
"""Bytes of the two checksums before a record's answers."""

_READABLE = "what.json"


class Store:
    """Records of one teacher, one recipe and one process, in files of an epoch each.

    Args:
        root: Folder of all caches.
        key: Everything that decides the answers, as plain values.
        records: Records of an epoch.
        answers: Bytes of a record's answers.
        most: Largest size of all that lies below `root`, in bytes; beyond it nothing is added.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(
        self, root: Path, key: Mapping[str, Any], *, records: int, answers: int, most: float
    ) -> None:
        text = json.dumps(dict(key), sort_keys=True)
        self.root, self.most = root, most
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.records, self.size = records, answers + _CHECKS
        self._opened: tuple[int, npt.NDArray[np.uint8] | None] = (-1, None)
        self._is_full_said = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / _READABLE, text)
        except (OSError, ArtifactError) as error:
            raise ConfigError(
                f"--teacher-cache: {self.folder} cannot be written ({error}): name another"
            ) from error

    def read(self, number: int, about: int) -> bytes | None:
        """A record's answers; None if they are not there, damaged or about something else.

        Args:
            number: Of the record, counted from the start of the run.
            about: Checksum of what it is about.
        """
        place = self._place(number, create=False)
        if place is None:
            return None
        answers = place[_CHECKS:].tobytes()
        return answers if place[:_CHECKS].tobytes() == _checks(about, answers) else None

    def write(self, number: int, about: int, answers: bytes) -> None:
        """Keep a record's answers, if there is room."""
        place = self._place(number, create=True)
        if place is not None:
            record = _checks(about, answers) + answers
            place[:] = np.frombuffer(record, dtype=np.uint8)

    def _place(self, number: int, *, create: bool) -> npt.NDArray[np.uint8] | None:
        epoch, row = divmod(number, self.records)
        known, rows = self._opened
        if known != epoch or (rows is None and create):
            rows = self._open(epoch, create=create)
            self._opened = epoch, rows
        return None if rows is None else rows[row]

    def _open(self, epoch: int, *, create: bool) -> npt.NDArray[np.uint8] | None:
        """The records of an epoch, mapped; None if they are not there, or no room is."""
        path = self.folder / f"epoch-{epoch:04}.bin"
        shape = (self.records, self.size)
        if path.is_file() and path.stat().st_size == self.records * self.size:
            return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
        if not create or not self._has_room() or not _reserve(path, self.records * self.size):
            return None
        return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)

    def _has_room(self) -> bool:
        taken = sum(path.stat().st_size for path in self.root.glob("*/epoch-*.bin"))
        if taken + self.records * self.size <= self.most:
            return True
        if not self._is_full_said:
            self._is_full_said = True
            click.echo(
                f"warning: {self.root} holds {taken / 1e9:.1f} of {self.most / 1e9:g} GB: further "
                "answers of the teacher are not kept; see --teacher-cache-gb",
                err=True,
            )
        return False


class CachedTeacher(nn.Module):
    """A teacher that is asked only for what nobody asked it before.

    Args:
        teacher: Images to logits, see `care.losses.Teacher`.
        store: Keeps the answers.
        parts: Parts of a step.
        hard: Keep the top class alone: all that hard distillation takes, in 4 bytes an image.

    Attributes:
        asked: Batches that the teacher had to answer.
        known: Batches whose answers were there.
    """

    def __init__(self, teacher: nn.Module, store: Store, *, parts: int, hard: bool) -> None:
        super().__init__()
        self.teacher, self.store, self.parts, self.hard = teacher, store, parts, hard
        self.asked = self.known = 0
        self._number = self._about = 0

    def expect(self, step: int, part: int, pixels: Tensor) -> None:
        """Say which images come next.

        Args:
            step: Of the run.
            part: Of the step.
            pixels: Of the workers, uint8, on the CPU: before anything is mixed.
        """
        self._number = step * self.parts + part
        self._about = zlib.crc32(pixels.contiguous().numpy().data)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits, or the top classes (batch,) if these alone are kept."""
        kind = np.int32 if self.hard else np.float32
        stored = self.store.read(self._number, self._about)
        if stored is not None:
            self.known += 1
            values = torch.from_numpy(np.frombuffer(stored, dtype=kind).copy())
            answers = values.long() if self.hard else values.reshape(len(images), -1)
            return answers.to(images.device)
        self.asked += 1
        logits: Tensor = self.teacher(images)
        answers = logits.argmax(dim=1) if self.hard else logits
        self.store.write(self._number, self._about, answers.cpu().numpy().astype(kind).tobytes())
        return answers


def digest_of(network: nn.Module) -> str:
    """SHA-256 of a network's weights, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reserve(path: Path, size: int) -> bool:
    """Make a file of zeros that really has its room: a mapped one may not meet a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.write(bytes(size))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        click.echo(f"warning: {path} cannot be written ({error.strerror})", err=True)
        return False
    return True


def _checks(about: int, answers: bytes) -> bytes:
    """Both checksums; those of an empty record are others."""
    return about.to_bytes(4, "little") + zlib.crc32(answers).to_bytes(4, "little")
