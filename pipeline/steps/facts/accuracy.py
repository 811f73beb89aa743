"""Facts of validation: how accurate an artifact is, and how close to PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.figures import Number
from pipeline.core.plain import Facts, Plain
from pipeline.core.runner import Numerics


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
    """

    top1: Number
    top5: Number
    agreement: Number | None = None
    flips: Number | None = None
    cosine: Number | None = None
    max_difference: Number | None = None
    top1_drop: Number | None = None

    @classmethod
    def not_measured(cls, why: str) -> Accuracy:
        """Figures that could not be had, and why."""
        return cls(*[Number.not_measured(why)] * 7)


@dataclass(frozen=True)
class ReferenceFacts(Facts):
    """PyTorch's accuracy.

    Attributes:
        numbers: The figures.
    """

    numbers: Accuracy


@dataclass(frozen=True)
class ValidationFacts(Facts):
    """An artifact's accuracy.

    Attributes:
        target: The target.
        precision: The precision.
        numbers: The figures.
        numerics: What values the artifact had; None where nothing looks at them.
    """

    target: str
    precision: str
    numbers: Accuracy
    numerics: Numerics | None = None
