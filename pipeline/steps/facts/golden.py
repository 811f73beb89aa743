"""Facts of the golden kit: images by which a device shows that it computes what was built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.plain import Facts, Plain


@dataclass(frozen=True)
class GoldenFacts(Facts):
    """One kit of a run.

    Attributes:
        images: Places of its images among the validation images.
        labels: The right class of each.
        pixels_shape: (images, height, width, channels) of the 8-bit pixels.
        input_shape: (images, channels, height, width) of the float32 input.
        classes: Logits of each image.
        input_sha256: SHA-256 of the float32 input: names the kit.
        card_shape: (height, width, channels) of the test card, resized and cropped.
        more: Whatever else is written down, such as the network with its preprocessing.
    """

    images: tuple[int, ...]
    labels: tuple[int, ...]
    pixels_shape: tuple[int, int, int, int]
    input_shape: tuple[int, int, int, int]
    classes: int
    input_sha256: str
    card_shape: tuple[int, int, int]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected(Plain):
    """What an artifact gives for the kit's images, and how far from it a device may be.

    An error is the Euclidean norm of the difference of an image's logits, relative to the norm of
    those that they are held against.

    Attributes:
        kit: `GoldenFacts.input_sha256` of the kit.
        images: Images of the kit.
        same_class: Images of which the artifact names PyTorch's class.
        error: Largest error of the artifact against PyTorch.
        mean_error: Mean of them.
        tolerance: Largest error against the artifact's own logits that a device may have.
        mean_tolerance: Largest mean of them.
    """

    kit: str
    images: int
    same_class: int
    error: float
    mean_error: float
    tolerance: float
    mean_tolerance: float
