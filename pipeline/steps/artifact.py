"""A built thing on disk: its files with their hashes, where it came from, and what is known of it.

An artifact is a directory with an `artifact.json`. It is made in a temporary sibling directory and
moved into place whole, so that a directory with an `artifact.json` was finished, whenever a run was
killed. Content is never trusted: `Artifact.verify` hashes it again. The `artifact.json` is also the
mark by which a folder is known as ours: what carries none is never replaced (`core.replacing`).

    {"format": 2, "kind": "build", "name": "trt/fp16", "key": "…",
     "made_from": {"precision/float16": "…digest of that artifact"},
     "seals": {"precision/float16": "…seal of that artifact"},
     "tools": {"tensorrt_rtx": "1.7.1.116"}, "facts": {…},
     "inputs": {"settings options.batches": …}, "code": {"pipeline/stages/build.py": "…"},
     "files": {"model.engine": {"sha256": "…", "size": 1234}},
     "seal": "…SHA-256 of all of the above"}

There are two digests. That of the files decides what has to be made again: keys and `made_from`
hold it. The seal is that of all that is claimed, and is part of no key: the next artifact and
results.json state it, so that an edited fact is found (`pipeline.steps.library`). What differs
from run to run and is no claim, such as how long it took, lies beside it in `made.json`, without
a seal.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core import signals
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.core.files import (
    digest_of,
    file_hash,
    open_regular,
    read_regular,
    what_is,
)
from pipeline.core.network import Network
from pipeline.core.plain import Facts, parse_json
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
from pipeline.core.seals import sealed, unsealed
from pipeline.core.words import in_short, shown

FORMAT = 2
WITHOUT_SEAL = 1
"""Format of artifacts that earlier versions made: these have no seal."""

MANIFEST = "artifact.json"
MADE = "made.json"
CHECKPOINT = "checkpoint"
"""Name in `made_from` of what is no artifact: the file that holds the weights."""

MOST_BYTES = 64_000_000
"""Largest manifest that is read."""

_MOST_OF_MADE = 1_000_000
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
        seals: Seal of every artifact that it was made from, by name.
        seal: SHA-256 of the manifest; "" if an earlier version of this program made it.
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
    seals: Mapping[str, str] = field(default_factory=dict)
    seal: str = ""

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
        except KeyError as error:
            raise ArtifactError(f"{self.folder} states no network: build it again") from error
        except ArtifactError as error:
            raise ArtifactError(f"{self.folder}: {error}") from error

    @property
    def sources(self) -> list[str]:
        """Names of the artifacts that it was made from."""
        return [name for name in self.made_from if name != CHECKPOINT]

    def verify(self) -> None:
        """Hash all files again; nothing is followed.

        Raises:
            ArtifactError: A file is missing, foreign, changed or cannot be read, something is no
                regular file, or there is no seal; the message names it.
        """
        self.require_seal()
        if self.folder.is_symlink():
            raise ArtifactError(f"{self.folder} is a link, where an artifact belongs")
        for name, record in self.files.items():
            self._verify(name, record)
        known = {**self.files, MANIFEST: None, MADE: None}
        try:
            foreign = foreign_paths(self.folder, known)
        except OSError as error:
            raise ArtifactError(cannot_read(error.filename or self.folder, error)) from error
        if foreign:
            raise ArtifactError(
                f"{foreign[0]} does not belong to this artifact: it is {what_is(foreign[0])}"
            )
        made = self.folder / MADE
        if os.path.lexists(made):
            open_regular(made).close()

    def require_seal(self) -> None:
        """Refuse what an earlier version made.

        Raises:
            ArtifactError: There is no seal.
        """
        if not self.seal:
            raise ArtifactError(
                f"{self.folder} has no seal: made by an older version; run python -m pipeline run "
                "again"
            )

    def _verify(self, name: str, record: FileRecord) -> None:
        path = self.folder / name
        try:
            with open_regular(path) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != record.size:
                    raise ArtifactError(f"{path} has {size} bytes where {record.size} were written")
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing") from error
        except OSError as error:
            raise ArtifactError(cannot_read(path, error)) from error
        if found != record.sha256:
            raise ArtifactError(f"{path} has changed since it was written")

    def copy(self, name: str, destination: Path) -> None:
        """Copy one of the files out of the artifact, as it was written.

        Raises:
            ArtifactError: There is no such file, or it is another one by now.
            OSError: The destination cannot be written.
        """
        source, record = self.path(name), self.files[name]
        try:
            data = read_regular(source, record.size)
        except FileNotFoundError as error:
            raise ArtifactError(f"{source} is missing") from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ArtifactError(f"{source} has changed since it was written")
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(data)

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read the manifest of an artifact, without looking at its files.

        Raises:
            ArtifactError: There is none, it is damaged, or does not fit its seal.
        """
        path = folder / MANIFEST
        if not os.path.lexists(path):
            raise ArtifactError(f"{folder} holds no {MANIFEST}: nothing was built there")
        try:
            data = read_regular(path, MOST_BYTES)
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} holds no {MANIFEST}: nothing was built there") from error
        except ArtifactError as error:
            raise ArtifactError(f"{error}: build again") from error
        return _parsed(data, folder)

    @classmethod
    def parse(cls, data: bytes, folder: Path) -> Artifact:
        """An artifact by its manifest.

        Args:
            data: Content of the manifest.
            folder: Where the artifact lies, or comes from.

        Raises:
            ArtifactError: The manifest is damaged, or does not fit its seal.
        """
        path = folder / MANIFEST
        try:
            values, seal = unsealed(data, str(path))
        except ArtifactError as error:
            raise ArtifactError(f"{error}: build again") from error
        try:
            _check_format(path, values["format"], seal)
            return cls(
                folder=folder,
                kind=_text(values["kind"]),
                name=_text(values["name"]),
                key=_text(values["key"]),
                files={
                    _inside(path, name): FileRecord(_text(f["sha256"]), _count(f["size"]))
                    for name, f in values["files"].items()
                },
                made_from=_texts(values["made_from"]),
                tools=_texts(values["tools"]),
                facts=dict(values["facts"]),
                inputs=dict(values["inputs"]) if "inputs" in values else None,
                code=_texts(values.get("code", {})),
                seals=_texts(values["seals"] if seal else {}),
                seal=seal,
            )
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: build again") from error

    def made(self) -> Made:
        """What is known of its making; what cannot be read is not known."""
        try:
            values = parse_json(read_regular(self.folder / MADE, _MOST_OF_MADE), MADE)
            return Made.from_facts(values, MADE)
        except (ArtifactError, OSError, ValueError, TypeError, AttributeError):
            return Made()

    def restated(self, seals: Mapping[str, str]) -> tuple[str, str]:
        """The manifest with other seals of what the artifact was made from.

        Its files, its facts and its key stay what they are.

        Returns:
            The text, and its seal.

        Raises:
            ArtifactError: The manifest is another one by now.
        """
        path = self.folder / MANIFEST
        values, seal = unsealed(read_regular(path, MOST_BYTES), str(path))
        if seal != self.seal:
            raise ArtifactError(f"{path} has changed meanwhile")
        text = sealed({**values, "seals": dict(seals)})
        return text, unsealed(text.encode(), MANIFEST)[1]


@dataclass(frozen=True)
class Made(Facts):
    """How an artifact was made: what differs from run to run, and is no claim.

    Attributes:
        seconds: How long that took; None if it was made elsewhere.
        date: Day and time, as "YYYY-MM-DD hh:mm".
        checkpoint: Path of the checkpoint, where it was read.
        data: Where the images lay.
        images_seconds: How long of `seconds` went to what is done for each image, of all images,
            also of those that an earlier run had done already; None where nothing tells.
    """

    seconds: float | None = None
    date: str = ""
    checkpoint: str = ""
    data: str = ""
    images_seconds: float | None = None


@functools.lru_cache(maxsize=64)
def _parsed(data: bytes, folder: Path) -> Artifact:
    """See `Artifact.parse`; a run reads a manifest some four times, which seldom changes meanwhile.

    An artifact is nothing that anybody changes, so that those who ask may share it.
    """
    return Artifact.parse(data, folder)


def _check_format(path: Path, found: Any, seal: str) -> None:
    if found == FORMAT and not seal:
        raise ArtifactError(f"{path} is damaged, its seal is lost: build again")
    if found != (FORMAT if seal else WITHOUT_SEAL):
        raise ArtifactError(
            f"{path} has format {shown(found)}, this version reads {FORMAT}: build again"
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError
    return value


def _texts(values: Any) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _inside(manifest: Path, name: str) -> str:
    """The name of a file, if it is one inside of the artifact, written in the one way."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ArtifactError(f"{manifest} names the file {shown(name)}, outside of its folder")
    if not path.parts or path.as_posix() != name or name in (MANIFEST, MADE):
        raise ArtifactError(f"{manifest} names the file {shown(name)}, which can be none")
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
    known = {**files, MANIFEST: None, MADE: None}
    return Whose.MIXED if foreign_paths(folder, known) else Whose.OURS


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
    seals: Mapping[str, str] | None = None,
    beside: Mapping[str, Any] | None = None,
    announce: Callable[[str], object] = lambda seal: None,
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
        seals: Seals of the artifacts that it is made from, by name.
        beside: Fields of `Made`, read after `build`.
        announce: Is told the seal before the artifact is in its place.

    Raises:
        ArtifactError: The folder is somebody else's or cannot be written. Whatever `build` raises
            passes through. In each case what was there before stays.
    """
    refuse_foreign_folder(folder)
    try:
        with workspace(folder) as new:
            new.mkdir()
            facts = _built(folder, new, build)
            # A library may have dropped it, and gone another way for it.
            signals.raise_received()
            origin = {"kind": kind, "name": name, "key": key, "made_from": dict(made_from)}
            stated = {"seals": dict(seals or {}), "tools": dict(tools), "facts": facts}
            parts = {"inputs": dict(inputs or {}), "code": dict(code or {})}
            seal = write_manifest(new, {**origin, **stated, **parts})
            _write_made(new, beside or {})
            refuse_foreign_folder(folder)  # once more: building may take hours
            announce(seal)
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


def _write_made(folder: Path, beside: Mapping[str, Any]) -> None:
    made = Made(**{"date": time.strftime("%Y-%m-%d %H:%M"), **beside})
    (folder / MADE).write_text(json.dumps(made.to_facts(), indent=1) + "\n")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Write down what a folder holds, after all else is in it; see `make`.

    Args:
        folder: The folder.
        manifest: All that `artifact.json` says, but for its format, the files and the seal.

    Returns:
        The seal.

    Raises:
        ArtifactError: It holds something else than regular files.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        with open_regular(path) as stream:
            os.fsync(stream.fileno())
        record = {"sha256": file_hash(path), "size": path.stat().st_size}
        files[path.relative_to(folder).as_posix()] = record
    if empty := foreign_paths(folder, files):
        raise ArtifactError(f"{empty[0]} is {what_is(empty[0])}: artifacts hold regular files only")
    text = sealed({"format": FORMAT, **manifest, "files": files})
    (folder / MANIFEST).write_text(text)
    return unsealed(text.encode(), MANIFEST)[1]


def rewrite_manifest(artifact: Artifact, text: str) -> Artifact:
    """Put another manifest in the place of an artifact's; see `Artifact.restated`.

    Raises:
        ArtifactError: The folder cannot be written; the old one stays.
    """
    try:
        # Beside the folder, where leftovers of a killed run are swept, and not in it.
        with workspace(artifact.folder) as new:
            with new.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            put(new, artifact.folder / MANIFEST, Whose.FREE)
    except OSError as error:
        raise ArtifactError(cannot_write(artifact.folder, error)) from error
    return Artifact.read(artifact.folder)
