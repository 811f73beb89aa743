"""The step that measures what other ways of preparing images cost: `resizes` asks for it.

No run needs it, and none waits for it: the report shows what lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core import figures
from pipeline.core.errors import UnavailableError
from pipeline.core.figures import Number, measured_here
from pipeline.core.network import in_batches
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.core.runner import Runner
from pipeline.emulate.resizes import SIDES, Photo, Way, ways, why_nothing
from pipeline.stages.context import RunContext, StageStep
from pipeline.stages.images import evenly
from pipeline.stages.target_step import code_beside
from pipeline.steps.facts.bench import PYTORCH
from pipeline.steps.facts.resizes import ResizesFacts, WayCost
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    from care.data import Dataset
    from pipeline.core.network import Pixels
    from pipeline.stages.build import BuildStep
    from pipeline.stages.samples import SampleStep

_AT_ONCE = 32
"""Photographs that are in memory at a time, in all ways."""

Answers = npt.NDArray[np.int64]
"""The class that each image was taken for, (images,); -1 where a logit is no number."""


class ResizesStep(StageStep):
    """What other ways of preparing images cost the network, or one of its artifacts.

    Args:
        context: The run's.
        samples: Which images.
        build: The artifact; None for the reference.
        images: Most images.
    """

    stage = "validate"
    from_source = True

    def __init__(
        self, context: RunContext, samples: SampleStep, build: BuildStep | None, images: int
    ) -> None:
        self.built, self.images = build, images
        self.judged = build.name if build else PYTORCH
        requires = [samples, build] if build else [samples]
        super().__init__(context, f"resizes/{self.judged.replace('/', '-')}", requires)

    def modules(self) -> list[str]:
        """The step's own, and those of the target that runs the artifact."""
        own = super().modules()
        return [*own, type(self.built.runtime).__module__] if self.built else own

    def code(self) -> dict[str, str]:
        """See `Step.code`; what a target does beside running artifacts is left out."""
        if self.built is None:
            return super().code()
        return code_beside(self.context, self.built.runtime, self.modules())

    def inputs(self) -> Mapping[str, Any]:
        """The network, and how many images."""
        return {
            **self.source.network_inputs(),
            **self.source.data_inputs("validation"),
            "settings of resizes": {"images": self.images},
        }

    def made_from(self) -> dict[str, str]:
        """The samples, the artifact and the checkpoint."""
        return {**super().made_from(), "checkpoint": self.source.checkpoint_hash}

    def tools(self) -> dict[str, str]:
        """What decodes, resizes and answers."""
        found = {**self.source.tools(), **versions("pillow", "numpy", "torchvision")}
        return {**found, **self.built.runtime.versions()} if self.built else found

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Prepare the images in every way, and judge the answers."""
        dataset = self.source.validation
        judging = evenly(len(dataset), self.context.config.validation.images)
        indices = judging[evenly(len(judging), self.images)]
        labels = self.source.class_indices(dataset)[dataset.labels[indices]]
        with self._runner() as runner:
            facts = measure(
                runner,
                photos(dataset, indices, self.source.preprocess),
                labels,
                self.source.preprocess,
                judged=self.judged,
                of=len(dataset),
                tell=lambda done: self.context.progress(done, len(indices), "preparing images"),
            )
        return facts.to_facts()

    def _runner(self) -> Runner:
        """What answers.

        Raises:
            UnavailableError: The artifact does not run on this machine.
        """
        if self.built is None:
            return self.source.reference()
        artifact = self.built.artifact()
        missing = self.built.runtime.missing(artifact)
        if missing is not None:
            raise UnavailableError(
                f"{self.judged} not measured: {missing}; leave out --artifact to judge the network"
            )
        return self.built.runtime.open_to_judge(artifact)


def photos(
    dataset: Dataset, indices: npt.NDArray[np.int64], preprocess: Preprocess
) -> Iterable[Photo]:
    """Some images of a dataset, decoded and as files, one by one.

    Raises:
        DataError: One cannot be read.
    """
    for index in indices.tolist():
        encoded = dataset.encoded(index)
        yield Photo(dataset.image(index), encoded[0] if encoded else None, preprocess)


def measure(
    runner: Runner,
    images: Iterable[Photo],
    labels: npt.NDArray[np.int64],
    preprocess: Preprocess,
    *,
    judged: str,
    of: int,
    tell: Callable[[int], object] = lambda done: None,
) -> ResizesFacts:
    """Judge every way on the same images.

    Args:
        runner: Answers.
        images: The photographs.
        labels: Their classes among the logits, (images,).
        preprocess: The network's own.
        judged: What answers, by name.
        of: How many images there are in all.
        tell: Is told how many images are done.
    """
    tried = _Tried(runner, preprocess)
    waiting = iter(images)
    while part := list(islice(waiting, _AT_ONCE)):
        tried.add(part)
        tell(tried.images)
    top1 = _share(tried.own == labels, runner.device)
    return ResizesFacts(
        judged,
        runner.device,
        _in_words(preprocess),
        len(labels),
        of,
        tried.fitting,
        top1,
        tuple(tried.cost(way, labels) for way in tried.ways),
    )


class _Tried:
    """Answers by every way so far.

    Args:
        runner: Answers.
        preprocess: The network's own.
    """

    def __init__(self, runner: Runner, preprocess: Preprocess) -> None:
        self.runner, self.preprocess = runner, preprocess
        self.ways = ways(preprocess)
        self.images = self.fitting = 0
        self._own: list[Answers] = []
        self._answers: dict[str, list[Answers]] = {way.name: [] for way in self.ways}
        self._changed = dict.fromkeys(self._answers, 0)
        self._levels = dict.fromkeys(self._answers, 0.0)

    @property
    def own(self) -> Answers:
        """Answers by the network's own preprocessing."""
        return np.concatenate(self._own)

    def add(self, part: Sequence[Photo]) -> None:
        """Prepare some photographs in every way, and ask."""
        self.images += len(part)
        self.fitting += sum(photo.fits for photo in part)
        pixels = np.stack([photo.own for photo in part])
        own = self._ask(pixels, self.preprocess)
        self._own.append(own)
        for way in self.ways:
            self._answers[way.name].append(self._by(way, part, pixels, own))

    def _by(self, way: Way, part: Sequence[Photo], own: Pixels, answers: Answers) -> Answers:
        """Answers by one way; images that come out the same are not asked of again."""
        if self._impossible(way):
            return answers
        pixels = np.stack([way.pixels(photo) for photo in part])
        normalized = way.normalized or self.preprocess
        differ = (pixels != own).any((1, 2, 3)) | (normalized != self.preprocess)
        if not differ.any():
            return answers
        distances = np.abs(pixels[differ].astype(np.int16) - own[differ]).mean((1, 2, 3))
        self._changed[way.name] += int(differ.sum())
        self._levels[way.name] += float(distances.sum())
        found = answers.copy()
        found[differ] = self._ask(pixels[differ], normalized)
        return found

    def _impossible(self, way: Way) -> bool:
        return way.normalized is not None and self.runner.takes == "pixels"

    def _ask(self, pixels: Pixels, preprocess: Preprocess) -> Answers:
        runner = self.runner
        given = runner.input_of(Pictures(pixels, preprocess))
        size = max(runner.smallest, min(_AT_ONCE, runner.largest or _AT_ONCE))
        return figures.answers(in_batches(runner, given, size, runner.smallest))

    def cost(self, way: Way, labels: npt.NDArray[np.int64]) -> WayCost:
        """What came of one way."""
        changed = self._changed[way.name]
        if not changed:
            why = (
                "the artifact takes pixels and normalizes them itself"
                if self._impossible(way)
                else why_nothing(way, self.images, self.fitting, self.preprocess)
            )
            none = Number.not_measured(why)
            return WayCost(way.name, way.title, 0, 0.0, none, none, none, why)
        own, found, by = self.own, np.concatenate(self._answers[way.name]), self.runner.device
        drop = figures.paired(found == labels, own == labels)
        return WayCost(
            way.name,
            way.title,
            changed,
            self._levels[way.name] / changed,
            _share(found == labels, by),
            Number(drop.value, measured_here(), by=by, samples=len(own), interval=drop.interval),
            _share(found == own, by),
        )


def _share(hits: npt.NDArray[np.bool_], by: str) -> Number:
    count, total = int(hits.sum()), len(hits)
    interval = figures.wilson(count, total)
    return Number(count / total, measured_here(), by=by, samples=total, interval=interval)


def _in_words(preprocess: Preprocess) -> str:
    side = SIDES[preprocess.crop_mode]
    return (
        f"Pillow, {preprocess.interpolation}: {side} to {preprocess.resized}, the middle "
        f"{preprocess.size} x {preprocess.size}"
    )
