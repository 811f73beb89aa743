"""The golden kit: a few images by which a device shows that it computes what was built.

One kit a run, made from the validation images. What an artifact gives for it, and how far from that
a device may be, is found by its validation (`expected`); exports put both together.

Files are raw and little-endian, so that C++ and Swift read them without a library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.balanced import balanced
from pipeline.core.figures import relative_errors
from pipeline.core.network import Logits
from pipeline.core.preprocess import Preprocess
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.images import pictures_at, preprocess_of, read_labels
from pipeline.stages.names import CARD, CARD_PIXELS, GOLDEN_INPUT, GOLDEN_PIXELS, LOGITS, PYTORCH
from pipeline.steps.facts.golden import Expected, GoldenFacts
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.stages.samples import SampleStep
    from pipeline.stages.validate import ReferenceStep

IMAGES = 16

FLOOR = 1e-4
"""Least tolerance: float32 in another order of summation gives up to some 1e-5."""


class GoldenStep(StageStep):
    """Images of all classes, as pixels and as the network's input, and PyTorch's logits."""

    stage = "validate"

    def __init__(self, context: RunContext, samples: SampleStep, reference: ReferenceStep) -> None:
        super().__init__(context, "validate/golden", [samples, reference])
        self.samples, self.reference = samples, reference

    def inputs(self) -> Mapping[str, Any]:
        """How images become the network's input."""
        return {"network": self.samples.artifact().network().to_dict()}

    def tools(self) -> dict[str, str]:
        """What resizes and normalizes."""
        return versions("numpy", "pillow")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Choose the images and write them down."""
        samples = self.samples.artifact()
        labels, preprocess = read_labels(samples), preprocess_of(samples)
        chosen = balanced(labels, IMAGES)
        pictures = pictures_at(samples, chosen)
        inputs = _bytes(pictures.images)
        card = make_card(preprocess)
        resized = preprocess.pixels(card)
        reference: Logits = np.load(self.reference.artifact().path(LOGITS))
        (folder / GOLDEN_PIXELS).write_bytes(pictures.pixels.tobytes())
        (folder / GOLDEN_INPUT).write_bytes(inputs)
        (folder / PYTORCH).write_bytes(_bytes(reference[chosen]))
        card.save(folder / CARD)
        (folder / CARD_PIXELS).write_bytes(resized.tobytes())
        return GoldenFacts(
            images=tuple(chosen.tolist()),
            labels=tuple(labels[chosen].tolist()),
            pixels_shape=_four(pictures.pixels),
            input_shape=_four(pictures.images),
            classes=reference.shape[1],
            input_sha256=hashlib.sha256(inputs).hexdigest(),
            card_shape=(resized.shape[0], resized.shape[1], resized.shape[2]),
            more={"network": samples.network().to_dict()},
        ).to_facts()


def _bytes(values: npt.NDArray[np.float32]) -> bytes:
    return values.astype("<f4").tobytes()


def _four(values: npt.NDArray[Any]) -> tuple[int, int, int, int]:
    first, second, third, fourth = values.shape
    return first, second, third, fourth


def make_card(preprocess: Preprocess) -> Image.Image:
    """A picture that looks different after every other resize, crop or order of channels.

    Rings that become finer towards the rim show the filter and its antialiasing; ramps that differ
    by channel show their order; no symmetry hides a flip, and odd margins show how a crop rounds.
    """
    from PIL import Image

    height, width = 2 * preprocess.resized + 11, 3 * preprocess.resized + 38
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    away = (x - 0.45 * width) ** 2 + (y - 0.55 * height) ** 2
    rings = 0.5 + 0.5 * np.cos(np.pi * away / width)
    ramps = (x / width, y / height, 1 - (x + y) / (width + height))
    channels = [255 * (0.6 * rings + 0.4 * ramp) for ramp in ramps]
    return Image.fromarray(np.rint(np.stack(channels, -1)).astype(np.uint8))


def expected(logits: Logits, reference: Logits, kit: GoldenFacts) -> Expected | None:
    """What an artifact gives for the kit's images; None where that is not finite.

    The artifact's logits and those of a device are two roundings of one network. If each is as far
    from PyTorch as the artifact was here, they are at most twice that from each other on any image,
    and less than one and a half of it in the mean.

    Args:
        logits: The artifact's for all validation images, measured or emulated, (images, classes).
        reference: PyTorch's, likewise.
        kit: The kit.
    """
    chosen = list(kit.images)
    own, exact = logits[chosen], reference[chosen]
    if not (np.isfinite(own).all() and np.isfinite(exact).all()):
        return None
    errors = relative_errors(own, exact)
    largest, mean = float(errors.max()), float(errors.mean())
    return Expected(
        kit=kit.input_sha256,
        images=len(chosen),
        same_class=int((own.argmax(1) == exact.argmax(1)).sum()),
        error=largest,
        mean_error=mean,
        tolerance=max(FLOOR, 2 * largest),
        mean_tolerance=max(FLOOR, 1.5 * mean),
    )
