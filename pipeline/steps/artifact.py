"""A built thing on disk: its files with their hashes, where it came from, and what is known of it.

An artifact is a directory with an `artifact.json`. It is made in a temporary sibling directory and
moved into place whole, so that a directory with an `artifact.json` was finished, whenever a run was
killed. Content is never trusted: `Artifact.verify` hashes it again. The `artifact.json` is also the
mark by which a folder is known as ours: what carries none is never replaced (`core.replacing`).

    {"format": 1, "kind": "build", "name": "trt/fp16", "key": "…",
     "files": {"model.engine": {"sha256": "…", "size": 1234}},
     "made_from": {"precision/float16": "…digest of that artifact"},
     "tools": {"tensorrt_rtx": "1.7.1.116"}, "facts": {…},
     "inputs": {"settings options.batches": …}, "code": {"pipeline/stages/build.py": "…"}}
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, BuildError
from pipeline.core.files import digest_of, file_hash
from pipeline.core.network import Network
from pipeline.core.plain import read_json
from pipeline.core.replacing import (
    Whose,
    cannot_read,
    cannot_write,
    disk_is_full,
    foreign_paths,
    put,
    refuse_foreign,
    workspace,
)
from pipeline.core.words import in_short

FORMAT = 1
MANIFEST = "artifact.json"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class FileRecord:
    """Hash and size in bytes of one file of an artifact."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """A finished artifact.

    Attributes:
        folder: Where it lies.
        kind: The stage that made it.
        name: Its name within the run, such as "trt/fp16".
        key: Content hash of everything that could change it.
        files: Relative POSIX path of every file, and its record.
        made_from: Digest of every artifact or input that it was made from, by name.
        tools: Versions of the tools that made it.
        facts: What is known of it, for reports and for those who run it.
        inputs: Settings and all else that its key holds, by name; None if an earlier version of
            this program, which did not tell, made it.
        code: Hash of every module that its key holds, by file name.
    """

    folder: Path
    kind: str
    name: str
    key: str
    files: Mapping[str, FileRecord]
    made_from: Mapping[str, str]
    tools: Mapping[str, str]
    facts: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the files' names and contents: what others are made from."""
        return digest_of({name: record.sha256 for name, record in self.files.items()})

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(record.size for record in self.files.values())

    def path(self, name: str) -> Path:
        """Path of one of the files.

        Raises:
            ArtifactError: The artifact has no such file.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.folder} holds no {name}, only {', '.join(self.files)}")
        return self.folder / name

    def network(self) -> Network:
        """The network that it was made from, as it states it.

        Raises:
            ArtifactError: It states none, or not all of it.
        """
        try:
            return Network.from_facts(self.facts["network"])
        except (KeyError, ArtifactError) as error:
            raise ArtifactError(f"{self.folder} states no network: build it again") from error

    def verify(self) -> None:
        """Hash all files again.

        Raises:
            ArtifactError: A file is missing, foreign, changed or cannot be read; the message names
                it.
        """
        try:
            self._verify()
        except OSError as error:
            raise ArtifactError(cannot_read(error.filename or self.folder, error)) from error

    def _verify(self) -> None:
        present = {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != MANIFEST
        }
        for name, record in self.files.items():
            path = self.folder / name
            if name not in present:
                raise ArtifactError(f"{path} is missing")
            if path.stat().st_size != record.size:
                raise ArtifactError(
                    f"{path} has {path.stat().st_size} bytes where {record.size} were written"
                )
            if file_hash(path) != record.sha256:
                raise ArtifactError(f"{path} has changed since it was written")
        if foreign := sorted(present - set(self.files)):
            raise ArtifactError(f"{self.folder / foreign[0]} does not belong to this artifact")

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read the manifest of an artifact, without looking at its files.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        path = folder / MANIFEST
        if not os.path.lexists(path):
            raise ArtifactError(f"{folder} holds no {MANIFEST}: nothing was built there")
        try:
            plain = _manifest(path)
            if plain["format"] != FORMAT:
                raise ArtifactError(
                    f"{path} has format {plain['format']}, this version reads {FORMAT}: build again"
                )
            return cls(
                folder=folder,
                kind=str(plain["kind"]),
                name=str(plain["name"]),
                key=str(plain["key"]),
                files={
                    _inside(path, name): FileRecord(str(f["sha256"]), int(f["size"]))
                    for name, f in plain["files"].items()
                },
                made_from=dict(plain["made_from"]),
                tools=dict(plain["tools"]),
                facts=dict(plain["facts"]),
                inputs=dict(plain["inputs"]) if "inputs" in plain else None,
                code=dict(plain.get("code", {})),
            )
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: build again") from error


def _manifest(path: Path) -> Any:
    try:
        return read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}: mend that, or build again") from error


def _inside(manifest: Path, name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise ArtifactError(f"{manifest} names the file {name}, outside of its folder")
    return name


def whose_folder(folder: Path) -> Whose:
    """Whose a folder is, by its manifest; see `pipeline.core.replacing`."""
    if not os.path.lexists(folder):
        return Whose.FREE
    if folder.is_symlink() or not folder.is_dir():
        return Whose.FOREIGN
    try:
        if not any(folder.iterdir()):
            return Whose.FREE
    except OSError as error:
        raise ArtifactError(cannot_read(folder, error)) from error
    if not os.path.lexists(folder / MANIFEST):
        return Whose.FOREIGN
    try:
        files = Artifact.read(folder).files
    except ArtifactError:
        return Whose.MIXED
    return Whose.MIXED if foreign_paths(folder, {**files, MANIFEST: None}) else Whose.OURS


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder that somebody else put where an artifact shall lie.

    Raises:
        ArtifactError: There is one.
    """
    refuse_foreign(folder, whose_folder(folder), f"holds no {MANIFEST}")


def make(
    folder: Path,
    *,
    kind: str,
    name: str,
    key: str,
    made_from: Mapping[str, str],
    tools: Mapping[str, str],
    build: Callable[[Path], Mapping[str, Any]],
    say: Callable[[str], object] = lambda line: None,
    inputs: Mapping[str, Any] | None = None,
    code: Mapping[str, str] | None = None,
) -> Artifact:
    """Make an artifact beside `folder` and move it there, whole.

    Args:
        folder: Where it shall lie. An artifact that is there is replaced, or set aside if other
            files are in it.
        kind: The stage that makes it.
        name: Its name within the run.
        key: Content hash of everything that can change it.
        made_from: Digests of what it is made from, by name.
        tools: Versions of the tools that make it.
        build: Writes the files into the folder that it is given and returns the facts.
        say: Is told if something was set aside.
        inputs: Settings and all else that the key holds, by name.
        code: Hashes of the modules that the key holds, by file name.

    Raises:
        ArtifactError: The folder is somebody else's or cannot be written. Whatever `build` raises
            passes through. In each case what was there before stays.
    """
    refuse_foreign_folder(folder)
    try:
        with workspace(folder) as new:
            new.mkdir()
            facts = _built(folder, new, build)
            origin = {"kind": kind, "name": name, "key": key, "made_from": dict(made_from)}
            parts = {"inputs": dict(inputs or {}), "code": dict(code or {})}
            write_manifest(new, {**origin, "tools": dict(tools), "facts": facts, **parts})
            refuse_foreign_folder(folder)  # once more: building may take hours
            aside = put(new, folder, whose_folder(folder))
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    if aside is not None:
        say(f"what was there was set aside as {aside.name}")
    return Artifact.read(folder)


def _built(
    folder: Path, new: Path, build: Callable[[Path], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The facts; libraries report a full disk in many ways, and all of them become one.

    Raises:
        ArtifactError: The folder cannot be written.
        BuildError: The system refused something else, such as a connection.
    """
    try:
        return dict(build(new))
    except Exception as error:
        if disk_is_full(new):
            reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise ArtifactError(cannot_write(folder, reason)) from error
        cause = error.__cause__
        if isinstance(error, ArtifactError) and getattr(cause, "errno", None) in _UNWRITABLE:
            # Said of a file in the temporary folder, which is gone by now.
            assert isinstance(cause, OSError)
            raise ArtifactError(cannot_write(folder, cause)) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in _UNWRITABLE or str(error.filename or "").startswith(str(new)):
            raise ArtifactError(cannot_write(folder, error)) from error
        raise BuildError(f"{folder.name} cannot be made: {in_short(error)}") from error


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write down what a folder holds, after all else is in it; see `make`.

    Args:
        folder: The folder.
        manifest: All that `artifact.json` says, but for its format and the files.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        record = {"sha256": file_hash(path), "size": path.stat().st_size}
        files[path.relative_to(folder).as_posix()] = record
    whole = {"format": FORMAT, **manifest, "files": files}
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")
