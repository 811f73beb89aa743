"""Files and artifacts that go through a store by their digest alone, from one machine to another.

A key says what a step would make on a machine of one kind; here it is known what was made, to the
byte. An artifact is sent as its files and its manifest, which lies in the store as any other
object: the digest of the manifest stands for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ArtifactError, DamagedError
from pipeline.core.files import file_hash, read_regular
from pipeline.core.plain import Plain
from pipeline.core.replacing import cannot_write, put, workspace
from pipeline.steps.artifact import (
    MANIFEST,
    MOST_BYTES,
    Artifact,
    refuse_foreign_folder,
    whose_folder,
)
from pipeline.store.objects import Objects


@dataclass(frozen=True)
class Parcel(Plain):
    """A file in a store.

    Attributes:
        sha256: Its hash.
        size: Its size in bytes.
    """

    sha256: str
    size: int


def send_file(objects: Objects, path: Path, sha256: str) -> Parcel:
    """Give a file to the store, unless it is there.

    Raises:
        ArtifactError: The file has another hash by now.
        StoreError: The store does not take it.
    """
    parcel = Parcel(sha256, path.stat().st_size)
    objects.give(parcel.sha256, parcel.size, path)
    return parcel


def receive_file(objects: Objects, parcel: Parcel, path: Path) -> None:
    """Copy a file out of the store, unless it is there already.

    Raises:
        DamagedError: The store has another file under this digest, or none.
        StoreError: The store does not answer.
        ArtifactError: The file cannot be written.
    """
    if path.is_file() and file_hash(path) == parcel.sha256:
        return
    try:
        with workspace(path) as new:
            objects.fetch(parcel.sha256, parcel.size, new)
            new.replace(path)
    except OSError as error:
        raise ArtifactError(cannot_write(path, error)) from error


def send(objects: Objects, artifact: Artifact) -> Parcel:
    """Give all of an artifact to the store, its files before the manifest that names them.

    Returns:
        The manifest, which stands for it.

    Raises:
        ArtifactError: The artifact is damaged.
        StoreError: The store does not take it.
    """
    for name, record in artifact.files.items():
        objects.give(record.sha256, record.size, artifact.path(name))
    manifest = artifact.folder / MANIFEST
    return send_file(objects, manifest, file_hash(manifest))


def receive(
    objects: Objects,
    parcel: Parcel,
    folder: Path,
    check: Callable[[Artifact], object] = lambda artifact: None,
    announce: Callable[[str], object] = lambda seal: None,
) -> Artifact:
    """Put an artifact out of the store into its place, as it was made elsewhere.

    Args:
        objects: The store.
        parcel: Its manifest.
        folder: Where it shall lie; what was there is replaced, or set aside.
        check: Raises where it is not what it should be, before it is fetched.
        announce: Is told the seal before the artifact is in its place.

    Raises:
        DamagedError: A file is missing in the store, or not what its digest says.
        StoreError: The store does not answer.
        ArtifactError: The folder is somebody else's or cannot be written. What was there stays.
    """
    refuse_foreign_folder(folder)
    try:
        with workspace(folder) as new:
            new.mkdir()
            objects.fetch(parcel.sha256, min(parcel.size, MOST_BYTES), new / MANIFEST)
            sent = _manifest(new, objects.address.shown)
            check(sent)
            for name, record in sent.files.items():
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                objects.fetch(record.sha256, record.size, path)
            announce(sent.seal)
            put(new, folder, whose_folder(folder))
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return Artifact.read(folder)


def _manifest(folder: Path, shown: str) -> Artifact:
    try:
        sent = Artifact.parse(read_regular(folder / MANIFEST, MOST_BYTES), folder)
        sent.require_seal()
    except ArtifactError:
        raise DamagedError(f"what was sent through {shown} is no manifest of an artifact") from None
    return sent


def receive_all(
    objects: Objects, parcels: Mapping[str, Parcel], folder: Path
) -> dict[str, Artifact]:
    """Bring artifacts into a results' folder, each as its digest says; what is there stays.

    Args:
        objects: The store.
        parcels: Manifests by the artifacts' names.
        folder: The results' folder.

    Raises:
        DamagedError: See `receive`.
        StoreError: The store does not answer.
        ArtifactError: The folder cannot be written.
    """
    return {name: _brought(objects, parcel, folder / name) for name, parcel in parcels.items()}


def _brought(objects: Objects, parcel: Parcel, place: Path) -> Artifact:
    manifest = place / MANIFEST
    if manifest.is_file() and file_hash(manifest) == parcel.sha256:
        try:
            there = Artifact.read(place)
            there.verify()
            return there
        except ArtifactError:
            pass  # damaged here: it is fetched anew
    return receive(objects, parcel, place)
