"""The vocabulary of all floors: images, logits, and what is known of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.labels import require_distinct
from pipeline.core.plain import Plain

Images = npt.NDArray[np.float32]
"""Preprocessed images, (batch, channels, height, width)."""

Pixels = npt.NDArray[np.uint8]
"""Images resized and cropped, not yet normalized: (batch, height, width, channels)."""

Batch = npt.NDArray[Any]
"""What a runner takes: `Images` or `Pixels`, see `Runner.takes`."""

Logits = npt.NDArray[np.float32]
"""(batch, classes), before any softmax."""


LICENCE_REMARK = "license_remark"
"""In a network's description: what the licence of its weights keeps from who ships them."""


WEIGHTS, LICENCE = "weights", "license"
"""In a network's description: where its weights are from, and under which licence."""


@dataclass(frozen=True)
class Network(Plain):
    """What every artifact carries of the network that it was made from.

    Attributes:
        name: The run's name, such as "care_tiny".
        labels: Class names in the order of the logits.
        input_shape: (channels, height, width) of a preprocessed image.
        preprocess: The preprocessing specification as plain values: size, crop, interpolation,
            mean, std, channels.
        description: Licence, author, origin: text for the formats' metadata fields, by field name.
    """

    name: str
    labels: tuple[str, ...]
    input_shape: tuple[int, int, int]
    preprocess: Mapping[str, Any]
    description: Mapping[str, str] = field(default_factory=dict)

    @property
    def licence(self) -> dict[str, str]:
        """What is known of its weights: origin, licence, and what that keeps from who ships them.

        By the keys of the description; empty where nothing is stated.
        """
        keys = (WEIGHTS, LICENCE, LICENCE_REMARK)
        return {key: self.description[key] for key in keys if self.description.get(key)}

    @classmethod
    def from_facts(cls, plain: Mapping[str, Any]) -> Network:
        """The inverse of `to_dict`.

        Raises:
            ArtifactError: A value is missing or of another type, or the labels are no names.
        """
        try:
            if isinstance(plain["labels"], str):
                raise TypeError
            require_distinct(plain["labels"], "the network")
            channels, height, width = plain["input_shape"]
            return cls(
                name=plain["name"],
                labels=tuple(plain["labels"]),
                input_shape=(channels, height, width),
                preprocess=plain["preprocess"],
                description=plain.get("description", {}),
            )
        except DataError as error:
            raise ArtifactError(f"{error}: build it again") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError("the network is not stated in full: build it again") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for an artifact's facts, which `from_facts` reads."""
        return {
            "name": self.name,
            "labels": list(self.labels),
            "input_shape": list(self.input_shape),
            "preprocess": dict(self.preprocess),
            "description": dict(self.description),
        }


def in_batches(run: Callable[[Batch], Logits], images: Batch, size: int, least: int = 1) -> Logits:
    """Logits of any number of images by what takes batches of limited sizes.

    Args:
        run: Gives logits of a batch, such as a `Runner`.
        images: What `run` takes, images along the first axis.
        size: Images at a time.
        least: Fewest images that `run` takes: a smaller rest is filled up with its last image.

    Returns:
        (images, classes).
    """
    parts = []
    for start in range(0, max(1, len(images)), size):
        part = images[start : start + size]
        filled = np.concatenate([part, np.repeat(part[-1:], max(0, least - len(part)), 0)])
        parts.append(run(filled)[: len(part)])
    return np.concatenate(parts)


def whole_batches(images: Images, size: int) -> Images:
    """As many images as fill batches of `size`: the first ones again behind the last."""
    total = -(-len(images) // size) * size
    if total == len(images):
        return images
    return images[np.arange(total) % len(images)]
