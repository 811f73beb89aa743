"""Which seals a results' folder states of its artifacts: in results.json, and of what came since.

results.json states the seal of every artifact that a run left. What is made after that, by a run
that is killed, by `bench --import` or by `calibrate`, is announced in `.unreported.json` before it
is moved into place, and counts as well until the next report. What has another seal than both is
not what was made here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_regular, write_atomically
from pipeline.core.plain import parse_json
from pipeline.core.seals import sealed, unsealed
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import ANNOUNCING, RESULTS_FILE, UNREPORTED, artifact_folders

MOST_BYTES = 256_000_000
"""Largest results.json that is read."""

SEALS = "seals"
_MADE_SINCE = "made_since"


class Stated:
    """What a results' folder states of its artifacts, read once.

    Args:
        folder: The results' folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def reported(self) -> Mapping[str, str]:
        """Seals that results.json states, by name; none where it is missing or damaged."""
        try:
            values = read_results(self.folder / RESULTS_FILE)
        except ArtifactError:
            return {}
        return _seals(values.get(SEALS))

    @functools.cached_property
    def made_since(self) -> dict[str, list[str]]:
        """Seals of what was made since, by name."""
        path = self.folder / UNREPORTED
        try:
            values, seal = unsealed(read_regular(path, MOST_BYTES), str(path))
        except (ArtifactError, OSError):
            return {}
        found = values.get(_MADE_SINCE)
        if not seal or not isinstance(found, dict):
            return {}
        lists = {name: seals for name, seals in found.items() if isinstance(seals, list)}
        return {name: [s for s in seals if isinstance(s, str)] for name, seals in lists.items()}

    @functools.cached_property
    def by_others(self) -> Mapping[str, set[str]]:
        """Seals that artifacts state of what they were made from, by name."""
        found: dict[str, set[str]] = {}
        for _, place in artifact_folders(self.folder):
            with contextlib.suppress(ArtifactError):
                for name, seal in Artifact.read(place).seals.items():
                    found.setdefault(name, set()).add(seal)
        return found

    def of(self, name: str) -> set[str]:
        """Seals that an artifact may have; none if nothing states one.

        Without a report, which knows of every artifact, those count that others were made from.
        """
        since = set(self.made_since.get(name, ()))
        if name in self.reported:
            return {self.reported[name], *since}
        return since or (set() if self.reported else self.by_others.get(name, set()))

    def allows(self, name: str, seal: str) -> bool:
        """Whether nothing states that an artifact has other seals."""
        stated = self.of(name)
        return not stated or seal in stated

    def require(self, name: str, seal: str) -> None:
        """Refuse an artifact of which other seals are stated than it has.

        Raises:
            ArtifactError: It was changed since.
        """
        if not self.allows(name, seal):
            raise ArtifactError(
                f"{self.folder / name} is not what {RESULTS_FILE}, or what was made from it, tells "
                "of: run python -m pipeline run again"
            )

    def announce(self, name: str, seal: str) -> None:
        """State the seal of what will be moved into its place.

        Raises:
            ArtifactError: The folder cannot be written.
        """
        with filelock.FileLock(self.folder / ANNOUNCING):
            self.forget()  # another process of the run may have announced something meanwhile
            self.made_since.setdefault(name, []).append(seal)
            text = sealed({_MADE_SINCE: self.made_since})
            write_atomically(self.folder / UNREPORTED, text, is_unreported)

    def forget(self) -> None:
        """Read anew what was made since, when somebody next asks."""
        self.__dict__.pop("made_since", None)

    def is_reported(self) -> None:
        """Forget what was announced: results.json states it by now."""
        path = self.folder / UNREPORTED
        if os.path.lexists(path) and is_unreported(path):
            path.unlink()


def read_results(path: Path) -> dict[str, Any]:
    """Values of results.json, which fit their seal.

    Raises:
        ArtifactError: It is not there, damaged, or has no seal.
    """
    try:
        values, seal = unsealed_results(read_regular(path, MOST_BYTES), str(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if not seal:
        raise ArtifactError(f"{path} has no seal: made by an older version, or damaged")
    return values


@functools.lru_cache(maxsize=1)
def unsealed_results(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """Values of results.json and their seal, see `pipeline.core.seals.unsealed`.

    A run asks three times, of the same bytes where nothing is to be done. Nobody changes the
    values, so that those who ask may share them.

    Args:
        data: Content of the file.
        where: Its path, for messages.

    Raises:
        ArtifactError: It does not fit its seal, or is no JSON object.
    """
    return unsealed(data, where)


def is_unreported(path: Path) -> bool:
    """Whether a file is one that `Stated.announce` wrote."""
    try:
        values = parse_json(read_regular(path, MOST_BYTES), str(path))
    except (ArtifactError, OSError):
        return False
    return isinstance(values, dict) and _MADE_SINCE in values


def _seals(values: Any) -> dict[str, str]:
    if not isinstance(values, dict):
        return {}
    return {name: seal for name, seal in values.items() if isinstance(seal, str)}
