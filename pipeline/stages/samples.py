"""Stages that decode and preprocess images once, for all that comes after."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import about
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.images import evenly
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
            **_set_aside(self.context),
            "settings validation": settings,
        }

    def tools(self) -> dict[str, str]:
        """The decoder."""
        return {**self.source.tools(), **versions("pillow", "numpy")}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Decode and preprocess the images."""
        dataset = self.source.validation
        indices = evenly(len(dataset), self.context.config.validation.images)
        classes = self.source.class_indices(dataset)
        labels = np.array([classes[dataset.label(int(i))] for i in indices], dtype=np.int64)
        write_samples(folder, self.context, dataset, indices, labels)
        self.beside["data"] = self.source.uri("validation")
        return {
            "images": len(indices),
            "of": len(dataset),
            "data": self.source.data_facts("validation"),
            "network": self.source.network.to_dict(),
        }


class CalibrationStep(StageStep):
    """The calibration images: a sample of the training split, balanced over classes it states."""

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
            **_set_aside(self.context),
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
            if source.sets_aside:
                dataset = _without(dataset, judging)
            chosen = sample.draw(dataset, settings.images, validation=judging, seed=settings.seed)
        indices = np.array(chosen.indices, dtype=np.int64)
        labels = source.known_labels(dataset, indices)
        write_samples(folder, self.context, dataset, indices, labels)
        self.beside["data"] = source.uri("calibration")
        return CalibrationFacts(
            images=len(chosen.indices),
            digest=chosen.digest,
            warnings=(*chosen.warnings, *self._warnings(labels)),
            more={
                "data": source.data_facts("calibration"),
                "network": source.network.to_dict(),
            },
        ).to_facts()

    def _warnings(self, labels: npt.NDArray[np.int64]) -> Iterator[str]:
        """What to know of where the images come from."""
        if self.source.sets_aside and not self.source.judges_held_out:
            aside, judging = len(self.source.calibration), len(self.source.validation)
            yield (
                f"there are no training images: {aside} of {aside + judging} validation images "
                "were set aside for calibration, and nothing is judged on them"
            )
        unknown = int((labels < 0).sum())
        if unknown:
            yield (
                f"{unknown} of {len(labels)} calibration images state no class of the network: "
                "for them the float network's answer counts as right"
            )


def _without(dataset: Dataset, hashes: Collection[str]) -> Dataset:
    """The images that are no copies of others: a picture may lie in a set twice."""
    from care.data import Subset

    own = [index for index in range(len(dataset)) if dataset.hash(index) not in hashes]
    return Subset(dataset, np.array(own, dtype=np.int64))


def _set_aside(context: RunContext) -> dict[str, Any]:
    """What decides which validation images calibrate; nothing where none do, for a key."""
    if not context.source.sets_aside:
        return {}
    settings = context.config.calibration.model_dump(include={"images", "seed"})
    return {"validation images set aside for calibration": settings}


def write_samples(
    folder: Path,
    context: RunContext,
    dataset: Dataset,
    indices: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
) -> None:
    """Write pixels, labels and sources of some images of a dataset.

    Args:
        folder: Where to write.
        context: The run's.
        dataset: The images.
        indices: Which of them.
        labels: Their classes among the logits, -1 where that is not known.

    Raises:
        DataError: An image cannot be read.
    """
    source: Source = context.source
    depth, height, width = source.network.input_shape
    # One after the other: a whole validation set need not fit into memory. A memory map would do
    # that too, but on a full disk the system ends a program that writes through one (SIGBUS).
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), height, width, depth)}
    with (folder / PIXELS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i, image in enumerate(source.samples(dataset, indices)):
            file.write(np.ascontiguousarray(image, dtype=np.uint8).data)
            if i % 50 == 0:
                context.progress(i, len(indices), "decoding images")
    np.save(folder / LABELS, labels)
    hashes = [[dataset.name(int(i)), dataset.hash(int(i))] for i in indices]
    (folder / SOURCES).write_text(json.dumps(hashes))
