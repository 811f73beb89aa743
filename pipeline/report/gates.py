"""Limits of the configuration, judged on what validation and measurement wrote down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import Config, Gates
from pipeline.core.figures import Number
from pipeline.report.model import BuiltArtifact, GateFailure, GateReport
from pipeline.steps.facts.accuracy import ModuleRange


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
        limit.failure(artifact, cause) for artifact, limit in judged if not limit.holds
    )
    return GateReport(len(limits), len(judged), failures)


@dataclass(frozen=True)
class Limit:
    """One limit and the figure that it is for.

    Attributes:
        figure: What is limited, for people.
        gate: The configuration's key.
        allowed: What it allows.
        is_upper: The figure may be at most so large, rather than at least.
        number: The figure.
    """

    figure: str
    gate: str
    allowed: float
    is_upper: bool
    number: Number

    @property
    def holds(self) -> bool:
        """Whether the figure is within the limit; NaN is not, and what was not measured is."""
        value = self.number.value
        if value is None:
            return True
        return value <= self.allowed if self.is_upper else value >= self.allowed

    def failure(self, artifact: BuiltArtifact, cause: str = "") -> GateFailure:
        """The limit as one that does not hold.

        Args:
            artifact: Whose it is.
            cause: That the network itself leaves the range of float16; told where the artifact did.
        """
        value, state = self.number.value, self.number.state
        assert value is not None
        return GateFailure(
            artifact.target,
            artifact.precision,
            self.figure,
            self.gate,
            self.allowed,
            value,
            state,
            cause if artifact.overflowed and self.gate != "max_latency_ms" else "",
        )


def limits_of(gates: Gates, artifact: BuiltArtifact) -> Iterator[Limit]:
    """The limits that are set for an artifact."""
    accuracy = artifact.accuracy
    rows = (
        ("top-1 drop", "max_top1_drop", gates.max_top1_drop, True, accuracy.top1_drop),
        ("agreement", "min_agreement", gates.min_agreement, False, accuracy.agreement),
        ("latency in ms", "max_latency_ms", gates.max_latency_ms, True, artifact.trusted_latency),
    )
    for figure, gate, allowed, is_upper, number in rows:
        if allowed is not None and number is not None:
            yield Limit(figure, gate, allowed, is_upper, number)
