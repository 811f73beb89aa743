"""Facts of measurement: latencies of a target's artifacts beside PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from pipeline.core.answers import Answers, Audit
from pipeline.core.figures import (
    SAMPLES_FOR_P90,
    SAMPLES_FOR_P99,
    LatencySummary,
    Number,
    Ratio,
    Throughput,
)
from pipeline.core.machine import Machine, busy_with_others
from pipeline.core.plain import Facts, Plain
from pipeline.core.runner import DeviceState
from pipeline.core.timing import ENGINE, Protocol

PYTORCH = "pytorch"
"""Name of PyTorch among the runners: the baseline of every measurement."""

FEWEST_CALLS = 30
"""Timed calls from which a median is trusted: of 30, its 95 % interval lies between the 10th and
the 21st shortest, whatever the distribution; of 6 it is all that was seen."""

VALID = "valid"


def doubt_about(calls: int, load_before: float, cpus: int) -> str:
    """Why a latency is not to be trusted; "" if it is.

    Args:
        calls: How many were timed.
        load_before: CPUs that other processes kept busy before.
        cpus: CPUs that this process may use.
    """
    return "; ".join((*_few(calls), *_busy(load_before, cpus)))


def _few(calls: int) -> Iterator[str]:
    if calls < FEWEST_CALLS:
        yield f"only {calls} calls were timed, and {FEWEST_CALLS} are needed"


def _busy(load: float, cpus: int) -> Iterator[str]:
    if told := busy_with_others(load, cpus):
        yield told


def validity_of(calls: int, faults: Iterable[str]) -> dict[str, str]:
    """Whether each percentile stands: "valid", or "invalid: " and why.

    Args:
        calls: How many were timed.
        faults: What is against the measurement, however many calls there are.
    """
    found, known = {}, tuple(faults)
    for name, needed in (("p90", SAMPLES_FOR_P90), ("p99", SAMPLES_FOR_P99)):
        few = f"{calls} calls, and {needed} are needed" if calls < needed else ""
        why = "; ".join(filter(None, (few, *known)))
        found[name] = f"invalid: {why}" if why else VALID
    return found


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
class Memory(Plain):
    """Memory of a process that does nothing but run one artifact.

    Attributes:
        peak: The most that it had at once, in bytes.
        before: The same before the artifact was opened: Python and the runtime; None likewise.
    """

    peak: Number
    before: int | None = None

    @property
    def words(self) -> str:
        """Both, in a few words."""
        if self.peak.value is None:
            return f"peak memory not measured: {self.peak.why}"
        there = f", {self.before / 1e6:.0f} MB of it before it was opened" if self.before else ""
        return f"peak memory {self.peak.value / 1e6:.0f} MB in a process of its own{there}"


@dataclass(frozen=True)
class Sustained(Plain):
    """Calls without a rest for some time.

    Attributes:
        seconds: How long.
        latency: All calls in sum.
        images_per_s: Images by the time.
        tenths_ms: Median of every tenth of the calls, in order.
        drift: Time in the last tenth relative to the first; None with too few calls.
        answers: Whether they answered as the validation did.
        load: CPUs that others kept busy meanwhile.
        doubt: Why the drift is not to be trusted; "" if it is.
    """

    seconds: float
    latency: LatencySummary
    images_per_s: float
    tenths_ms: tuple[float, ...]
    drift: Ratio | None
    answers: Answers
    load: float
    doubt: str = ""

    @property
    def words(self) -> str:
        """What came of it, in a line."""
        told = f"{self.seconds:.0f} s without a rest: {self.images_per_s:.1f} images/s"
        if self.drift is None:
            return f"{told}; drift invalid: {self.doubt}"
        low, high = self.drift.interval
        shows = "no drift shown"
        if self.drift.slower or self.drift.faster:
            shows = "slower" if self.drift.slower else "faster"
        state = f"invalid: {self.doubt}" if self.doubt else VALID
        return (
            f"{told}; median {self.tenths_ms[0]:.3f} ms in the first tenth, "
            f"{self.tenths_ms[-1]:.3f} in the last: {self.drift.value:.3f} of it "
            f"({low:.3f} to {high:.3f}), {shows}; {state}"
        )


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
        distinct: Different images that the timed calls were given in turn.
        load_during: CPUs that others kept busy meanwhile; None where nothing looked.
        rivals: Processes that were kept busy beside it on purpose.
        answers: By runner, whether timed calls answered as the validation did.
        repeated: By runner, whether one batch again and again is faster than distinct ones.
        memory: By runner, the memory that it takes.
        sustained: By runner, what calls without a rest came to.
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
    distinct: int = 1
    load_during: float | None = None
    rivals: int = 0
    answers: Mapping[str, Answers] = field(default_factory=dict)
    repeated: Mapping[str, Audit] = field(default_factory=dict)
    memory: Mapping[str, Memory] = field(default_factory=dict)
    sustained: Mapping[str, Sustained] = field(default_factory=dict)

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
        return "; ".join((*_few(calls), *self._faults(runner)))

    def _faults(self, runner: str) -> Iterator[str]:
        """What is against a measurement, however many calls there are."""
        yield from _busy(max(self.load_before, self.load_during or 0.0), self.machine.cpus_granted)
        if runner in self.answers and (problem := self.answers[runner].problem):
            yield problem
        if runner in self.repeated and (problem := self.repeated[runner].problem):
            yield problem

    def validity(self, runner: str, batch: int, phase: str = ENGINE) -> dict[str, str]:
        """Whether each percentile of a runner's calls stands: "valid", or "invalid: " and why.

        Args:
            runner: The runner.
            batch: Batch size.
            phase: Which part of a call.
        """
        calls = self.batches[batch].phases[runner][phase].samples
        return validity_of(calls, self._faults(runner))

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
