"""How long a plan takes, and what a whole validation set would cost: by what was measured before.

Every run leaves beside each artifact how long that took (`made.json`). A step of a plan takes about
as long as the same step did before, in these results or in others under the output folder. Steps
that go over the validation images are scaled by their number and, from another network, by its
multiply-accumulates. Where no run tells, the rates of this project's own measurements do. Every
estimate says which of these it comes from; a step of which nothing is known has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.listing import Folders
from pipeline.core.words import duration
from pipeline.stages.context import RunContext
from pipeline.stages.samples import SampleStep
from pipeline.stages.validate import ReferenceStep, ValidateStep
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import results_folders
from pipeline.steps.step import Step

MANY = 50_000
"""Images of ImageNet's validation set: what a whole judgement costs is told for so many."""

SAMPLES = "validate/samples"
"""The artifact that holds the decoded validation images."""

LAST_TIME = "as last time"
NOT_KNOWN = "not known yet"

MOST_NAMED = 4
"""Steps that a line names."""

RATES_FROM = "by what CARE-S0 took, and multiply-accumulates"


@dataclass(frozen=True)
class Estimate:
    """How long a step takes.

    Attributes:
        fixed: Seconds, however many validation images there are.
        an_image: Seconds for each of them.
        images: As many as there were where it was measured; 0 where that says nothing.
        origin: Where the figure comes from, for people.
    """

    fixed: float
    an_image: float
    images: int
    origin: str

    def at(self, images: int | None) -> float | None:
        """Seconds with so many validation images; None for as many as last time.

        None is what is not known: how many there are, of what was measured on one.
        """
        count = self.images if images is None else images
        return None if self.an_image and not count else self.fixed + self.an_image * count

    def scaled(self, factor: float, origin: str) -> Estimate:
        """The same for a network that takes so many times as long."""
        return Estimate(self.fixed * factor, self.an_image * factor, self.images, origin)


class Estimates:
    """Estimates for the steps of a configuration.

    Args:
        context: The configuration, and the network where it was loaded already.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.folder = context.folder

    def lines(self, reasons: Sequence[tuple[Step, str | None]]) -> list[str]:
        """What a plan costs as a whole, and with `MANY` images, in words.

        Args:
            reasons: Every selected step, and why it runs; None where it is up to date.
        """
        running = [(step, self.of(step)) for step, why in reasons if why is not None]
        told = []
        if running:
            steps = "1 step" if len(running) == 1 else f"{len(running)} steps"
            told.append(f"{steps} to run: {_sum(running, self.images)}")
        whole = [(step, self.of(step)) for step, _ in reasons]
        if any(_is_judging(step) for step, _ in whole):
            told.append(f"with {MANY:,} validation images all steps: {_sum(whole, MANY)}")
        return told

    def of(self, step: Step) -> Estimate | None:
        """How long a step takes, from the nearest that is known; None where nothing is."""
        for earlier in self._alike(step):
            return earlier
        if not isinstance(step, (ReferenceStep, ValidateStep)) or not self.macs:
            return None
        scaled = self._of_other_networks(step, self.macs)
        if scaled is not None:
            return scaled
        rate = None
        if isinstance(step, ValidateStep):
            rate = step.runtime.emulates_at.get(step.built.precision)
        return None if rate is None else Estimate(0, rate * self.macs / 1e9, 0, RATES_FROM)

    def in_words(self, step: Step) -> str:
        """How long a step takes with the images of the configuration, and where that comes from."""
        estimate = self.of(step)
        seconds = None if estimate is None else estimate.at(self.images)
        if estimate is None or seconds is None:
            return f"time {NOT_KNOWN}"
        return f"about {duration(seconds)}, {estimate.origin}"

    def _alike(self, step: Step) -> Iterator[Estimate]:
        """What the same step took with the same network: here first, then elsewhere."""
        here = _taken(self.folder, step, LAST_TIME)
        if here is not None:
            yield here
        for folder, network in self._others.items():
            # Decoding depends on the images alone, and is known from any network.
            if network == self._identity or isinstance(step, SampleStep):
                found = _taken(folder, step, f"from {folder}")
                if found is not None:
                    yield found

    def _of_other_networks(self, step: Step, macs: int) -> Estimate | None:
        """What the step took with the network of the nearest size, scaled to this one's."""
        found = []
        for folder in self._others:
            own, taken = _macs(folder), _taken(folder, step, "")
            if own and taken is not None:
                scaled = taken.scaled(macs / own, f"from {folder}, by multiply-accumulates")
                found.append((max(own / macs, macs / own), scaled))
        return min(found, key=lambda each: each[0])[1] if found else None

    @cached_property
    def images(self) -> int | None:
        """Images that the configuration judges on; None where only a look at them would tell."""
        wanted = self.context.config.validation.images
        there = self._images_there()
        if there is None or wanted is None:
            return wanted if there is None else there
        return min(wanted, there)

    def _images_there(self) -> int | None:
        source = self.context.source
        with contextlib.suppress(PipelineError):
            files = source.files("validation")
            if isinstance(files, Folders):
                if source.described.hold_out is not None or source.sets_aside:
                    return len(source.validation)
                return sum(len(images) for _, images in files.images())
            if "module" in source.__dict__ and isinstance(files.root, Path):
                return len(source.validation)  # a run that loads the network reads these, too
        facts = _facts(self.folder, SAMPLES)
        return _count(facts.get("of"))

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the network on one image; 0 where nothing has counted them."""
        known = _macs(self.folder)
        if known or "module" not in self.context.source.__dict__:
            return known
        from care.profile import count

        source = self.context.source
        with contextlib.suppress(PipelineError):
            return count(source.module, source.network.input_shape).macs
        return 0

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        """What tells whether other results are of the same network."""
        stated = _network(self.folder)
        if stated or "module" not in self.context.source.__dict__:
            return stated or (None,)
        network = self.context.source.network
        return (network.description.get("model"), list(network.input_shape))

    @cached_property
    def _others(self) -> dict[Path, tuple[Any, ...]]:
        """Other results under the output folder, and of which network they are."""
        try:
            folders = results_folders(self.folder.parent)
        except PipelineError:
            return {}
        return {folder: _network(folder) for folder in folders if folder != self.folder}


def _is_judging(step: Step) -> bool:
    """Whether a step goes over all validation images."""
    return isinstance(step, (SampleStep, ReferenceStep, ValidateStep))


def _sum(costs: Sequence[tuple[Step, Estimate | None]], images: int | None) -> str:
    """What steps take together, most of it where, and of which of them that is not known."""
    told = {step.name: None if found is None else found.at(images) for step, found in costs}
    known = {name: seconds for name, seconds in told.items() if seconds is not None}
    unknown = [name for name, seconds in told.items() if seconds is None]
    if not known:
        return f"time {NOT_KNOWN}: no run here has measured any of them"
    total = sum(known.values())
    text = f"about {duration(total)}"
    largest = sorted(known, key=lambda name: -known[name])[:MOST_NAMED]
    named = [f"{name} {duration(known[name])}" for name in largest if known[name] > total / 10]
    if len(known) > 1 and named:
        text += f" ({', '.join(named)})"
    if unknown:
        more = len(unknown) - MOST_NAMED
        listed = ", ".join(unknown[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        text += f", and {NOT_KNOWN} for {listed}"
    return text


def _taken(folder: Path, step: Step, origin: str) -> Estimate | None:
    """How long a step took in some results; None where they do not tell."""
    try:
        artifact = Artifact.read(folder / step.name)
    except PipelineError:
        return None
    made = artifact.made()
    if made.seconds is None:
        return None
    if not _is_judging(step):
        return Estimate(made.seconds, 0, 0, origin)
    if isinstance(step, SampleStep):
        images = _count(artifact.facts.get("images"))
    else:
        images = _count(_within(artifact.facts, "numbers", "top1", "samples"))
    if images is None:
        return None  # what could be judged nowhere took no time over any image
    over_images = made.seconds if made.images_seconds is None else made.images_seconds
    return Estimate(max(0.0, made.seconds - over_images), over_images / images, images, origin)


def _facts(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        return Artifact.read(folder / name).facts
    except PipelineError:
        return {}


def _network(folder: Path) -> tuple[Any, ...]:
    """Which network some results are of: its name and input; () where they do not tell."""
    network = _facts(folder, "export").get("network")
    if not isinstance(network, dict):
        return ()
    return (_within(network, "description", "model"), network.get("input_shape"))


def _macs(folder: Path) -> int:
    return _count(_facts(folder, "export").get("macs")) or 0


def _within(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
