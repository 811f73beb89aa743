"""Images that a measurement is made with, and what the validation answered for them.

One image again and again could be answered from memory, and its data never leaves the caches. So
timed calls get distinct images, chosen with a seed, and some of their answers are held against
those that were judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.core.answers import Answers, Drawing
from pipeline.core.figures import State
from pipeline.core.network import Logits
from pipeline.core.preprocess import Pictures
from pipeline.stages.images import pictures_at
from pipeline.stages.names import LOGITS, PIXELS
from pipeline.steps.facts.accuracy import ValidationFacts

if TYPE_CHECKING:
    from pipeline.steps.artifact import Artifact

MOST = 256
"""Distinct images: more than the calls of most measurements, and more data than caches hold."""

MOST_BYTES = 2**28
"""Memory that they may take once they are normalized."""

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Drawn:
    """Distinct images, and what is known of them.

    Attributes:
        pictures: The images.
        judged: By runner, the logits that its validation gave for them, (images, classes).
        why_not: By runner, why there are none.
        unknown: The same of all other runners.
    """

    pictures: Pictures
    judged: Mapping[str, Logits] = field(default_factory=dict)
    why_not: Mapping[str, str] = field(default_factory=dict)
    unknown: str = "nothing judged it"

    def batches(self, size: int) -> list[Pictures]:
        """The images in batches; where they are too few for one, the first ones again."""
        pixels, preprocess = self.pictures.pixels, self.pictures.preprocess
        return [Pictures(pixels[rows], preprocess) for rows in self._rows(size)]

    def _rows(self, size: int) -> list[npt.NDArray[np.int64]]:
        total = len(self.pictures)
        whole = max(1, total // size)
        return [np.arange(first, first + size) % total for first in range(0, whole * size, size)]

    def compare(self, runner: str, size: int, drawing: Drawing) -> Answers:
        """Hold answers of a runner's timed calls against its validation.

        Args:
            runner: Its name.
            size: Images in a batch.
            drawing: What was kept of them.
        """
        if runner not in self.judged:
            return Answers(why_not=self.why_not.get(runner, self.unknown))
        logits = self.judged[runner]
        return drawing.against([logits[rows] for rows in self._rows(size)])


def choose(total: int, numbers: int) -> npt.NDArray[np.int64]:
    """Which images to measure with: their indices, in a random order that a seed decides.

    Args:
        total: Images that there are.
        numbers: Values in one image.
    """
    room = max(1, MOST_BYTES // (numbers * _FLOAT32_BYTES))
    count = min(total, MOST, room)
    return np.random.default_rng(0).choice(total, count, replace=False)


def draw(samples: Artifact, judged: Mapping[str, Logits | str]) -> Drawn:
    """Choose images of the validation set.

    Args:
        samples: The decoded images.
        judged: By runner, its logits for all of them, (images, classes), or why there are none.
    """
    shape = np.load(samples.path(PIXELS), mmap_mode="r").shape
    chosen = choose(shape[0], int(np.prod(shape[1:])))
    known, why_not = {}, {}
    for name, found in judged.items():
        if isinstance(found, str):
            why_not[name] = found
        else:
            known[name] = np.asarray(found[chosen])
    return Drawn(pictures_at(samples, chosen), known, why_not)


def judged_by(validation: Artifact, samples: Artifact, build: Artifact | None) -> Logits | str:
    """Logits that a validation gave, (images, classes), or why they are none to compare with.

    Args:
        validation: Of an artifact, or of PyTorch.
        samples: The images that are measured with.
        build: The artifact that is measured; None for PyTorch.
    """
    for source in filter(None, (samples, build)):
        if validation.made_from.get(source.name) != source.digest:
            return f"{validation.name} is of an earlier {source.name}: run it again"
    if LOGITS not in validation.files:
        return f"{validation.name} judged nothing"
    if build is not None:
        facts = ValidationFacts.from_facts(validation.facts, validation.name)
        if facts.numbers.top1.state is State.EMULATED:
            return f"{validation.name} was emulated"
    logits: Logits = np.load(validation.path(LOGITS), mmap_mode="r")
    return logits
