"""The stage that judges accuracy: every artifact on the same images, against PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.core import figures
from pipeline.core.errors import UnsupportedOperatorError
from pipeline.core.figures import Number
from pipeline.core.network import Logits, in_batches
from pipeline.core.runner import Numerics, Runner
from pipeline.stages.context import RunContext
from pipeline.stages.golden import expected
from pipeline.stages.images import batches, evenly, pictures_at, read_labels
from pipeline.stages.metrics import metrics_inputs, with_measures
from pipeline.stages.names import LOGITS
from pipeline.stages.shards import JudgingStep, batch_of, threads_of
from pipeline.stages.target_step import TargetStep
from pipeline.steps.facts.accuracy import (
    Accuracy,
    EmulationError,
    NarrowSums,
    PhotoCheck,
    ReferenceFacts,
    ValidationFacts,
)
from pipeline.steps.facts.golden import Expected, GoldenFacts
from pipeline.steps.keys import versions
from pipeline.steps.step import LACKS, MACHINE, Step

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.stages.build import BuildStep
    from pipeline.stages.cpu_class import ClassStep
    from pipeline.stages.golden import GoldenStep
    from pipeline.stages.samples import SampleStep

RANGE_IMAGES = 32
"""Images over which the range of PyTorch's layers is looked at."""

NARROW_IMAGES = 256
"""Most images of the second verdict: it takes several times as long for each. So many are also
emulated beside a measurement on hardware."""


class ReferenceStep(JudgingStep):
    """The logits of PyTorch, in float32 and unfused: what every artifact is held against."""

    from_source = True

    def __init__(self, context: RunContext, samples: SampleStep) -> None:
        super().__init__(context, "validate/pytorch", [samples])
        self.samples = samples

    def inputs(self) -> Mapping[str, Any]:
        """The network, and the user's own measures."""
        return {
            **self.what_answers(),
            **metrics_inputs(self.context.config.validation.metrics),
        }

    def what_answers(self) -> Mapping[str, Any]:
        """The network."""
        return {**self.source.network_inputs(), **batch_inputs(self.context.config)}

    def answers_from(self) -> list[Step]:
        """The samples."""
        return [self.samples]

    def opened(self) -> Runner:
        """PyTorch."""
        return self.source.reference()

    def title(self) -> str:
        """PyTorch, as the source calls it."""
        return self.source.referee

    def made_from(self) -> dict[str, str]:
        """The samples and the checkpoint."""
        return {**super().made_from(), "checkpoint": self.source.checkpoint_hash}

    def tools(self) -> dict[str, str]:
        """PyTorch."""
        return self.source.tools()

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Run the network over the samples."""
        samples = self.samples.artifact()
        labels = read_labels(samples)
        with self.opened() as runner:
            logits = self.answers(runner)
            pictures = next(batches(samples, RANGE_IMAGES))
            layers = self.source.range_of(pictures.images)
        np.save(folder / LOGITS, logits)
        top1, top5 = accuracy(logits, labels, figures.State.MEASURED, self.title(), "")
        numbers = measured(self, Accuracy(top1, top5), logits, labels)
        return ReferenceFacts(numbers, layers).to_facts()


class ValidateStep(TargetStep, JudgingStep):
    """One artifact: measured where it runs here, emulated where that can be done faithfully."""

    def __init__(
        self,
        context: RunContext,
        build: BuildStep,
        samples: SampleStep,
        reference: ReferenceStep,
        golden: GoldenStep,
    ) -> None:
        requires: list[Step] = [build, samples, reference, golden]
        if build.graph:
            requires.append(build.graph)
        name = f"validate/{build.name.replace('/', '-')}"
        super().__init__(context, name, requires, build.target)
        self.built, self.samples, self.reference = build, samples, reference
        self.golden = golden
        self.runtime = build.runtime
        # What prepares photographs itself is given the very files.
        self.from_source = self.takes_photos

    def inputs(self) -> Mapping[str, Any]:
        """How this machine can run the artifact, and how images become its input."""
        return {
            **self._how(),
            **metrics_inputs(self.context.config.validation.metrics),
        }

    def _how(self) -> dict[str, Any]:
        return {
            LACKS: self.runtime.missing(self.built.artifact()),
            "network": self.samples.artifact().network().to_dict(),
            **batch_inputs(self.context.config),
        }

    def what_answers(self) -> Mapping[str, Any]:
        """As `inputs`, and the machine where the artifact runs for real: its shards join alone."""
        how = self._how()
        return how if how[LACKS] else {**how, MACHINE: self.machine()}

    def answers_from(self) -> list[Step]:
        """The artifact and its graph, and the samples."""
        graph = [self.built.graph] if self.built.graph else []
        return [self.built, self.samples, *graph]

    def opened(self) -> Runner | None:
        """The artifact where it runs here, else its executor; None where there is none."""
        built = self.built.artifact()
        if self.runtime.missing(built) is None:
            return self.runtime.open_to_judge(built)
        return self.runtime.emulate(built, self.built.own_graph())

    def title(self) -> str:
        """Target and precision."""
        return f"{self.runtime.title} {self.built.precision}"

    def differs(self) -> str:
        """See `Step.differs`: devices of one kind may round otherwise."""
        facts = ValidationFacts.from_facts(self.artifact().facts, self.name)
        is_measured = facts.numbers.top1.state is figures.State.MEASURED
        return "measured on a device" if is_measured and self.runtime.resource != "cpu" else ""

    def tools(self) -> dict[str, str]:
        """What runs the artifact, or emulates it."""
        return {**versions("numpy", "torch"), **self.runtime.versions()}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Run or emulate the artifact over the samples and compare."""
        missing = self.runtime.missing(self.built.artifact())
        labels = read_labels(self.samples.artifact())
        reference = np.load(self.reference.artifact().path(LOGITS))
        try:
            runner = self.opened()
            if runner is None:
                why = missing or "there is no executor for it"
                return self._facts(Accuracy.not_measured(why)).to_facts()
            with runner:
                runner.expect(labels)
                logits = self.answers(runner)
                numerics = runner.numerics()
                narrow = self._with_narrow_sums(runner, logits, reference, labels)
        except UnsupportedOperatorError as error:
            if missing is None:
                raise
            # A gap of the executor says nothing about what was built.
            why = f"{missing}; and it cannot be emulated: {error}"
            return self._facts(Accuracy.not_measured(why)).to_facts()
        np.save(folder / LOGITS, logits)
        state = figures.measured_here() if missing is None else figures.State.EMULATED
        numbers = judge(logits, reference, labels, state, runner.device, missing or "")
        numbers = measured(self, numbers, logits, labels)
        kit = GoldenFacts.from_facts(self.golden.artifact().facts, self.golden.name)
        golden = expected(logits, reference, kit)
        beside = self._emulated_beside(logits, labels) if missing is None else None
        facts = self._facts(numbers, numerics, narrow, golden, beside)
        if self.from_source and missing is None:
            facts = dataclasses.replace(facts, photo=self._on_photographs(logits, labels))
        return facts.to_facts()

    def _on_photographs(self, logits: Logits, labels: npt.NDArray[np.int64]) -> PhotoCheck | None:
        """What the model that prepares photographs itself makes of some of them."""
        runner = self.runtime.open_photo(self.built.artifact())
        if runner is None:
            return None
        dataset, chosen = self.source.validation, _some(len(logits))
        indices = evenly(len(dataset), self.context.config.validation.images)[chosen]
        found = []
        with runner:
            for done, index in enumerate(indices.tolist()):
                self.context.progress(done, len(indices), f"{self.runtime.title}: photographs")
                found.append(runner(np.asarray(dataset.image(index))))
            by = runner.device
        return compare_photos(np.concatenate(found), logits[chosen], labels[chosen], by)

    def _emulated_beside(
        self, logits: Logits, labels: npt.NDArray[np.int64]
    ) -> EmulationError | None:
        """The error of the emulation on some of the images that were measured; None without one."""
        chosen = _some(len(logits))
        try:
            runner = self.runtime.emulate(self.built.artifact(), self.built.own_graph())
            if runner is None:
                return None
            self.context.progress(0, None, f"{self.runtime.title}: the emulation beside it")
            with runner:
                emulated = self._over(runner, chosen, labels)
                by = runner.device
        except UnsupportedOperatorError as error:
            # What was measured stands: only the executor has a gap.
            self.context.log(f"{self.name}: not emulated beside it: {error}")
            return None
        return compare_emulation(emulated, logits[chosen], labels[chosen], by)

    def _over(
        self, runner: Runner, chosen: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> Logits:
        """Logits of some of the samples, (images, classes)."""
        runner.expect(labels[chosen])
        size = batch_of(self.context.config, runner)
        pictures = pictures_at(self.samples.artifact(), chosen)
        with threads_of(runner, pictures.pixels[0].size):
            return in_batches(runner, runner.input_of(pictures), size, runner.smallest)

    def _with_narrow_sums(
        self,
        runner: Runner,
        logits: Logits,
        reference: Logits,
        labels: npt.NDArray[np.int64],
    ) -> NarrowSums | None:
        """The second verdict, over some of the images; None where there is none to have."""
        second = runner.narrow_sums()
        if second is None:
            return None
        chosen = _some(len(logits))
        self.context.progress(0, None, f"{self.runtime.title}: sums in half precision")
        with second:
            narrow = self._over(second, chosen, labels)
        return compare_sums(narrow, logits[chosen], reference[chosen], second.device)

    def _facts(
        self,
        numbers: Accuracy,
        numerics: Numerics | None = None,
        narrow: NarrowSums | None = None,
        golden: Expected | None = None,
        emulation: EmulationError | None = None,
    ) -> ValidationFacts:
        target, precision = self.built.runtime.name, self.built.precision
        return ValidationFacts(target, precision, numbers, numerics, narrow, golden, emulation)


def _some(total: int) -> npt.NDArray[np.int64]:
    """Some of the images, chosen with a seed, ascending."""
    count = min(NARROW_IMAGES, total)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))


def batch_inputs(config: Config) -> dict[str, Any]:
    """What decides the last bits of logits: sums of other batches are ordered otherwise."""
    return {"settings validation": {"batch": config.validation.batch}}


def measured(
    step: ReferenceStep | ValidateStep | ClassStep,
    numbers: Accuracy,
    logits: Logits,
    labels: npt.NDArray[np.int64],
) -> Accuracy:
    """Figures of a step's logits, with those of each class and the user's own."""
    names = step.samples.artifact().network().labels
    own = step.context.config.validation.metrics
    if own is not None:
        step.context.progress(0, None, own)
    return with_measures(numbers, logits, labels, names, own)


def accuracy(
    logits: Logits, labels: npt.NDArray[np.int64], state: figures.State, by: str, why: str
) -> tuple[Number, Number]:
    """Top-1 and top-5 with Wilson intervals, as shares."""

    def share(k: int) -> Number:
        correct = figures.top_k(logits, labels, k)
        return Number(
            correct / len(labels),
            state,
            by=by,
            why=why,
            samples=len(labels),
            interval=figures.wilson(correct, len(labels)),
        )

    return share(1), share(5)


def judge(
    logits: Logits,
    reference: Logits,
    labels: npt.NDArray[np.int64],
    state: figures.State,
    by: str,
    why: str,
) -> Accuracy:
    """All figures of an artifact.

    Args:
        logits: Its logits, (images, classes).
        reference: PyTorch's on the same images, (images, classes).
        labels: The right classes, (images,).
        state: How the logits came about.
        by: What gave them.
        why: What an emulation stands for.
    """
    top1, top5 = accuracy(logits, labels, state, by, why)
    comparison = figures.compare(logits, reference)
    drop = figures.paired_drop(logits, reference, labels)

    def figure(value: float, interval: tuple[float, float] | None = None) -> Number:
        return dataclasses.replace(top1, value=value, interval=interval)

    return Accuracy(
        top1,
        top5,
        agreement=figure(
            comparison.agreement, figures.wilson(len(labels) - comparison.flips, len(labels))
        ),
        flips=figure(float(comparison.flips)),
        cosine=figure(comparison.cosine),
        max_difference=figure(comparison.max_difference),
        top1_drop=figure(drop.value, drop.interval),
    )


def compare_sums(narrow: Logits, wide: Logits, reference: Logits, by: str) -> NarrowSums:
    """The second verdict beside the first.

    Args:
        narrow: Logits with sums of products in half precision, (images, classes).
        wide: Logits with sums in float32, of the same images.
        reference: PyTorch's.
        by: What gave the narrow ones.
    """
    drop = figures.paired_drop(narrow, wide, reference.argmax(1))

    def figure(value: float, interval: tuple[float, float] | None = None) -> Number:
        return Number(value, figures.State.EMULATED, by=by, samples=len(narrow), interval=interval)

    return NarrowSums(
        len(narrow),
        figure(figures.compare(narrow, reference).agreement),
        figure(figures.compare(wide, reference).agreement),
        figure(drop.value, drop.interval),
    )


def compare_photos(
    own: Logits, given: Logits, labels: npt.NDArray[np.int64], by: str
) -> PhotoCheck:
    """What preparing photographs in the graph costs.

    Args:
        own: Logits of the model that prepares them itself, (images, classes).
        given: Those of the one that gets prepared images.
        labels: The right classes, (images,).
        by: What ran the former.
    """
    top1, _ = accuracy(own, labels, figures.measured_here(), by, "")
    return PhotoCheck(len(labels), by, top1, *_paired(own, given, labels, top1))


def compare_emulation(
    emulated: Logits, measured: Logits, labels: npt.NDArray[np.int64], by: str
) -> EmulationError:
    """The error of an emulation.

    Args:
        emulated: Its logits, (images, classes).
        measured: Those of the hardware, of the same images.
        labels: The right classes, (images,).
        by: What emulated.
    """
    (top1, _), (emulated_top1, _) = (
        accuracy(logits, labels, state, by, "")
        for logits, state in (
            (measured, figures.measured_here()),
            (emulated, figures.State.EMULATED),
        )
    )
    differences = _paired(emulated, measured, labels, emulated_top1)
    return EmulationError(len(labels), by, top1, emulated_top1, *differences)


def _paired(
    these: Logits, those: Logits, labels: npt.NDArray[np.int64], like: Number
) -> tuple[Number, Number, Number]:
    """Top-1 lost against other logits of the same images, agreement, and largest difference.

    Args:
        these: Logits, (images, classes).
        those: What they are held against.
        labels: The right classes, (images,).
        like: A figure of the same state, by the same and of as many images.
    """
    compared = figures.compare(these, those)
    drop = figures.paired_drop(these, those, labels)
    same = figures.wilson(len(labels) - compared.flips, len(labels))
    return (
        dataclasses.replace(like, value=drop.value, interval=drop.interval),
        dataclasses.replace(like, value=compared.agreement, interval=same),
        dataclasses.replace(like, value=compared.max_difference, interval=None),
    )
