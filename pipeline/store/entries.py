"""What a store knows of steps: by key, the manifest of the artifact that the step makes.

    steps/linux-x86_64/0a/0a1b….json    an artifact's manifest, under its seal
    objects/9f/9f86d081…                a file of an artifact, under its SHA-256

Objects are written before the manifest that names them. Nothing is ever changed: what is whole
stays, what is damaged may be written anew. Machines of another system or processor have entries of
their own: engines and packages are not theirs.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import ArtifactError, DamagedError
from pipeline.core.files import read_regular
from pipeline.steps.artifact import MANIFEST, MOST_BYTES, Artifact
from pipeline.store.objects import Objects

STEPS = "steps"
ENDING = ".json"


def entry_name(key: str) -> str:
    """Where the manifest of a step's artifact lies, for machines like this one."""
    return f"{STEPS}/{sys.platform}-{platform.machine().lower()}/{key[:2]}/{key}{ENDING}"


class Entries:
    """The artifacts in a store.

    Args:
        objects: The store's files.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.broken: set[str] = set()
        """Keys of artifacts that could not be taken: given anew, although an entry is there."""

    def find(self, key: str) -> Artifact | None:
        """The artifact of a step, as its manifest tells; None if the store has none.

        Raises:
            DamagedError: What lies there is no such manifest.
            StoreError: The store does not answer.
        """
        return self.read(entry_name(key))

    def read(self, name: str) -> Artifact | None:
        """The artifact of an entry; see `find`."""
        data = self.objects.read(name, MOST_BYTES)
        if data is None:
            return None
        where = Path(f"{self.objects.address.scheme}-store", name)
        key = PurePosixPath(name).name.removesuffix(ENDING)
        try:
            found = Artifact.parse(data, where)
            found.require_seal()
            if found.key != key:
                raise ArtifactError(f"{where} is of another step")
        except ArtifactError:
            self.broken.add(key)
            raise DamagedError(f"{self.objects.address.shown}/{name} is damaged") from None
        return found

    def fetch(self, entry: Artifact, folder: Path) -> Mapping[str, Any]:
        """Copy an artifact's files into a folder, each as its hash says.

        Returns:
            The artifact's facts.

        Raises:
            DamagedError: A file is missing or damaged.
            StoreError: The store does not answer.
        """
        try:
            for name, record in entry.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.objects.fetch(record.sha256, record.size, path)
        except DamagedError:
            self.broken.add(entry.key)
            raise
        return entry.facts

    def give(self, artifact: Artifact) -> bool:
        """Put an artifact into the store; whether it was not there yet.

        Raises:
            ArtifactError: The artifact is damaged.
            StoreError: The store does not take it.
        """
        artifact.verify()
        if artifact.key not in self.broken and self._holds(artifact.key):
            return False
        # Beside what was found damaged may lie more that was not looked at.
        anew = artifact.key in self.broken
        for name, record in artifact.files.items():
            self.objects.give(record.sha256, record.size, artifact.path(name), anew=anew)
        manifest = read_regular(artifact.folder / MANIFEST, MOST_BYTES)
        self.objects.write(entry_name(artifact.key), manifest)
        self.broken.discard(artifact.key)
        return True

    def _holds(self, key: str) -> bool:
        """Whether a step has an entry that is whole."""
        try:
            return self.find(key) is not None
        except DamagedError:
            return False

    def names(self) -> Iterator[str]:
        """Names of all entries, for every kind of machine."""
        return (name for name in self.objects.listed(STEPS) if name.endswith(ENDING))
