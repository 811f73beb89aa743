"""Stages that decode and preprocess images once, for all that comes after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibration.sample import CalibrationSet
from pipeline.core.errors import about
from pipeline.core.network import Images
from pipeline.source import Source
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.graphs import CalibrationFacts
from pipeline.steps.keys import versions
from pipeline.steps.step import Context, Step

if TYPE_CHECKING:
    from care.data import Dataset

PIXELS = "pixels.npy"
LABELS = "labels.npy"
SOURCES = "sources.json"

Pixels = npt.NDArray[np.uint8]


class SampleStep(Step):
    """The validation images, resized and cropped, as uint8: one set for all targets."""

    stage = "validate"

    def __init__(self, context: Context) -> None:
        super().__init__(context, "validate/samples")

    def inputs(self) -> Mapping[str, Any]:
        """The dataset, which images of it, and how they are preprocessed."""
        config, source = self.context.config, self.context.source
        return {
            "data": source.data_inputs(config.data.validation),
            "images": config.validation.images,
            "network": source.network_inputs(),
        }

    def tools(self) -> dict[str, str]:
        """The decoder."""
        return versions("pillow")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Decode and preprocess the images."""
        source = self.context.source
        dataset = source.validation
        wanted = self.context.config.validation.images or len(dataset)
        # Evenly over the set, which is sorted by class.
        count = min(wanted, len(dataset))
        indices = np.linspace(0, len(dataset), count, endpoint=False).astype(np.int64)
        write_samples(folder, self.context, dataset, indices)
        return {"images": count, "of": len(dataset)}


class CalibrationStep(Step):
    """The calibration images: a class-balanced sample of the training split."""

    stage = "calibrate"
    code = ("calibration.sample",)

    def __init__(self, context: Context) -> None:
        super().__init__(context, "calibration")

    def inputs(self) -> Mapping[str, Any]:
        """The datasets, the sample, and how its images are preprocessed."""
        config, source = self.context.config, self.context.source
        return {
            "data": source.data_inputs(config.data.calibration),
            "validation": source.data_inputs(config.data.validation),
            "sample": config.calibration.model_dump(include={"images", "seed"}),
            "network": source.network_inputs(),
        }

    def tools(self) -> dict[str, str]:
        """The decoder."""
        return versions("pillow")

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Choose, decode and preprocess the images."""
        from calibration import sample

        source, settings = self.context.source, self.context.config.calibration
        dataset = source.calibration
        self.context.progress(0, None, "looking for validation images among them")
        with about("data"):
            judging = sample.hashes_of(source.validation)
            chosen = sample.draw(dataset, settings.images, validation=judging, seed=settings.seed)
        write_samples(folder, self.context, dataset, np.array(chosen.indices, dtype=np.int64))
        facts = CalibrationFacts(len(chosen.indices), chosen.digest, tuple(chosen.warnings))
        return facts.to_facts()


def write_samples(
    folder: Path, context: Context, dataset: Dataset, indices: npt.NDArray[np.int64]
) -> None:
    """Write pixels, labels and sources of some images of a dataset.

    Raises:
        DataError: An image cannot be read, or its class is unknown to the network.
    """
    source = context.source
    shape = source.network.input_shape
    classes = source.class_indices(dataset)
    # Written through a memory map: a whole validation set need not fit into memory.
    pixels = np.lib.format.open_memmap(
        folder / PIXELS,
        mode="w+",
        dtype=np.uint8,
        shape=(len(indices), shape[1], shape[2], shape[0]),
    )
    for i, image in enumerate(source.samples(dataset, indices)):
        pixels[i] = image
        if i % 50 == 0:
            context.progress(i, len(indices), "decoding images")
    pixels.flush()
    labels = [classes[dataset.label(int(i))] for i in indices]
    np.save(folder / LABELS, np.array(labels, dtype=np.int64))
    hashes = [[dataset.name(int(i)), dataset.hash(int(i))] for i in indices]
    (folder / SOURCES).write_text(json.dumps(hashes))


def read_labels(artifact: Artifact) -> npt.NDArray[np.int64]:
    """Classes of the samples, (images,)."""
    labels: npt.NDArray[np.int64] = np.load(artifact.path(LABELS))
    return labels


def batches(artifact: Artifact, source: Source, size: int) -> Iterator[Images]:
    """The samples as the network's input, in batches of at most `size`."""
    pixels: Pixels = np.load(artifact.path(PIXELS), mmap_mode="r")
    for start in range(0, len(pixels), size):
        yield source.preprocess.normalize(np.asarray(pixels[start : start + size]))


def read_calibration(artifact: Artifact, source: Source) -> CalibrationSet:
    """The calibration set, in memory."""
    pixels: Pixels = np.load(artifact.path(PIXELS))
    sources = json.loads(artifact.path(SOURCES).read_text())
    return CalibrationSet(
        images=source.preprocess.normalize(pixels),
        labels=read_labels(artifact),
        hashes=tuple(digest for _, digest in sources),
    )
