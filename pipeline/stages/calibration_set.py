"""Reads the calibration images that the calibrate stage decoded."""

from __future__ import annotations

import json

from calibration.sample import CalibrationSet
from pipeline.stages.images import read_labels, read_pictures
from pipeline.stages.names import SOURCES
from pipeline.steps.artifact import Artifact


def read_calibration(artifact: Artifact) -> CalibrationSet:
    """The calibration set, in memory."""
    sources = json.loads(artifact.path(SOURCES).read_text())
    return CalibrationSet(
        images=read_pictures(artifact).images,
        labels=read_labels(artifact),
        hashes=tuple(digest for _, digest in sources),
    )
