"""Reads the calibration images that the calibrate stage decoded."""

from __future__ import annotations

import json

import numpy as np

from calibration.sample import CalibrationSet
from pipeline.stages.images import Pixels, preprocess_of, read_labels
from pipeline.stages.names import PIXELS, SOURCES
from pipeline.steps.artifact import Artifact


def read_calibration(artifact: Artifact) -> CalibrationSet:
    """The calibration set, in memory."""
    pixels: Pixels = np.load(artifact.path(PIXELS))
    sources = json.loads(artifact.path(SOURCES).read_text())
    return CalibrationSet(
        images=preprocess_of(artifact).normalize(pixels),
        labels=read_labels(artifact),
        hashes=tuple(digest for _, digest in sources),
    )
