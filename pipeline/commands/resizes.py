"""`resizes`: what does it cost to prepare images as applications do?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.commands.alone import artifact_alone, classes_among
from pipeline.commands.artifacts import builds_of, made
from pipeline.config import Config
from pipeline.core.errors import InputError, UnavailableError, about
from pipeline.core.preprocess import Preprocess
from pipeline.report import resizes as report
from pipeline.report.terminal import render
from pipeline.scheduler.plan import plan
from pipeline.stages.build import BuildStep
from pipeline.stages.context import RunContext
from pipeline.stages.images import evenly
from pipeline.stages.resizes import ResizesStep, measure, photos
from pipeline.stages.samples import SampleStep
from pipeline.steps.facts.resizes import ResizesFacts
from pipeline.targets.registry import TARGETS


@dataclass(frozen=True)
class Resizes:
    """What was measured.

    Attributes:
        text: A table for people.
        plain: The same for JSON.
    """

    text: str
    plain: dict[str, Any]


def resizes(config: Config, artifact: str | None, images: int) -> Resizes:
    """Judge the network, or an artifact, on images that are prepared otherwise; kept for reports.

    Args:
        config: The configuration.
        artifact: Such as "ort/int8"; None for the network itself.
        images: Most images.

    Raises:
        InputError: The configuration has no such artifact, or it is not built.
        UnavailableError: It does not run on this machine.
    """
    measured = made(config, lambda context: _step(context, artifact, images))
    facts = ResizesFacts.from_facts(measured.facts, measured.name)
    return _shown(facts, "the next run's report shows it, too")


def _step(context: RunContext, artifact: str | None, images: int) -> ResizesStep:
    build: BuildStep | None = None
    if artifact is not None:
        target, _, precision = artifact.partition("/")
        if target not in TARGETS or not precision:
            raise InputError(
                f"--artifact {artifact}: name target and precision, such as ort/fp32, or give the "
                "artifact's folder in place of the configuration"
            )
        (build,) = builds_of(context, target, (precision,))
    (samples,) = (step for step in plan(context) if isinstance(step, SampleStep))
    if samples.stale():
        samples.run()
    return ResizesStep(context, samples, build, images)


def resizes_alone(folder: Path, data: str, images: int) -> Resizes:
    """The same of an artifact that lies anywhere, on images of the user's; nothing is kept.

    Args:
        folder: The artifact's.
        data: Images with their classes, such as "folder:PATH".
        images: Most images.

    Raises:
        ArtifactError: The folder holds no artifact, or a damaged one.
        DataError: The images cannot be read, or show a class that the network does not have.
        UnavailableError: It does not run on this machine.
    """
    from care.data import open_dataset

    artifact = artifact_alone(folder)
    runtime = TARGETS[str(artifact.facts["target"])]
    missing = runtime.missing(artifact)
    if missing is not None:
        raise UnavailableError(f"{artifact.name} not measured: {missing}")
    network = artifact.network()
    preprocess = Preprocess.from_dict(network.preprocess)
    with about("--data"):
        dataset = open_dataset(data, "validation")
        dataset.exif = preprocess.exif
        classes = np.array(classes_among(network, dataset.classes, dataset.names_known))
        indices = evenly(len(dataset), images)
        labels = classes[dataset.labels[indices]]
        with runtime.open_to_judge(artifact) as runner:
            facts = measure(
                runner,
                photos(dataset, indices, preprocess),
                labels,
                preprocess,
                judged=artifact.name,
                of=len(dataset),
            )
    return _shown(facts)


def _shown(facts: ResizesFacts, *lines: str) -> Resizes:
    grid = report.grid(facts)
    table = Table(*grid.columns, box=None)
    for row in grid.rows:
        table.add_row(*row)
    told = [*report.nothing(facts), f"measured by {facts.by}", *lines]
    text = render(grid.title, table, *told)
    return Resizes(text, facts.to_facts())
