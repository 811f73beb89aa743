"""Limits of the configuration, judged on what validation and measurement wrote down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import Config, Gates
from pipeline.core.figures import Number
from pipeline.core.words import nearest_or_all, shown
from pipeline.report.model import BuiltArtifact, GateDoubt, GateFailure, GateReport
from pipeline.steps.facts.accuracy import Accuracy, ModuleRange
from pipeline.steps.facts.cpu_class import ClassFacts


def judge_all(
    config: Config, artifacts: Sequence[BuiltArtifact], layers: ModuleRange | None = None
) -> GateReport:
    """Judge every limit of every artifact.

    A figure that was not measured, or is not to be trusted, fails no gate; the report says so.

    Args:
        config: The configuration.
        artifacts: What it asks for; failures come in this order.
        layers: The range of PyTorch's values, if known.
    """
    cause = layers.words if layers else ""
    limits = [
        (artifact, limit)
        for artifact in artifacts
        for limit in limits_of(config.gates(artifact.target), artifact)
    ]
    judged = [(artifact, limit) for artifact, limit in limits if limit.number.value is not None]
    failures = tuple(
        limit.failure(artifact, cause) for artifact, limit in judged if not limit.passes
    )
    doubts = tuple(limit.in_doubt(artifact) for artifact, limit in judged if limit.doubt)
    return GateReport(len(limits), len(judged), failures, doubts)


def judge_class(config: Config, facts: ClassFacts) -> tuple[GateFailure, ...]:
    """Judge the limits on the figures of CPUs of a class: those of this machine say nothing there.

    They decide what to use on that class, and not how a run ends.

    Args:
        config: The configuration.
        facts: What was found of the class.
    """
    gates = config.gates(facts.target)
    limits = [
        (precision, limit)
        for precision, one in facts.artifacts.items()
        for limit in _limits(gates, one.accuracy, facts.trusted_latency(precision))
    ]
    return tuple(limit.failed(facts.target, name) for name, limit in limits if not limit.passes)


@dataclass(frozen=True)
class Limit:
    """One limit and the figure that it is for.

    Attributes:
        figure: What is limited, for people.
        gate: The configuration's key.
        allowed: What it allows.
        is_upper: The figure may be at most so large, rather than at least.
        number: The figure.
        undecided: What counts where it cannot be told, see `pipeline.config.Gates`.
    """

    figure: str
    gate: str
    allowed: float
    is_upper: bool
    number: Number
    undecided: str = "point"

    @property
    def holds(self) -> bool:
        """Whether the figure is within the limit; NaN is not, and what was not measured is."""
        value = self.number.value
        return value is None or self._allows(value)

    @property
    def doubt(self) -> str:
        """Why it cannot be told whether the limit holds; "" if it can."""
        number = self.number
        if number.value is None or math.isnan(number.value) or number.interval is None:
            return ""
        low, high = number.interval
        if self._allows(low) == self._allows(high):
            return ""
        things = "calls" if number.unit == "ms" else "images"
        return (
            f"cannot be told with {number.samples or 'so few'} {things} "
            f"(95 %: {low:.4g} to {high:.4g})"
        )

    @property
    def passes(self) -> bool:
        """What the run counts."""
        if self.doubt and self.undecided != "point":
            return self.undecided == "pass"
        return self.holds

    def _allows(self, value: float) -> bool:
        return value <= self.allowed if self.is_upper else value >= self.allowed

    def in_doubt(self, artifact: BuiltArtifact) -> GateDoubt:
        """The limit as one of which it cannot be told whether it holds.

        Args:
            artifact: Whose it is.
        """
        assert self.number.value is not None
        return GateDoubt(
            artifact.target,
            artifact.precision,
            self.figure,
            self.gate,
            self.allowed,
            self.number.value,
            self.doubt,
            not self.passes,
        )

    def failure(self, artifact: BuiltArtifact, cause: str = "") -> GateFailure:
        """The limit as one that does not hold.

        Args:
            artifact: Whose it is.
            cause: That the network itself leaves the range of float16; told where the artifact did.
        """
        of_values = artifact.overflowed and self.gate != "max_latency_ms"
        return self.failed(artifact.target, artifact.precision, cause if of_values else "")

    def failed(self, target: str, precision: str, cause: str = "") -> GateFailure:
        """The same of whatever has that name.

        Args:
            target: The target.
            precision: The precision.
            cause: What in the network itself explains it.
        """
        value, state = self.number.value, self.number.state
        assert value is not None
        return GateFailure(
            target,
            precision,
            self.figure,
            self.gate,
            self.allowed,
            value,
            state,
            cause,
            self.doubt,
        )


def limits_of(gates: Gates, artifact: BuiltArtifact) -> Iterator[Limit]:
    """The limits that are set for an artifact."""
    return _limits(gates, artifact.accuracy, artifact.trusted_latency)


def _limits(gates: Gates, accuracy: Accuracy, latency: Number) -> Iterator[Limit]:
    """The limits that are set for whatever is so accurate and so fast."""
    worst = accuracy.by_class.top1 if accuracy.by_class else None
    rows = (
        ("top-1 drop", "max_top1_drop", gates.max_top1_drop, True, accuracy.top1_drop),
        ("agreement", "min_agreement", gates.min_agreement, False, accuracy.agreement),
        (_worst(accuracy), "min_worst_class", gates.min_worst_class, False, worst),
        ("latency in ms", "max_latency_ms", gates.max_latency_ms, True, latency),
    )
    for figure, gate, allowed, is_upper, number in rows:
        if allowed is not None and number is not None:
            yield Limit(figure, gate, allowed, is_upper, number, gates.undecided)
    yield from _of_metrics(gates, accuracy)


def _worst(accuracy: Accuracy) -> str:
    """The figure of the worst class, for people."""
    return f"top-1 of {shown(accuracy.by_class.worst)}" if accuracy.by_class else "worst class"


def _of_metrics(gates: Gates, accuracy: Accuracy) -> Iterator[Limit]:
    """Limits of the user's own numbers; one that is not given holds for no artifact."""
    if accuracy.top1.value is None:
        return
    for name, limits in gates.metrics.items():
        number, figure = accuracy.metrics.get(name), name
        if number is None:
            hint = nearest_or_all(name, accuracy.metrics)
            figure = f"{name} (validation.metrics gives no such number{hint})"
            number = dataclasses.replace(accuracy.top1, value=math.nan, interval=None)
        for key, allowed, is_upper in (("min", limits.min, False), ("max", limits.max, True)):
            if allowed is not None:
                gate = f"metrics.{name}.{key}"
                yield Limit(figure, gate, allowed, is_upper, number, gates.undecided)
