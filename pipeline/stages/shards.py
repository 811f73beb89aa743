"""Long validations in shards: logits of a thousand images each, as artifacts of their own.

    .evaluations/validate-trt-fp16/00003/
      logits.npy   of its images, (images, classes)
      noted.json   what the runner had noted of them
      artifact.json

A shard is a whole number of batches, so that every image is in the batch in which it is without
shards, and notes of shards add up to those of all images: what is joined is the same to the bit,
however many shards there are and whoever computes them. A validation that is killed goes on with
the shards that are there; a run with several processes or workers hands them out before the whole.
They go when the whole is there, which is made from no shard: its key knows none.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Logits, in_batches
from pipeline.core.plain import read_json
from pipeline.core.replacing import Whose, sweep
from pipeline.core.runner import Runner
from pipeline.core.threads import threads_that_help
from pipeline.stages.context import StageStep
from pipeline.stages.images import batches, read_labels
from pipeline.stages.names import LOGITS
from pipeline.steps.artifact import Artifact, whose_folder
from pipeline.steps.folders import EVALUATIONS
from pipeline.steps.step import Step

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.stages.samples import SampleStep

NOTED = "noted.json"


class Sharded(StageStep):
    """A step that keeps shards below the results' folder until its artifact is there."""

    _in_one: bool = False
    """Whether it does without them."""

    def again(self, folder: Path) -> Artifact:
        """See `Step.again`: shards that lie here were made by the first one."""
        self._in_one = True
        try:
            return super().again(folder)
        finally:
            self._in_one = False

    def forget_shards(self) -> None:
        """See `Step.forget_shards`."""
        forget(self.context.folder / place_of_shards(self))


Seen = TypeVar("Seen")
"""What a shard makes, as it is joined with the others."""


class Shard(StageStep, Generic[Seen]):
    """A part of a longer step, as an artifact of its own, by the same tools and code.

    Args:
        whole: The longer step.
        number: Which part, from 0 on.
        requires: What it is made from.
    """

    def __init__(self, whole: Sharded, number: int, requires: Sequence[Step]) -> None:
        name = f"{place_of_shards(whole)}/{number:05d}"
        super().__init__(whole.context, name, requires, whole.target)
        self.whole, self.number = whole, number
        self._seen: Seen | None = None

    def tools(self) -> dict[str, str]:
        """Those of the whole."""
        return self.whole.tools()

    def code(self) -> dict[str, str]:
        """That of the whole."""
        return self.whole.code()

    def _run(self) -> Seen:
        """Make it now; what cannot be kept costs time later, and is no reason to end now."""
        try:
            self.run()
        except ArtifactError as error:
            if self._seen is None:
                raise
            self.context.log(f"{self.name} is not kept: {error}")
        assert self._seen is not None
        return self._seen


class JudgingStep(Sharded):
    """A step that lets one runner answer for all validation images.

    Attributes:
        samples: Decodes them.
    """

    stage = "validate"
    samples: SampleStep

    @abstractmethod
    def opened(self) -> Runner | None:
        """What answers; None where nothing can."""

    @abstractmethod
    def what_answers(self) -> Mapping[str, Any]:
        """Everything beside `answers_from` that can change an answer, see `Step.inputs`."""

    @abstractmethod
    def answers_from(self) -> list[Step]:
        """Those of the required steps of which an answer is made."""

    @abstractmethod
    def title(self) -> str:
        """What answers, for people."""

    def shards(self) -> list[Step]:
        """See `Step.shards`: those of what is longer than one shard; samples have to be there."""
        if self._in_one:
            return []
        total = len(read_labels(self.samples.artifact()))
        count = -(-total // size_of(self.context.config))
        if count < 2:
            return []
        return [ShardStep(self, number, number + 1 == count) for number in range(count)]

    def answers(self, runner: Runner) -> Logits:
        """Logits of all samples, (images, classes); the runner has noted what it did of them."""
        shards = [shard for shard in self.shards() if isinstance(shard, ShardStep)]
        if not shards:
            logits, seconds = logits_of(self, runner, self.title())
            self.beside["images_seconds"] = round(seconds, 3)
            return logits
        parts = [shard.found(runner) for shard in shards]
        done = sum(len(logits) for logits, _ in parts)
        runner.go_on(done, runner.joined([noted for _, noted in parts]))
        seconds = sum(shard.seconds for shard in shards)
        self.beside["images_seconds"] = round(seconds, 3)
        return np.concatenate([logits for logits, _ in parts if len(logits)])


class ShardStep(Shard[tuple[Logits, Any]]):
    """Some consecutive images of a validation.

    Args:
        whole: The validation.
        number: Which shard, from 0 on.
        is_last: Whether none follows.

    Attributes:
        seconds: What its images took, of a shard that was found.
    """

    stage = "validate"
    whole: JudgingStep

    def __init__(self, whole: JudgingStep, number: int, is_last: bool) -> None:
        super().__init__(whole, number, whole.answers_from())
        self.is_last = is_last
        self.from_source = whole.from_source
        self.seconds = 0.0
        self._runner: Runner | None = None

    def inputs(self) -> Mapping[str, Any]:
        """What answers, and for which images."""
        images = size_of(self.context.config)
        shard = {"number": self.number, "images": images, "is last": self.is_last}
        return {**self.whole.what_answers(), "shard": shard}

    def made_from(self) -> dict[str, str]:
        """What answers, the samples, and the checkpoint where that is read."""
        digests = super().made_from()
        return (
            {**digests, "checkpoint": self.source.checkpoint_hash} if self.from_source else digests
        )

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Let the runner answer for the images of the shard."""
        if self._runner is not None:
            logits, noted = self._compute(self._runner)
        else:
            runner = self.whole.opened()
            if runner is None:
                raise UnavailableError(f"{self.whole.name}: nothing here can run or emulate it")
            with runner:
                runner.expect(read_labels(self.whole.samples.artifact()))
                logits, noted = self._compute(runner)
        np.save(folder / LOGITS, logits)
        (folder / NOTED).write_text(json.dumps(noted) + "\n")
        return {"images": len(logits), "of": self.whole.name}

    def found(self, runner: Runner) -> tuple[Logits, Any]:
        """Its logits, (images, classes), and what was noted: kept before, or computed now."""
        if (kept := self._kept()) is not None:
            return kept
        self._runner = runner
        return self._run()

    def _kept(self) -> tuple[Logits, Any] | None:
        """What lies there and is up to date; None if nothing is."""
        try:
            if self.stale() is not None:
                return None
            made = self.artifact()
            self.seconds = made.made().images_seconds or 0.0
            logits: Logits = np.load(made.path(LOGITS))
            return logits, read_json(made.path(NOTED))
        except (ArtifactError, OSError, ValueError):
            return None  # it is computed again

    def _compute(self, runner: Runner) -> tuple[Logits, Any]:
        first, last = self._bounds(batch_of(self.context.config, runner))
        runner.begin(first)
        logits, self.seconds = logits_of(self.whole, runner, self.whole.title(), first, last)
        self.beside["images_seconds"] = round(self.seconds, 3)
        # As JSON has it, so that what is joined now is what would be read later.
        self._seen = logits, json.loads(json.dumps(runner.noted()))
        return self._seen

    def _bounds(self, batch: int) -> tuple[int, int | None]:
        """Its first image, and the one after its last; None for all that are left."""
        last = None if self.is_last else self._begin(self.number + 1, batch)
        return self._begin(self.number, batch), last

    def _begin(self, number: int, batch: int) -> int:
        """The first image of a shard: where a batch begins."""
        return -(-number * size_of(self.context.config) // batch) * batch


def logits_of(
    step: JudgingStep, runner: Runner, what: str, first: int = 0, last: int | None = None
) -> tuple[Logits, float]:
    """Logits of the samples of a step, and the seconds that these took.

    Args:
        step: The step.
        runner: Gives the logits.
        what: What runs, for people.
        first: The first image.
        last: The one after the last; None for all.

    Returns:
        (images, classes), and the seconds; (0, 0) for no image.
    """
    samples = step.samples.artifact()
    size, total = batch_of(step.context.config, runner), len(read_labels(samples))
    parts: list[Logits] = []
    done, start = first, time.monotonic()
    values = math.prod(samples.network().input_shape)
    with freed_memory_kept(), threads_of(runner, values):
        for pictures in batches(samples, size, first, last):
            step.context.progress(done, total, what)
            parts.append(in_batches(runner, runner.input_of(pictures), size, runner.smallest))
            done += len(pictures)
    logits = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    return logits, time.monotonic() - start


def size_of(config: Config) -> int:
    """Images of a shard: at least so many as configured, and whole batches of the configured size.

    What runs may take other batches: then a shard ends where one of these does, and of few large
    ones some shards may have no image.
    """
    settings = config.validation
    return -(-settings.shard // settings.batch) * settings.batch


def batch_of(config: Config, runner: Runner) -> int:
    """Images at a time: as configured, or some times that, as far as the runner takes them."""
    wanted = config.validation.batch * runner.divides
    return max(runner.smallest, min(wanted, runner.largest or wanted))


def threads_of(runner: Runner, values: int) -> contextlib.AbstractContextManager[None]:
    """Let PyTorch take as many threads as help a runner, and leave them to one that divides them.

    Args:
        runner: What answers.
        values: Of each picture.
    """
    return threads_that_help(values) if runner.divides == 1 else contextlib.nullcontext()


def place_of_shards(step: Step) -> str:
    """Where a step keeps shards, below the results' folder."""
    return f"{EVALUATIONS}/{step.name.replace('/', '-')}"


def forget(folder: Path) -> None:
    """Remove the shards of a step: its work is done."""
    remove(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def kept_in(evaluations: Path) -> list[Path]:
    """Folders of shards, of validations that did not end."""
    found = []
    for folder in sorted(evaluations.glob("*")):
        if not folder.is_symlink() and any(_shards_in(folder)):
            found.append(folder)
    return found


def _shards_in(folder: Path) -> Iterator[Path]:
    for path in folder.glob("[0-9]*"):
        if path.name.isdecimal() and whose_folder(path) is Whose.OURS:
            yield path


def remove(folder: Path) -> None:
    """Remove a folder of shards; files of others in it stay, and so does the folder then."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        sweep(folder)  # a kill may have left what was being written
        for path in list(_shards_in(folder)):
            shutil.rmtree(path)
        folder.rmdir()
