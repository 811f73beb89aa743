"""What travels between a run and the workers of its fleet: an order for a step, and the answer.

Both are JSON: the name of a step, the configuration, the address of the store, and digests. The
files that the digests stand for go through the store. No network and no code is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import HUB_WEIGHTS, Config
from pipeline.core import errors
from pipeline.core.callables import locate
from pipeline.core.errors import ArtifactError, PipelineError, UnforeseenError
from pipeline.core.files import digest_of
from pipeline.core.plain import Plain, parse_json
from pipeline.core.remote import is_address
from pipeline.core.words import shown
from pipeline.source import EMBEDDED, IMAGENET, PRETRAINED, Source
from pipeline.steps.keys import Code
from pipeline.store.parcels import Parcel

MODULE, CHECKPOINT, LABELS, RESULTS = "module", "checkpoint", "labels", "results"
"""Folders of a worker's place for a configuration; steps run in the first, as a user would."""

MOST_NAMED = 6
"""Differences between a worker and the run that an error names."""


@dataclass(frozen=True)
class Order(Plain):
    """A step to run on a worker.

    Attributes:
        step: Its name.
        config: The configuration, with the paths of a worker's place and without the store.
        store: The store's address, without user, password and query.
        timeout_s: How long the store may take for an answer.
        files: What the network is made from, by its path in the worker's place.
        artifacts: Manifests of the artifacts that it needs, by name.
        missing: Names of what it goes on without.
        anew: Run it even if the store holds its artifact.
        parts: What it is made from, as the run has it, see `pipeline.steps.step.Step.parts`.
        again: Make it once more, and tell its digest alone.
    """

    step: str
    config: Mapping[str, Any]
    store: str
    timeout_s: float
    files: Mapping[str, Parcel]
    artifacts: Mapping[str, Parcel]
    missing: tuple[str, ...]
    anew: bool
    parts: Mapping[str, Mapping[str, Any]]
    again: bool = False

    def to_json(self) -> str:
        """The text that travels."""
        return json.dumps(self.to_dict(), default=str)

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Read an order.

        Raises:
            ArtifactError: It is none, or names a path outside of a worker's place.
        """
        order = cls.from_dict(parse_json(text, "an order"), "an order")
        for name in (*order.files, *order.artifacts, order.step):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\\" in name:
                raise ArtifactError(f"an order names {shown(name)}, outside of a worker's place")
        return order

    @property
    def place(self) -> str:
        """Name of the folder for what several orders of a configuration share."""
        files = {name: parcel.sha256 for name, parcel in self.files.items()}
        return digest_of([dict(self.config), files, self.store])[:16]


@dataclass(frozen=True)
class Answer(Plain):
    """How a step ended on a worker.

    Attributes:
        worker: Which one, for people.
        made: The manifest of the artifact; None where it failed.
        notes: What the user should know of it.
        log: Lines for the log.
        error: What failed; "" if nothing did.
        kind: Name of the error's class.
        digest: Of what was made once more.
        address: Dask's address of the worker.
    """

    worker: str
    made: Parcel | None = None
    notes: tuple[str, ...] = ()
    log: tuple[str, ...] = field(default=())
    error: str = ""
    kind: str = ""
    digest: str = ""
    address: str = ""

    def to_json(self) -> str:
        """The text that travels."""
        return json.dumps(self.to_dict(), default=str)

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """Read an answer.

        Raises:
            ArtifactError: It is none.
        """
        return cls.from_dict(parse_json(text, "a worker's answer"), "a worker's answer")

    def failure(self) -> PipelineError | None:
        """What failed on the worker, as an error that names it; None if nothing did."""
        if not self.kind:
            return None
        found = getattr(errors, self.kind, None)
        known = isinstance(found, type) and issubclass(found, PipelineError)
        message = f"on worker {self.worker}: {self.error}"
        return found(message) if found is not None and known else UnforeseenError(message)


def network_files(source: Source) -> Iterator[tuple[str, Path, str]]:
    """What the network is made from and workers may lack.

    Yields:
        Path in a worker's place, the file, and its SHA-256.
    """
    config = source.config
    if config.model.checkpoint not in (EMBEDDED, PRETRAINED, HUB_WEIGHTS):
        for name, path, digest in source.weight_files():
            yield f"{CHECKPOINT}/{name}", path, digest
    if config.data.labels not in (None, IMAGENET):
        path = source.labels_file(str(config.data.labels))
        yield f"{LABELS}/{path.name}", path, source.hashes.hash(path)
    if config.model.module is not None:
        place = locate(config.model.module)
        hashes = Code(place.folder, own=place.packages).hashes([place.module])
        for title, digest in hashes.items():
            yield f"{MODULE}/{title}", place.folder / title, digest


def config_for_workers(config: Config) -> dict[str, Any]:
    """A configuration with the paths of a worker's place, without store and fleet.

    Images do not travel: they lie under the same path, or at the same address, on every machine.
    """
    values: dict[str, Any] = config.model_dump(
        mode="json", exclude={"store", "fleet"}, exclude_unset=True
    )
    values["output"] = f"../{RESULTS}"
    checkpoint = Path(config.model.checkpoint).name
    if config.model.checkpoint not in (EMBEDDED, PRETRAINED, HUB_WEIGHTS, "random", "own"):
        values["model"]["checkpoint"] = f"../{CHECKPOINT}/{checkpoint}"
    if config.model.onnx is not None:
        values["model"]["onnx"] = f"../{CHECKPOINT}/{Path(config.model.onnx).name}"
    if config.data.labels not in (None, IMAGENET):
        values["data"]["labels"] = f"../{LABELS}/{Path(str(config.data.labels)).name}"
    for split in ("validation", "calibration"):
        if split in values["data"]:
            values["data"][split] = _absolute(values["data"][split])
    return values


def _absolute(uri: str | None) -> str | None:
    """A dataset's name with an absolute path, if it has one."""
    kind, colon, path = (uri or "").partition(":")
    if is_address(path):
        return uri
    return f"{kind}:{os.path.abspath(path)}" if colon and path else uri  # noqa: PTH100


def differences(
    here: Mapping[str, Mapping[str, Any]], there: Mapping[str, Mapping[str, Any]]
) -> str:
    """What a run and a worker would make a step from that is not the same; "" if nothing.

    Args:
        here: See `pipeline.steps.step.Step.parts`, as the run has them.
        there: As the worker has them for the machine of the run, see `Step.seen_from`: what that
            lacks, and which machine it is, is no difference.
    """
    found = []
    for kind, mine in here.items():
        theirs = there.get(kind, {})
        for name in dict.fromkeys([*mine, *theirs]):
            ours, other = (json.loads(json.dumps(s.get(name), default=str)) for s in (mine, theirs))
            if ours == other:
                continue
            found.append(f"{name} {other} (here {ours})" if kind == "tools" else name)
    more = len(found) - MOST_NAMED
    return f"{', '.join(found[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"
