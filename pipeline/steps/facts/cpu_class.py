"""Facts of a class of CPUs: how accurate and how fast a target's artifacts are on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.core.answers import Answers
from pipeline.core.figures import Number, Ratio, State
from pipeline.core.machine import busy_with_others
from pipeline.core.plain import Facts, Plain
from pipeline.steps.facts.accuracy import Accuracy


@dataclass(frozen=True)
class OnClass(Plain):
    """One artifact on CPUs of a class.

    Attributes:
        accuracy: Its figures there.
        same_as_here: Share of images with the class that the same artifact gives on this CPU.
        latency: Its median latency at batch 1.
        ratio: Its time relative to the first precision's; None of that itself, and where nothing
            was timed.
    """

    accuracy: Accuracy
    same_as_here: Number
    latency: Number
    ratio: Ratio | None = None


@dataclass(frozen=True)
class ClassFacts(Facts):
    """A target's artifacts on CPUs of a class.

    Attributes:
        target: The target.
        cpu_class: Name of the class.
        title: The class for people.
        examples: CPUs that belong to it.
        why_not: Why nothing was measured; "" if it was.
        lacks: What this CPU lacks of the class, so that answers were emulated and times estimated;
            "" if both were measured.
        untimed: Why times were not even estimated; "" if they were.
        artifacts: By precision, in the order of the configuration.
        left_out: Why others were not run as on the class, by precision.
        busy: CPUs that others kept busy before latency was measured, or meanwhile.
        cpus: CPUs that the measurement could use.
        samples_ms: By precision, every timed call.
        answers: By precision, whether timed calls answered as all images were judged.
    """

    target: str
    cpu_class: str
    title: str
    examples: str
    why_not: str = ""
    lacks: str = ""
    untimed: str = ""
    artifacts: Mapping[str, OnClass] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    busy: float = 0.0
    cpus: int = 1
    samples_ms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answers: Mapping[str, Answers] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """How answers came about."""
        return State.EMULATED if self.lacks else State.RESTRICTED

    @property
    def time_state(self) -> State:
        """How times came about."""
        if self.untimed:
            return State.NOT_MEASURED
        return State.ESTIMATED if self.lacks else State.RESTRICTED

    @property
    def problem(self) -> str:
        """Why latencies decide nothing; "" if they may."""
        return busy_with_others(self.busy, self.cpus)

    def trusted_latency(self, precision: str) -> Number:
        """The latency of an artifact, as far as it is to be trusted."""
        answers = self.answers.get(precision)
        doubt = self.problem or (answers.problem if answers else "")
        if doubt:
            return Number.not_measured(f"not to be trusted: {doubt}", unit="ms")
        return self.artifacts[precision].latency
