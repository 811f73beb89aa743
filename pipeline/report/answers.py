"""What the artifacts of a run answered, image by image: all that two runs are compared by."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ArtifactError
from pipeline.core.figures import answers
from pipeline.core.files import digest_of, read_regular
from pipeline.core.plain import read_json
from pipeline.report.model import BuiltArtifact
from pipeline.stages.names import LABELS, LOGITS, SOURCES
from pipeline.steps.artifact import Artifact

Classes = npt.NDArray[np.int64]

_OF = "of "
"""Begins the name of an artifact's answers in a file."""

MOST_BYTES = 200_000_000
"""Of a file: the answers of a hundred artifacts to a million images are as many."""


@dataclass(frozen=True)
class Judged:
    """The images that a run judged, and what its artifacts said of them.

    Attributes:
        images: Their names.
        digest: Of what they hold, all together.
        classes: Names of the classes, in the order of the logits.
        right: The right class of each image, (images,).
        given: By artifact the class that it names, (images,); -1 for an answer that is no number.
    """

    images: tuple[str, ...]
    digest: str
    classes: tuple[str, ...]
    right: Classes
    given: Mapping[str, Classes]


def judged_by(samples: Artifact, given: Mapping[str, Classes]) -> Judged:
    """The images of a run, with answers to them.

    Raises:
        ArtifactError: A file is damaged.
    """
    sources = _sources(samples)
    return Judged(
        images=tuple(name for name, _ in sources),
        digest=digest_of([digest for _, digest in sources]),
        classes=samples.network().labels,
        right=_array(samples.path(LABELS)),
        given=given,
    )


def answers_of(validated: Artifact, built: BuiltArtifact) -> Classes:
    """The class that an artifact names for each image, (images,).

    Args:
        validated: What was found of it.
        built: The artifact.

    Raises:
        ArtifactError: That was found of another artifact, or nothing was kept.
    """
    if built.built is None or validated.made_from.get(built.name) != built.built.digest:
        raise ArtifactError(f"{validated.name} is not of this {built.name}: run it again")
    if LOGITS not in validated.files:
        raise ArtifactError(built.accuracy.top1.why or "its answers were not kept")
    return answers(_array(validated.path(LOGITS)))


def to_bytes(judged: Judged) -> bytes:
    """A file of all of it, packed."""
    stream = io.BytesIO()
    named: dict[str, Any] = {
        "images": np.array(judged.images, np.str_),
        "digest": np.array(judged.digest),
        "classes": np.array(judged.classes, np.str_),
        "right": judged.right.astype(np.int32),
        **{f"{_OF}{name}": given.astype(np.int32) for name, given in judged.given.items()},
    }
    np.savez_compressed(stream, **named)
    return stream.getvalue()


def read_answers(path: Path) -> Judged:
    """The inverse of `to_bytes`.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        with np.load(io.BytesIO(read_regular(path, MOST_BYTES)), allow_pickle=False) as file:
            return Judged(
                images=tuple(map(str, file["images"])),
                digest=str(file["digest"]),
                classes=tuple(map(str, file["classes"])),
                right=file["right"].astype(np.int64),
                given={
                    name.removeprefix(_OF): file[name].astype(np.int64)
                    for name in file.files
                    if name.startswith(_OF)
                },
            )
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing: compare with another entry") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged ({error}): compare with another entry") from error


def _array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _sources(samples: Artifact) -> list[tuple[str, str]]:
    """Name and hash of each validation image."""
    found = read_json(samples.path(SOURCES))
    try:
        return [(str(name), str(digest)) for name, digest in found]
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{samples.path(SOURCES)} is damaged: build again") from error
