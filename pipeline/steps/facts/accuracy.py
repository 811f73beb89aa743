"""Facts of validation: how accurate an artifact is, and how close to PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.core.figures import Number
from pipeline.core.plain import Facts, Plain
from pipeline.core.runner import Numerics
from pipeline.steps.facts.golden import Expected


@dataclass(frozen=True)
class ByClass(Plain):
    """Top-1 of each class.

    Attributes:
        worst: The class with the lowest; of several the one with most images.
        top1: Its top-1, with Wilson's interval; `samples` are its images.
        classes: Top-1 of every class that the images show, by name.
    """

    worst: str
    top1: Number
    classes: Mapping[str, float]


@dataclass(frozen=True)
class Accuracy(Plain):
    """Figures of one artifact, or of PyTorch, over the validation images.

    Attributes:
        top1: Share of images whose label has the largest logit.
        top5: Share of images whose label is among the five largest logits.
        agreement: Share of images with PyTorch's top-1 class; None of PyTorch itself, as below.
        flips: Images with another top-1 class.
        cosine: Mean cosine of the logits and PyTorch's.
        max_difference: Largest difference of two logits.
        top1_drop: Top-1 of PyTorch minus that of the artifact.
        by_class: Top-1 of each class.
        metrics: What the user's own function gives, by name.
    """

    top1: Number
    top5: Number
    agreement: Number | None = None
    flips: Number | None = None
    cosine: Number | None = None
    max_difference: Number | None = None
    top1_drop: Number | None = None
    by_class: ByClass | None = None
    metrics: Mapping[str, Number] = field(default_factory=dict)

    @classmethod
    def not_measured(cls, why: str) -> Accuracy:
        """Figures that could not be had, and why."""
        none = Number.not_measured(why)
        return cls(none, none, none, none, none, none, none)


FLOAT16_LIMIT = 65504.0
"""Largest value of float16."""


@dataclass(frozen=True)
class ModuleRange(Plain):
    """The largest value that any layer gives, in PyTorch and float32.

    Attributes:
        largest: Its magnitude; infinite where a layer gives infinity or NaN.
        at: The layer.
        first_beyond: The first layer that gives more than float16 can hold; "" if none does.
        images: Images looked at.
    """

    largest: float
    at: str
    first_beyond: str
    images: int

    @property
    def words(self) -> str:
        """That the network itself leaves the range of float16; "" if it does not."""
        if not self.first_beyond:
            return ""
        value = f"{self.largest:.2g}" if math.isfinite(self.largest) else "no finite value"
        return (
            f"the network itself leaves the range of float16: {value} at {self.at}, first at "
            f"{self.first_beyond} (PyTorch in float32, {self.images} images)"
        )


@dataclass(frozen=True)
class ReferenceFacts(Facts):
    """PyTorch's accuracy.

    Attributes:
        numbers: The figures.
        range: The range of the layers' values; None where nothing looked at them.
    """

    numbers: Accuracy
    range: ModuleRange | None = None


@dataclass(frozen=True)
class NarrowSums(Plain):
    """The second verdict: sums of products rounded as an accumulator in half precision does.

    Attributes:
        images: Images of both readings: some of the validation set, chosen with a seed.
        agreement: Share of them with PyTorch's class, with such sums.
        agreement_wide: The same with sums in float32.
        drop: `agreement_wide` minus `agreement`, with the interval of paired shares.
    """

    images: int
    agreement: Number
    agreement_wide: Number
    drop: Number

    @property
    def differ(self) -> bool:
        """Whether the two readings judge differently, beyond noise."""
        assert self.drop.interval is not None
        low, high = self.drop.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class EmulationError(Plain):
    """How far the emulation is from the hardware, where an artifact was measured on it.

    Attributes:
        images: Images of both readings: some of the validation set, chosen with a seed.
        by: What emulated.
        measured: Top-1 on the hardware over these images.
        emulated: Top-1 of the emulation.
        difference: `measured` minus `emulated`, with the interval of paired shares.
        agreement: Share of the images with the same class.
        max_difference: Largest difference of two logits.
    """

    images: int
    by: str
    measured: Number
    emulated: Number
    difference: Number
    agreement: Number
    max_difference: Number

    @property
    def is_proven(self) -> bool:
        """Whether the emulation judges otherwise than the hardware, beyond noise."""
        assert self.difference.interval is not None
        low, high = self.difference.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class PhotoCheck(Plain):
    """What the model gives that prepares photographs itself, beside the one that gets images.

    Attributes:
        images: How many photographs, as decoded.
        by: What ran it.
        top1: Its top-1, as a share.
        drop: Top-1 of the other minus its own, over the same images, with its paired interval.
        agreement: Share of them with the same class by both.
        max_difference: Largest difference of two logits.
    """

    images: int
    by: str
    top1: Number
    drop: Number
    agreement: Number
    max_difference: Number

    @property
    def is_worse(self) -> bool:
        """Whether it is proven to lose accuracy."""
        return self.drop.interval is not None and self.drop.interval[0] > 0


@dataclass(frozen=True)
class ValidationFacts(Facts):
    """An artifact's accuracy.

    Attributes:
        target: The target.
        precision: The precision.
        numbers: The figures.
        numerics: What values the artifact had; None where nothing looks at them.
        narrow_sums: The second verdict; None where nothing sums in half precision, or it ran.
        golden: What it gives for the golden kit; None where that is not finite, or not known.
        emulation: How far its emulation is from it; None where it was not measured on hardware, or
            cannot be emulated.
        photo: What its model with preprocessing inside gives; None where it has none.
    """

    target: str
    precision: str
    numbers: Accuracy
    numerics: Numerics | None = None
    narrow_sums: NarrowSums | None = None
    golden: Expected | None = None
    emulation: EmulationError | None = None
    photo: PhotoCheck | None = None
