"""A model's file as something that answers: an ONNX graph or a Core ML package, whoever made it.

What a file does not say of itself, how images are prepared and what its classes are called, has to
be stated: a guess would be answered as readily, and wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.api.model import Answering
from pipeline.core.described import NOTHING, Described, described_by
from pipeline.core.errors import ArtifactError, CheckpointError, InputError
from pipeline.core.labels import imagenet_labels, read_labels
from pipeline.core.network import Batch, Logits, Network
from pipeline.core.plain import parse_json
from pipeline.core.preprocess import Preprocess
from pipeline.core.runner import Runner

if TYPE_CHECKING:
    from pipeline.emulate.mil.executor import MilExecutor

GRAPH, PACKAGE = ".onnx", ".mlpackage"
"""Endings of the files that are known."""

IMAGENET = "imagenet-1k"
_CROP = 0.875
_OWN_LOGITS = "logits"  # what packages of this project call theirs


@dataclass(frozen=True)
class Stated:
    """What a user says of a model's file; None for what the file says itself.

    Attributes:
        labels: A text file with a class a line, or "imagenet-1k".
        size: Height and width of images.
        crop: Share of the shorter side that the centre crop keeps.
        mean: By channel, for pixels of 0 … 1.
        std: Likewise.
    """

    labels: str | None = None
    size: int | None = None
    crop: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class NormalizesItselfError(InputError):
    """Mean or std were stated of a model that takes pixels."""


def is_model_file(path: str | Path) -> bool:
    """Whether a path is called as models' files are."""
    return Path(path).suffix.lower() in (GRAPH, PACKAGE)


def open_file(path: Path, stated: Stated, threads: int | None = None) -> Answering:
    """Open a model's file to ask it.

    Args:
        path: An ONNX graph, or the folder of a Core ML package.
        stated: What the file does not say.
        threads: CPU threads for an ONNX graph; None for all.

    Raises:
        InputError: It is no classifier of images, or something has to be stated.
        ArtifactError: It is damaged, or its runtime does not accept it.
    """
    suffix = path.suffix.lower()
    if suffix == GRAPH:
        return _graph(path, stated, threads)
    if suffix == PACKAGE:
        return _package(path, stated)
    raise InputError(f"{path} is no model's file: name an ONNX graph (.onnx) or a .mlpackage")


def _graph(path: Path, stated: Stated, threads: int | None) -> Answering:
    from pipeline.graphs.given import look
    from pipeline.targets.given import fast_runner

    _require(path.is_file(), path)
    found = look(path, built=True)
    said = said_by(found.metadata, path)
    preprocess = preprocess_of(stated, said, found.shape, normalizes=False)
    runner = fast_runner(path, threads)
    return _answering(path, stated, said.labels, preprocess, runner, "")


def _package(path: Path, stated: Stated) -> Answering:
    from pipeline.emulate.mil.executor import MilExecutor

    _require(path.is_dir(), path)
    executor = MilExecutor(path)
    (taken,) = executor.program.inputs
    kept = executor.program.metadata
    said = said_by({**kept, "preprocess": kept.get("preprocessing", "")}, path)
    takes: Literal["images", "pixels"] = "pixels" if taken.kind == "image" else "images"
    sides = taken.shape if takes == "pixels" else taken.shape[1:]
    if len(sides) != 3:
        raise InputError(f"{path}: its input {taken.name!r} is no image, nor an array of images")
    shape = (sides[0], sides[1], sides[2])
    preprocess = preprocess_of(stated, said, shape, normalizes=takes == "pixels")
    runner = _PackageRunner(executor, takes)
    why = "the ML Program executor answers for Core ML"
    return _answering(path, stated, executor.labels or said.labels, preprocess, runner, why)


def _require(there: bool, path: Path) -> None:
    if not there:
        what = "is something else" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: name an ONNX graph (.onnx) or a .mlpackage")


class _PackageRunner(Runner):
    """A Core ML package, by the ML Program executor.

    Args:
        executor: Of the package.
        takes: See `Runner`.
    """

    def __init__(self, executor: MilExecutor, takes: Literal["images", "pixels"]) -> None:
        self._executor = executor
        self.takes = takes  # type: ignore[misc]  # of a package, not of all packages
        self.device = "ML Program executor on the CPU, results rounded to float16 where typed so"

    def __call__(self, images: Batch) -> Logits:
        """See `Runner.__call__`."""
        outputs = {feature.name for feature in self._executor.program.outputs}
        if _OWN_LOGITS in outputs:
            logits: Logits = self._executor.predict(images)[_OWN_LOGITS]
            return logits
        return self._executor.logits(images)


def said_by(metadata: Mapping[str, str], path: Path) -> Described:
    """What a file says of itself in the words of this project; what others write says nothing."""
    found: dict[str, Any] = {}
    try:
        for key in ("labels", "preprocess"):
            if text := metadata.get(key):
                found[key] = parse_json(text, key, CheckpointError)
        return described_by(found, path)
    except CheckpointError:
        return NOTHING


def preprocess_of(
    stated: Stated,
    said: Described,
    shape: tuple[int | None, int | None, int | None],
    *,
    normalizes: bool,
) -> Preprocess:
    """How images are prepared, as far as it is stated or said.

    Raises:
        InputError: Something is neither, or does not fit.
    """
    own = said.preprocess
    depth, height, width = shape
    if height != width:
        raise InputError(f"it takes images of {height} x {width} pixels, and only squares are made")
    size = stated.size or height or (own.size if own else None)
    if size is None:
        raise InputError("the size of its images is left open: state it with --size")
    if height not in (None, size):
        raise InputError(f"--size {size}: it takes images of {height} pixels")
    mean, std = stated.mean or (own.mean if own else None), stated.std or (own.std if own else None)
    channels = depth or len(mean or (0, 0, 0))
    if normalizes:
        if stated.mean or stated.std:
            raise NormalizesItselfError(
                "it takes pixels and normalizes them itself: leave out --mean and --std"
            )
        mean, std = (0.0,) * channels, (1.0,) * channels
    if mean is None or std is None:
        raise InputError(
            "it does not say how pixels are normalized: state --mean and --std, such as "
            "0.485,0.456,0.406 and 0.229,0.224,0.225 for ImageNet's, or 0 and 1 for none"
        )
    values = {
        "size": size,
        "crop": stated.crop or (own.crop if own else _CROP),
        "interpolation": own.interpolation if own else "bicubic",
        "mean": _each(mean, channels, "--mean"),
        "std": _each(std, channels, "--std"),
        "channels": "gray" if channels == 1 else "rgb",
        "exif": own.exif if own else "apply",
        "crop_mode": own.crop_mode if own else "center",
    }
    return Preprocess.from_dict(values)


def _each(values: tuple[float, ...], channels: int, option: str) -> list[float]:
    """A value for each channel: one stands for all."""
    if len(values) not in (1, channels):
        raise InputError(f"{option} has {len(values)} values, and images {channels} channels")
    return list(values) * (channels if len(values) == 1 else 1)


def _answering(
    path: Path,
    stated: Stated,
    own: tuple[str, ...] | None,
    preprocess: Preprocess,
    runner: Runner,
    why: str,
) -> Answering:
    shape = (preprocess.depth, preprocess.size, preprocess.size)
    unnamed = Network(path.name, (), shape, preprocess.to_dict())
    count = _classes(Answering(path.name, unnamed, runner, why, "its precision"))
    labels = _stated_labels(stated) or own or tuple(map(str, range(count)))
    if len(labels) != count:
        raise InputError(
            f"{path} gives {count} logits, and there are {len(labels)} labels: state its classes "
            "in its order with --labels"
        )
    network = Network(path.name, labels, shape, preprocess.to_dict())
    return Answering(path.name, network, runner, why, "its precision")


def _classes(model: Answering) -> int:
    """Logits of an image, as a black one shows."""
    from pipeline.targets.ort.session import errors

    depth, height, width = model.network.input_shape
    try:
        logits = model(np.zeros((1, height, width, depth), np.uint8))
    except errors() as error:
        raise ArtifactError(f"{model.name} does not run: {' '.join(str(error).split())}") from error
    if logits.ndim != 2:
        raise InputError(f"{model.name} gives an array of {logits.shape}: it is no classifier")
    return int(logits.shape[1])


def _stated_labels(stated: Stated) -> tuple[str, ...] | None:
    if stated.labels is None:
        return None
    if stated.labels == IMAGENET:
        return imagenet_labels()[1]
    path = Path(stated.labels).expanduser()
    if not path.is_file():
        raise InputError(f"--labels: {path} is no file: name a text file, or {IMAGENET}")
    return read_labels(path)[1]
