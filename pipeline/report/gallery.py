"""Images that an artifact answers otherwise than PyTorch: what a drop of accuracy looks like."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.report.model import BuiltArtifact, Run
from pipeline.stages.names import LABELS, LOGITS, PIXELS

MOST_SHOWN = 12
"""Images of one artifact."""

SIDE = 96
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True)
class Answer:
    """One image with two answers.

    Attributes:
        source: Its thumbnail, as an address that holds it.
        truth: Its class.
        before: PyTorch's answer.
        after: The artifact's answer.
    """

    source: str
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Flipped:
    """Images that one artifact answers otherwise than PyTorch.

    Attributes:
        name: The artifact.
        count: How many there are.
        images: The first of them.
    """

    name: str
    count: int
    images: tuple[Answer, ...]


def flipped(run: Run) -> list[Flipped]:
    """What the artifacts of a run answer otherwise; nothing where the images are gone."""
    folder = Path(run.folder) / "validate"
    pixels = _array(folder / "samples" / PIXELS)
    labels = _array(folder / "samples" / LABELS)
    reference = _array(folder / "pytorch" / LOGITS)
    if pixels is None or labels is None or reference is None or run.network is None:
        return []
    found = (_of(a, run.network.labels, pixels, labels, reference, folder) for a in run.artifacts)
    return [each for each in found if each is not None]


def thumbnail(pixels: npt.NDArray[np.uint8]) -> str:
    """An image as an address that holds it."""
    from PIL import Image

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _of(
    artifact: BuiltArtifact,
    names: tuple[str, ...],
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    reference: npt.NDArray[np.float32],
    folder: Path,
) -> Flipped | None:
    flips = artifact.accuracy.flips
    if flips is None or not flips.value:
        return None
    logits = _array(folder / f"{artifact.target}-{artifact.precision}" / LOGITS)
    if logits is None or not logits.shape == reference.shape == (len(pixels), len(names)):
        return None
    before, after = reference.argmax(1), logits.argmax(1)
    changed = np.flatnonzero(before != after)
    images = tuple(
        Answer(thumbnail(pixels[i]), names[labels[i]], names[before[i]], names[after[i]])
        for i in changed[:MOST_SHOWN]
    )
    return Flipped(artifact.name, len(changed), images)


def _array(path: Path) -> Any:
    """An array of an artifact; None where it is gone or cannot be read: a picture is no figure."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
