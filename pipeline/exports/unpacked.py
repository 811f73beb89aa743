"""A bundle that arrived, as an archive or unpacked: is it whole, and whose?

Nothing in it is trusted: an archive is unpacked into a temporary folder, and holds regular files
alone, no larger than the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

from pipeline.core.errors import ArtifactError
from pipeline.core.files import open_regular, read_regular
from pipeline.core.plain import read_json
from pipeline.core.signing import LENGTH, Verifier
from pipeline.core.words import shown
from pipeline.steps.artifact import Artifact

SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
MANIFEST_FILE = "manifest.json"

_MOST_OF_SUMS = 10_000_000
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


@dataclass(frozen=True)
class Bundle:
    """A bundle that lies unpacked.

    Attributes:
        folder: Where.
    """

    folder: Path

    def verify(self) -> None:
        """Hash all files again.

        Raises:
            ArtifactError: A file is missing, foreign or changed; the message names it.
        """
        stated = self._stated()
        for name, digest in stated.items():
            with _opened(self.folder / name) as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != digest:
                raise ArtifactError(f"{self.folder / name} has changed since it was packed")
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_dir() and name not in {*stated, SUMS, SIGNATURE}:
                raise ArtifactError(f"{path} does not belong to this bundle")

    def signature(self, verifier: Verifier | None) -> str:
        """Who signed it, in a few words.

        Args:
            verifier: The key of who should have; None if none is given.

        Raises:
            ArtifactError: A key is given, and its owner did not sign it.
        """
        place = self.folder / SIGNATURE
        if not os.path.lexists(place):
            if verifier is None:
                return "not signed"
            raise ArtifactError(f"{self.folder} is not signed: {SIGNATURE} is missing")
        if verifier is None:
            return "signed, not verified: give the public key with --key"
        data = read_regular(self.folder / SUMS, _MOST_OF_SUMS)
        verifier.require(data, read_regular(place, LENGTH), SUMS)
        return f"signed by the owner of {verifier.path} ({verifier.fingerprint})"

    def artifacts(self) -> list[Artifact]:
        """The artifacts that it says to hold, with the seals that it says; their files unread.

        Raises:
            ArtifactError: One is missing or another one, or the manifest is damaged.
        """
        values = read_json(self.folder / MANIFEST_FILE)
        try:
            seals = {str(each["name"]): str(each["seal"]) for each in values["artifacts"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{self.folder / MANIFEST_FILE} is damaged") from error
        found = [Artifact.read(self.folder / _inside(name)) for name in seals]
        for artifact, (name, seal) in zip(found, seals.items(), strict=True):
            if (artifact.name, artifact.seal) != (name, seal):
                raise ArtifactError(f"{artifact.folder} is not the {name} that was packed")
        return found

    def _stated(self) -> Mapping[str, str]:
        """Digests by file name."""
        data = read_regular(self.folder / SUMS, _MOST_OF_SUMS)
        found: dict[str, str] = {}
        for line in data.decode("utf-8", "replace").splitlines():
            match = _LINE.fullmatch(line)
            if match is None:
                raise ArtifactError(f"{self.folder / SUMS} is damaged: {shown(line)}")
            found[_inside(match[2])] = match[1]
        return found


def is_bundle(path: Path) -> bool:
    """Whether a path may be a bundle: a folder with checksums, or a tar archive."""
    if path.is_dir():
        return (path / SUMS).is_file()
    return path.is_file() and tarfile.is_tarfile(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """A bundle, unpacked for as long as somebody looks at it if it is an archive.

    Raises:
        ArtifactError: The archive is damaged, or holds what no bundle does.
    """
    if path.is_dir():
        yield Bundle(path)
        return
    with tempfile.TemporaryDirectory(prefix="care-deploy-") as temporary:
        yield Bundle(_unpack(path, Path(temporary)))


def _unpack(path: Path, place: Path) -> Path:
    """Unpack an archive; returns the one folder in it."""
    left = shutil.disk_usage(place).free
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                left -= member.size
                if left < 0:
                    raise ArtifactError(f"{path} is larger unpacked than what the disk has left")
                if not member.isreg():
                    raise ArtifactError(f"{path} holds {shown(member.name)}, no regular file")
                archive.extract(member, place, filter="data")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {shown(error)}") from error
    folders = list(place.iterdir())
    if len(folders) != 1 or not (folders[0] / SUMS).is_file():
        raise ArtifactError(f"{path} is no bundle: it holds no {SUMS}")
    return folders[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with open_regular(path) as stream:
            yield stream
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error


def _inside(name: str) -> str:
    """A path that leads to nowhere else.

    Raises:
        ArtifactError: It does.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ArtifactError(f"{shown(name)} leads out of the bundle")
    return name
