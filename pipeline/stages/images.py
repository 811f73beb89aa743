"""Reads the images that the sample stages decoded: what all steps after them work with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.core.network import Images
from pipeline.core.preprocess import Preprocess
from pipeline.stages.names import LABELS, PIXELS
from pipeline.steps.artifact import Artifact

Pixels = npt.NDArray[np.uint8]


def preprocess_of(artifact: Artifact) -> Preprocess:
    """How the artifact's images become the network's input."""
    return Preprocess.from_dict(artifact.network().preprocess)


def read_labels(artifact: Artifact) -> npt.NDArray[np.int64]:
    """Classes of the samples, (images,)."""
    labels: npt.NDArray[np.int64] = np.load(artifact.path(LABELS))
    return labels


def batches(artifact: Artifact, size: int) -> Iterator[Images]:
    """The samples as the network's input, in batches of at most `size`."""
    preprocess = preprocess_of(artifact)
    pixels: Pixels = np.load(artifact.path(PIXELS), mmap_mode="r")
    for start in range(0, len(pixels), size):
        yield preprocess.normalize(np.asarray(pixels[start : start + size]))


def images_at(artifact: Artifact, indices: npt.NDArray[np.int64]) -> Images:
    """Some of the samples as the network's input."""
    pixels: Pixels = np.load(artifact.path(PIXELS), mmap_mode="r")
    return preprocess_of(artifact).normalize(np.asarray(pixels[indices]))
