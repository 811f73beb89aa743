"""What a trained checkpoint says of itself, as far as a run needs to be told nothing else.

`care.train` writes its classes, its preprocessing and the images that it held out into the header
of the weights' file; what says none of it says nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import stated_metadata
from pipeline.core.errors import ArtifactError, CheckpointError, DataError, PreprocessError
from pipeline.core.labels import require_distinct
from pipeline.core.plain import Plain
from pipeline.core.preprocess import Preprocess
from pipeline.core.words import shown

HOLD_OUT = "hold_out"
"""Under which a checkpoint says which images training held out."""


@dataclass(frozen=True)
class HoldOut(Plain):
    """Which images training held out, and judged itself by.

    Attributes:
        share: Of each class, in (0, 1).
        seed: Chose them.
        identity: `Dataset.identity` of the whole: only of this list the same images are chosen.
    """

    share: float
    seed: int
    identity: str


QUANTIZED = "quantized"
"""Under which a checkpoint says in which precision it was trained."""


@dataclass(frozen=True)
class Quantized(Plain):
    """In which precision a network was fine-tuned, and with which ranges.

    Attributes:
        precision: Its name, such as "ort/int7".
        ranges: Smallest and largest value of each tensor that is stored in 8 bits, by its name in
            the graph that the target is given.
    """

    precision: str
    ranges: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of itself.

    Attributes:
        labels: Its classes in the order of the logits; None if it does not say.
        preprocess: How images become its input; None if it does not say.
        hold_out: Which images training held out; None if none of these, or if it does not say.
        quantized: In which precision it was fine-tuned; None if in none.
    """

    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    hold_out: HoldOut | None = None
    quantized: Quantized | None = None


NOTHING = Described()
"""Of a checkpoint that says nothing, and of none."""


def describe(path: Path) -> Described:
    """Read what a checkpoint says of itself.

    Args:
        path: The checkpoint; only safetensors files, which training writes, say anything.

    Raises:
        CheckpointError: It cannot be read, or says something else than training writes.
    """
    return described_by(stated_metadata(path) or {}, path)


def described_by(stated: Mapping[str, Any], path: Path) -> Described:
    """What a file says of itself.

    Args:
        stated: Its metadata as plain values.
        path: The file, for messages.

    Raises:
        CheckpointError: It says something else than training writes.
    """
    try:
        return Described(
            _labels(stated), _preprocess(stated), _hold_out(stated), _quantized(stated)
        )
    except (ArtifactError, DataError, PreprocessError) as error:
        raise CheckpointError(
            f"{path} was refused: in its metadata, {error}; take a checkpoint that you trust"
        ) from error


def _labels(stated: Mapping[str, Any]) -> tuple[str, ...] | None:
    labels = stated.get("labels")
    if not labels:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"labels is {shown(repr(labels))}, no list of names")
    require_distinct(labels, "labels")
    return tuple(labels)


def _preprocess(stated: Mapping[str, Any]) -> Preprocess | None:
    values = stated.get("preprocess")
    return None if values is None else Preprocess.from_dict(values)


def _hold_out(stated: Mapping[str, Any]) -> HoldOut | None:
    values = stated.get(HOLD_OUT)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ArtifactError(f"{HOLD_OUT} is {shown(repr(values))}, no mapping")
    found = HoldOut.from_dict(values, HOLD_OUT)
    if not 0 < found.share < 1 or found.seed < 0:
        raise ArtifactError(f"{HOLD_OUT} is {shown(repr(values))}, no share and no seed")
    return found


def _quantized(stated: Mapping[str, Any]) -> Quantized | None:
    values = stated.get(QUANTIZED)
    return None if values is None else quantized_of(values, QUANTIZED)


def quantized_of(values: object, where: str) -> Quantized:
    """In which precision a network was fine-tuned, of plain values that anybody may have written.

    Args:
        values: As `Quantized.to_dict` gives them.
        where: Where they stand, for messages.

    Raises:
        ArtifactError: They are others, or a range is none.
    """
    if not isinstance(values, dict):
        raise ArtifactError(f"{where} is {shown(repr(values))}, no mapping")
    found = Quantized.from_dict(values, where)
    for name, (low, high) in found.ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ArtifactError(f"{where}: the range of {shown(name)} is [{low}, {high}]")
    return found
