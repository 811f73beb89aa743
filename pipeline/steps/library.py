"""All artifacts of a results' folder, and whether they fit what is stated of them.

An artifact is whole if its files and its manifest are, if it lies where its name says, if what it
was made from has the content and the seal that it states, and if its own seal is one that the
results' folder states (`pipeline.steps.stated`).
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import ArtifactError, CheckpointError
from pipeline.core.shards import weights_hash
from pipeline.core.words import shown
from pipeline.steps.artifact import CHECKPOINT, MANIFEST, Artifact
from pipeline.steps.folders import RESULTS_FILE, artifact_folders
from pipeline.steps.stated import Stated

_AGAIN = "run python -m pipeline run again"


class Library:
    """The artifacts of a results' folder, read once.

    Attributes:
        folder: The results' folder.
        stated: Which seals the folder states.
        places: Folders with a manifest, by name; links to such ones as well.
        artifacts: Those that can be read, by name.
        unreadable: Why the others cannot, by name.

    Args:
        folder: The results' folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stated = Stated(folder)
        self.places = dict(sorted(artifact_folders(folder)))
        self.artifacts: dict[str, Artifact] = {}
        self.unreadable: dict[str, str] = {}
        for name, place in self.places.items():
            try:
                self.artifacts[name] = _read(name, place)
            except ArtifactError as error:
                self.unreadable[name] = str(error)

    def artifact(self, name: str) -> Artifact:
        """An artifact, as it was read.

        Raises:
            ArtifactError: It is not there, or cannot be read.
        """
        if name in self.unreadable:
            raise ArtifactError(self.unreadable[name])
        if name not in self.artifacts:
            raise ArtifactError(f"{self.folder / name} is missing: {_AGAIN}")
        return self.artifacts[name]

    def check(self, name: str) -> Artifact:
        """An artifact, after all of it was held against what is stated of it.

        Raises:
            ArtifactError: It is missing or not whole, or was made from something else than lies
                here.
        """
        artifact = self.artifact(name)
        artifact.verify()
        self._check_sources(artifact)
        self.stated.require(name, artifact.seal)
        return artifact

    def require_whole(self, name: str) -> Artifact:
        """An artifact that may leave: it and all that it was made from are whole, to the root.

        Raises:
            ArtifactError: One of them is not, or nothing states its seal.
        """
        waiting, seen = [name], set()
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            artifact = self.check(each)
            if not self.stated.of(each):
                raise ArtifactError(
                    f"nothing states the seal of {artifact.folder}, and so nothing tells whether "
                    f"it was changed: {_AGAIN}, which writes {RESULTS_FILE}"
                )
            waiting.extend(artifact.sources)
        return self.artifact(name)

    def _check_sources(self, artifact: Artifact) -> None:
        """Hold what lies here against what the artifact states of it."""
        if set(artifact.seals) != set(artifact.sources):
            raise ArtifactError(f"{artifact.folder / MANIFEST} does not state the seals: {_AGAIN}")
        for name in artifact.sources:
            if name not in self.places:
                raise ArtifactError(f"{name}, from which {artifact.name} was made, is missing")
            source = self.artifact(name)
            if source.digest != artifact.made_from[name]:
                raise ArtifactError(f"{artifact.name} was made from another {name} than lies here")
            # What came out the same, and tells something else, is stated anew by the next run.
            remade = source.seal in self.stated.of(name)
            if source.seal != artifact.seals[name] and not remade:
                raise ArtifactError(
                    f"{artifact.name} was made from {name}, of which other facts were stated than "
                    f"lie here: {_AGAIN}"
                )
        if CHECKPOINT in artifact.made_from:
            _check_checkpoint(artifact)


def _check_checkpoint(artifact: Artifact) -> None:
    stated = artifact.made().checkpoint
    try:
        # A checkpoint may lie elsewhere by now: only one that is there can be another.
        if not stated or not Path(stated).is_file():
            return
        found = weights_hash(Path(stated))
    except (OSError, ValueError, CheckpointError):
        return
    if found != artifact.made_from[CHECKPOINT]:
        raise ArtifactError(f"{stated} is another checkpoint than {artifact.name} was made from")


def _read(name: str, place: Path) -> Artifact:
    if place.is_symlink():
        raise ArtifactError(f"{place} is a link, where an artifact belongs")
    artifact = Artifact.read(place)
    if artifact.name != name:
        raise ArtifactError(f"{place} holds {shown(artifact.name)}, which does not belong there")
    return artifact
