"""Facts of measurement: latencies of a target's artifacts beside PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from pipeline.core.figures import LatencySummary, Number, Ratio, Throughput
from pipeline.core.machine import Machine
from pipeline.core.plain import Facts, Plain
from pipeline.core.runner import DeviceState
from pipeline.core.timing import ENGINE, Protocol

PYTORCH = "pytorch"
"""Name of PyTorch among the runners: the baseline of every measurement."""

FEWEST_CALLS = 30
"""Timed calls from which a median is trusted: of 30, its 95 % interval lies between the 10th and
the 21st shortest, whatever the distribution; of 6 it is all that was seen."""

MOST_BUSY = 0.5
"""Share of the granted CPUs that other processes may keep busy."""


def doubt_about(calls: int, load_before: float, cpus: int) -> str:
    """Why a latency is not to be trusted; "" if it is.

    Args:
        calls: How many were timed.
        load_before: CPUs that other processes kept busy before.
        cpus: CPUs that this process may use.
    """
    reasons = []
    if calls < FEWEST_CALLS:
        reasons.append(f"only {calls} calls were timed, and {FEWEST_CALLS} are needed")
    if load_before > MOST_BUSY * cpus:
        reasons.append(f"other processes kept {load_before:.1f} of {cpus} CPUs busy")
    return "; ".join(reasons)


@dataclass(frozen=True)
class BatchLatency(Plain):
    """What was timed at one batch size, all runners interleaved.

    Attributes:
        phases: By runner and phase, the calls in sum.
        baseline: The first runner.
        ratio_to_baseline: By runner, its engine time relative to the baseline's.
        ratio_to_pytorch: By runner, its engine time relative to PyTorch's.
        samples_ms: By runner, the engine time of every call, in order.
    """

    phases: Mapping[str, Mapping[str, LatencySummary]]
    baseline: str
    ratio_to_baseline: Mapping[str, Ratio]
    ratio_to_pytorch: Mapping[str, Ratio]
    samples_ms: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class EndToEnd(Plain):
    """Decoding, preprocessing and running a batch.

    Attributes:
        batch: Images in it.
        latency: By runner, the calls in sum.
    """

    batch: int
    latency: Mapping[str, LatencySummary]


@dataclass(frozen=True)
class Measured(Facts):
    """Runners and PyTorch in one interleaved run.

    Attributes:
        protocol: How it was measured.
        machine: Where it was measured.
        load_before: CPUs that other processes kept busy before.
        date: Day, as YYYY-MM-DD.
        batches: What was timed, by batch size in the configuration's order.
        end_to_end: The whole way.
        cold_start_ms: By runner, milliseconds from opening to the first logits.
        throughput: By runner, call after call; only runners that have a queue.
        device_state: By runner, what its device said of itself; only runners whose device does.
        devices: By runner, what ran it.
    """

    protocol: Protocol
    machine: Machine
    load_before: float
    date: str
    batches: Mapping[int, BatchLatency]
    end_to_end: EndToEnd
    cold_start_ms: Mapping[str, float]
    throughput: Mapping[str, tuple[Throughput, ...]]
    device_state: Mapping[str, DeviceState]
    devices: Mapping[str, str]

    @property
    def first_batch(self) -> int:
        """The batch size whose latency stands for an artifact."""
        return next(iter(self.batches))

    @property
    def samples_ms(self) -> Mapping[str, tuple[float, ...]]:
        """Engine times of every runner at the first batch size."""
        return self.batches[self.first_batch].samples_ms

    def doubt(self, runner: str) -> str:
        """Why the latency of a runner is not to be trusted; "" if it is."""
        calls = self.batches[self.first_batch].phases[runner][ENGINE].samples
        return doubt_about(calls, self.load_before, self.machine.cpus_granted)

    def headline(self, runner: str) -> Number:
        """Median engine time of a runner at the first batch size."""
        phases = self.batches[self.first_batch].phases[runner]
        return phases[ENGINE].median(self.devices[runner])


@dataclass(frozen=True)
class BenchFacts(Facts):
    """A target's measurement.

    Attributes:
        target: The target.
        latency: By precision, the figure that stands for the artifact, or why there is none.
        measured: What was measured on this machine; None if nothing was.
        more: Whatever else was told, such as what was measured on other devices.
    """

    target: str
    latency: Mapping[str, Number]
    measured: Measured | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_facts(self) -> dict[str, Any]:
        """The facts of an artifact: what was measured lies on the same level as the rest."""
        facts = super().to_facts()
        measured = facts.pop("measured")
        return {**facts, **(measured or {})}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_facts`; see `Facts`."""
        names = {field.name for field in fields(Measured)}
        own = {key: value for key, value in facts.items() if key not in names}
        measured = {key: value for key, value in facts.items() if key in names}
        if measured:
            own["measured"] = measured
        return super().from_facts(own, where)
