"""Logits of a long validation, kept in shards as they are made: one that is killed goes on.

    .evaluations/validate-trt-fp16-0a1b2c3d4e5f6071/
      0.npy  1.npy  …   logits of a shard each, (images, classes)
      shards.json       their digests, and what the runner had noted of their images

A shard is a whole number of batches, so that every image is in the batch in which it is without
shards: the logits are the same to the bit. The folder's name holds the key of the step, and with it
all that decides them. It goes when the step's work is done, and is no part of the artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, write_atomically
from pipeline.core.network import Logits
from pipeline.core.plain import read_json
from pipeline.core.replacing import sweep
from pipeline.core.runner import Runner

STATE = "shards.json"
MARK = "shards of CARE Deploy"
_MOST_BYTES = 2**32


class Shards:
    """Logits that are kept.

    Args:
        folder: Where; None to keep nothing.
        images: Images of a shard.
        batch: Images of a batch: their number decides last bits, and is in no key.
    """

    def __init__(self, folder: Path | None, images: int, batch: int) -> None:
        self.folder, self.images, self.batch = folder, images, batch
        self.digests: list[str] = []

    def resume(self, runner: Runner) -> list[Logits]:
        """The shards that are there, in order; the runner takes up what was noted of them."""
        if self.folder is None:
            return []
        self._forget_others(self.folder)
        try:
            digests, noted = self._state(self.folder / STATE)
            found = [self._read(number, digest) for number, digest in enumerate(digests)]
            runner.go_on(self.images * len(found), noted)
        except (ArtifactError, OSError, LookupError, TypeError, ValueError, AttributeError):
            return []  # none yet, or damaged: all is computed again
        self.digests = digests
        return found

    def keep(self, logits: Logits, runner: Runner) -> None:
        """Keep the next shard; what cannot be kept costs time later, and is no reason to end now.

        Args:
            logits: Of its images, (images, classes).
            runner: What gave them.
        """
        if self.folder is None:
            return
        stream = io.BytesIO()
        np.save(stream, logits)
        digests = [*self.digests, hashlib.sha256(stream.getvalue()).hexdigest()]
        state = {"mark": MARK, "batch": self.batch, "shards": digests, "noted": runner.noted()}
        with contextlib.suppress(ArtifactError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{len(self.digests)}.npy", stream.getvalue())
            write_atomically(self.folder / STATE, json.dumps(state))
            self.digests = digests

    def _state(self, path: Path) -> tuple[list[str], Any]:
        values = read_json(path)
        if values["mark"] != MARK or values["batch"] != self.batch:
            raise ArtifactError(f"{path} is of other shards")
        return [str(digest) for digest in values["shards"]], values["noted"]

    def _read(self, number: int, digest: str) -> Logits:
        """Logits of a shard, if they are what was kept.

        Raises:
            ArtifactError: They are not.
        """
        assert self.folder is not None
        data = read_regular(self.folder / f"{number}.npy", _MOST_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArtifactError(f"shard {number} is damaged")
        logits: Logits = np.load(io.BytesIO(data))
        if len(logits) != self.images:
            raise ArtifactError(f"shard {number} has {len(logits)} images")
        return logits

    @staticmethod
    def _forget_others(folder: Path) -> None:
        """Remove shards of the same step with another key: nobody will ask for them."""
        step, _, _ = folder.name.rpartition("-")
        for other in kept_in(folder.parent):
            if other != folder and other.name.rpartition("-")[0] == step:
                remove(other)


def forget(folder: Path) -> None:
    """Remove what a step kept: its work is done."""
    remove(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def kept_in(evaluations: Path) -> list[Path]:
    """Folders of shards, of validations that did not end."""
    return [folder for folder in sorted(evaluations.glob("*")) if _is_ours(folder)]


def _is_ours(folder: Path) -> bool:
    return not folder.is_symlink() and os.path.lexists(folder / STATE)


def remove(folder: Path) -> None:
    """Remove a folder of shards; files of others in it stay, and so does the folder then."""
    if not _is_ours(folder):
        return
    with contextlib.suppress(OSError):
        sweep(folder)  # a kill may have left what was being written
        for path in folder.iterdir():
            if path.name == STATE or (path.suffix == ".npy" and path.stem.isdecimal()):
                path.unlink()
        folder.rmdir()


def size_of(stated: int, batch: int) -> int:
    """Images of a shard: at least so many as stated, and a whole number of batches."""
    return -(-stated // batch) * batch
