"""Reads the images that the sample stages decoded: what all steps after them work with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.core.network import Pixels
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.stages.names import LABELS, PIXELS
from pipeline.steps.artifact import Artifact


def preprocess_of(artifact: Artifact) -> Preprocess:
    """How the artifact's images become the network's input."""
    return Preprocess.from_dict(artifact.network().preprocess)


def read_labels(artifact: Artifact) -> npt.NDArray[np.int64]:
    """Classes of the samples, (images,)."""
    labels: npt.NDArray[np.int64] = np.load(artifact.path(LABELS))
    return labels


def read_pictures(artifact: Artifact) -> Pictures:
    """All samples, in memory."""
    return Pictures(np.load(artifact.path(PIXELS)), preprocess_of(artifact))


def batches(
    artifact: Artifact, size: int, first: int = 0, last: int | None = None
) -> Iterator[Pictures]:
    """The samples from the first one up to the last, which is not among them, in batches.

    Args:
        artifact: Made by the stage of the samples.
        size: Most images of a batch.
        first: Where to begin.
        last: Where to end; None for all that follow.
    """
    preprocess = preprocess_of(artifact)
    pixels: Pixels = np.load(artifact.path(PIXELS), mmap_mode="r")
    end = len(pixels) if last is None else min(last, len(pixels))
    for start in range(first, end, size):
        yield Pictures(np.asarray(pixels[start : min(start + size, end)]), preprocess)


def pictures_at(artifact: Artifact, indices: npt.NDArray[np.int64]) -> Pictures:
    """Some of the samples."""
    pixels: Pixels = np.load(artifact.path(PIXELS), mmap_mode="r")
    return Pictures(np.asarray(pixels[indices]), preprocess_of(artifact))


def evenly(total: int, wanted: int | None) -> npt.NDArray[np.int64]:
    """Some of so many images, evenly over a set that is sorted by class; None for all."""
    count = total if wanted is None else min(wanted, total)
    return np.linspace(0, total, count, endpoint=False).astype(np.int64)
