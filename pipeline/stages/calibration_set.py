"""Reads the calibration images that the calibrate stage decoded."""

from __future__ import annotations

from pathlib import Path

from calibration.sample import CalibrationSet
from pipeline.core.errors import ArtifactError
from pipeline.core.plain import read_json
from pipeline.stages.images import read_labels, read_pictures
from pipeline.stages.names import SOURCES
from pipeline.steps.artifact import Artifact


def read_calibration(artifact: Artifact) -> CalibrationSet:
    """The calibration set, in memory."""
    return CalibrationSet(
        images=read_pictures(artifact).images,
        labels=read_labels(artifact),
        hashes=_hashes(artifact.path(SOURCES)),
    )


def _hashes(path: Path) -> tuple[str, ...]:
    """Hash of every image, of a file of names and hashes."""
    sources = read_json(path)
    if not isinstance(sources, list) or not all(_is_source(each) for each in sources):
        raise ArtifactError(f"{path} is damaged: build again")
    return tuple(digest for _, digest in sources)


def _is_source(each: object) -> bool:
    return isinstance(each, list) and len(each) == 2 and all(isinstance(part, str) for part in each)
