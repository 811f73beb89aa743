"""Stages that decode and preprocess images once, for all that comes after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import about
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.names import LABELS, PIXELS, SOURCES
from pipeline.steps.facts.graphs import CalibrationFacts
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    from care.data import Dataset
    from pipeline.source import Source


class SampleStep(StageStep):
    """The validation images, resized and cropped, as uint8: one set for all targets."""

    stage = "validate"
    from_source = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, "validate/samples")

    def inputs(self) -> Mapping[str, Any]:
        """The dataset, which images of it, and how they are preprocessed."""
        settings = self.context.config.validation.model_dump(include={"images"})
        return {
            **self.source.network_inputs(),
            **self.source.data_inputs("validation"),
            "settings validation": settings,
        }

    def tools(self) -> dict[str, str]:
        """The decoder."""
        return {**self.source.tools(), **versions("pillow", "numpy")}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Decode and preprocess the images."""
        dataset = self.source.validation
        wanted = self.context.config.validation.images or len(dataset)
        # Evenly over the set, which is sorted by class.
        count = min(wanted, len(dataset))
        indices = np.linspace(0, len(dataset), count, endpoint=False).astype(np.int64)
        write_samples(folder, self.context, dataset, indices)
        self.beside["data"] = self.source.uri("validation")
        return {
            "images": count,
            "of": len(dataset),
            "data": self.source.data_facts("validation"),
            "network": self.source.network.to_dict(),
        }


class CalibrationStep(StageStep):
    """The calibration images: a class-balanced sample of the training split."""

    stage = "calibrate"
    from_source = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, "calibration")

    def inputs(self) -> Mapping[str, Any]:
        """The datasets, the sample, and how its images are preprocessed."""
        settings = self.context.config.calibration.model_dump(include={"images", "seed"})
        return {
            **self.source.network_inputs(),
            **self.source.data_inputs("calibration"),
            **self.source.data_inputs("validation"),
            "settings calibration": settings,
        }

    def tools(self) -> dict[str, str]:
        """The decoder."""
        return {**self.source.tools(), **versions("pillow", "numpy")}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Choose, decode and preprocess the images."""
        from calibration import sample

        source, settings = self.source, self.context.config.calibration
        dataset = source.calibration
        self.context.progress(0, None, "looking for validation images among them")
        with about("data"):
            judging = sample.hashes_of(source.validation)
            chosen = sample.draw(dataset, settings.images, validation=judging, seed=settings.seed)
        write_samples(folder, self.context, dataset, np.array(chosen.indices, dtype=np.int64))
        self.beside["data"] = source.uri("calibration")
        return CalibrationFacts(
            images=len(chosen.indices),
            digest=chosen.digest,
            warnings=tuple(chosen.warnings),
            more={
                "data": source.data_facts("calibration"),
                "network": source.network.to_dict(),
            },
        ).to_facts()


def write_samples(
    folder: Path, context: RunContext, dataset: Dataset, indices: npt.NDArray[np.int64]
) -> None:
    """Write pixels, labels and sources of some images of a dataset.

    Raises:
        DataError: An image cannot be read, or its class is unknown to the network.
    """
    source: Source = context.source
    depth, height, width = source.network.input_shape
    classes = source.class_indices(dataset)
    # One after the other: a whole validation set need not fit into memory. A memory map would do
    # that too, but on a full disk the system ends a program that writes through one (SIGBUS).
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), height, width, depth)}
    with (folder / PIXELS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i, image in enumerate(source.samples(dataset, indices)):
            file.write(np.ascontiguousarray(image, dtype=np.uint8).data)
            if i % 50 == 0:
                context.progress(i, len(indices), "decoding images")
    labels = [classes[dataset.label(int(i))] for i in indices]
    np.save(folder / LABELS, np.array(labels, dtype=np.int64))
    hashes = [[dataset.name(int(i)), dataset.hash(int(i))] for i in indices]
    (folder / SOURCES).write_text(json.dumps(hashes))
