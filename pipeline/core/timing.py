"""Timing of runners: warm up, keep every sample, interleave what is compared."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self
from typing import Protocol as Interface

from pipeline.core.answers import FEWEST_AUDITED, Audit
from pipeline.core.figures import Latency, Ratio, ratio
from pipeline.core.network import Batch, Images, Logits
from pipeline.core.runner import Runner, Timed
from pipeline.core.settling import Settling

if TYPE_CHECKING:
    from pipeline.core.preprocess import Pictures

ENGINE = "engine"
END_TO_END = "end to end"

CALLS = 3
"""Timed calls in a turn."""

PAUSE_S = 0.01
"""Rest before a turn: until then, threads of the runner before may still wait actively for work and
take the CPU from this one."""

WARM_S = 0.005
"""Untimed calls after the rest, at least one: they bring weights and activations back into the
caches and the CPU out of its sleep, as in a service that does nothing else."""


AUDIT_CALLS = 60
"""Most timed calls of each kind in the audit of a repeated image."""

AUDIT_SHARE = 0.25
"""Share of a measurement's time that the audit may take as well."""


def settle(call: Callable[[], object]) -> None:
    """Rest, then call without timing until what follows is as in steady use."""
    time.sleep(PAUSE_S)
    end = time.perf_counter() + WARM_S
    call()
    while time.perf_counter() < end:
        call()


class Stated(Interface):
    """What states a `Protocol`, such as the `bench` section of a configuration."""

    @property
    def warmup(self) -> int:
        """See `Protocol`."""

    @property
    def samples(self) -> int:
        """See `Protocol`."""

    @property
    def max_seconds(self) -> float:
        """See `Protocol`."""

    @property
    def settled(self) -> float:
        """See `Protocol`."""


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        warmup: Calls before the first timed one.
        samples: Timed calls, at most.
        max_seconds: End after this time with the samples that there are.
        settled: End once every median is known to this share of itself, by the rule of
            `pipeline.core.settling`; 0 for all samples in any case.
    """

    warmup: int
    samples: int
    max_seconds: float
    settled: float = 0.0

    @classmethod
    def of(cls, stated: Stated) -> Self:
        """What settings say."""
        return cls(stated.warmup, stated.samples, stated.max_seconds, stated.settled)


def interleaved(
    runners: Mapping[str, Runner],
    batches: Sequence[Pictures | Images],
    protocol: Protocol,
    tick: Callable[[int], None] = lambda done: None,
    hear: Callable[[str, int, Logits], None] = lambda name, batch, logits: None,
    settling: Settling | None = None,
    seldom: Collection[str] = (),
) -> dict[str, dict[str, Latency]]:
    """Time several runners on the same images in turn: A B A B and so on.

    A turn is a rest, some calls that do not count (see `settle`), and `CALLS` that do. Timed calls
    take one batch after the other; all runners are given the same ones.

    Args:
        runners: What to time, by name.
        batches: Of equal size: pictures, of which every runner is given what it takes, or what all
            of them take, such as (batch, channels, height, width).
        protocol: How to measure. `max_seconds` counts for all runners together, and all of them
            have to be `settled`.
        tick: Is told how many calls of each are done.
        hear: Is told of every timed call: the runner's name, the number of the batch, the answer.
        settling: When it may end before all samples; None for what the protocol says.
        seldom: Those that are there for comparison alone, some of the runners: they have every
            second turn, and nobody waits until their medians are settled.

    Returns:
        By runner and phase, the timed calls.
    """
    inputs = {name: [runner.input_of(b) for b in batches] for name, runner in runners.items()}
    untimed = {name: itertools.cycle(own) for name, own in inputs.items()}
    for name, runner in runners.items():
        for images in itertools.islice(untimed[name], protocol.warmup):
            runner(images)
    phases: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    deadline = time.monotonic() + protocol.max_seconds
    settling = settling or Settling(protocol.settled, protocol.samples)
    for turn, done in enumerate(range(0, protocol.samples, CALLS)):
        calls = min(CALLS, protocol.samples - done)
        for name, runner in runners.items():
            if name in seldom and turn % 2:
                continue
            settle(_next_call(runner, untimed[name]))
            begun = len(phases[name].get(ENGINE, ()))
            for number in range(begun, begun + calls):
                batch = number % len(batches)
                timed = runner.timed(inputs[name][batch])
                hear(name, batch, timed.logits)
                for phase, milliseconds in timed.phases.items():
                    phases[name].setdefault(phase, []).append(milliseconds)
        tick(done + calls)
        times = [by_phase[ENGINE] for name, by_phase in phases.items() if name not in seldom]
        if time.monotonic() > deadline or settling.ends(done + calls, times):
            break
    return {
        name: {phase: Latency(tuple(samples)) for phase, samples in by_phase.items()}
        for name, by_phase in phases.items()
    }


def _next_call(runner: Runner, inputs: Iterable[Batch]) -> Callable[[], Logits]:
    """Calls the runner with the next of the inputs, each time."""
    following = iter(inputs)
    return lambda: runner(next(following))


class Repeating(Runner):
    """Gives a runner the same batch whatever is asked: what answers faster then remembers answers.

    Args:
        runner: Answers.
        batch: What it is given.
    """

    def __init__(self, runner: Runner, batch: Pictures | Images) -> None:
        self._runner, self.device = runner, runner.device
        self._input = runner.input_of(batch)

    def input_of(self, pictures: Pictures | Images) -> Batch:
        """See `Runner.input_of`."""
        return self._input

    def __call__(self, images: Batch) -> Logits:
        """See `Runner.__call__`."""
        return self._runner(images)

    def timed(self, images: Batch) -> Timed:
        """See `Runner.timed`."""
        return self._runner.timed(images)


def repeated(
    runner: Runner, batches: Sequence[Pictures | Images], protocol: Protocol
) -> Audit | None:
    """Time of one batch again and again, relative to that of distinct ones, in turns.

    It is the audit of MLPerf's inference rules for caches of answers. It has to tell a tenth, and
    may end once both medians are settled, from the calls on with which it accuses somebody.

    Args:
        runner: What to time; it was measured before and needs no warm-up.
        batches: Of equal size.
        protocol: How to measure; a part of its calls and its time is enough.

    Returns:
        None where there is one batch only.
    """
    if len(batches) < 2:
        return None
    part = replace(
        protocol,
        warmup=0,
        samples=min(protocol.samples, AUDIT_CALLS),
        max_seconds=AUDIT_SHARE * protocol.max_seconds,
    )
    both = {"distinct": runner, "repeated": Repeating(runner, batches[0])}
    settling = Settling(part.settled, part.samples, FEWEST_AUDITED)
    timed = interleaved(both, batches, part, settling=settling)
    calls = len(timed["repeated"][ENGINE].samples)
    return Audit(calls, ratios(timed, "distinct")["repeated"])


@dataclass(frozen=True)
class Endurance:
    """Calls without a rest.

    Attributes:
        samples: Milliseconds of every call, by the engine's own time.
        seconds: From the first call to the end of the last.
    """

    samples: tuple[float, ...]
    seconds: float


def sustained(
    runner: Runner,
    batches: Sequence[Pictures | Images],
    seconds: float,
    warmup: int,
    tick: Callable[[float], None] = lambda seconds: None,
    hear: Callable[[int, Logits], None] = lambda batch, logits: None,
) -> Endurance:
    """Call a runner without a rest for some time: a CPU that grows hot slows down.

    Args:
        runner: What to time.
        batches: Of equal size, one after the other.
        seconds: How long; the call that is under way then still counts.
        warmup: Calls before.
        tick: Is told about once a second how many seconds have gone by.
        hear: Is told of every timed call: the number of the batch, and the answer.
    """
    inputs = [runner.input_of(batch) for batch in batches]
    for images in itertools.islice(itertools.cycle(inputs), warmup):
        runner(images)
    samples: list[float] = []
    start = told = time.monotonic()
    for batch in itertools.cycle(range(len(inputs))):
        timed = runner.timed(inputs[batch])
        samples.append(timed.phases[ENGINE])
        hear(batch, timed.logits)
        now = time.monotonic()
        if now - told >= 1:
            told = now
            tick(now - start)
        if now - start >= seconds:
            break
    return Endurance(tuple(samples), now - start)


def end_to_end(
    runner: Runner, prepare: Callable[[], Pictures | Images], protocol: Protocol
) -> Latency:
    """Time decoding, preprocessing and running one batch.

    Args:
        runner: What to time.
        prepare: Decodes and preprocesses a batch: pictures, or what the runner takes.
        protocol: How to measure.
    """
    samples: list[float] = []
    deadline = time.monotonic() + protocol.max_seconds
    settling = Settling(protocol.settled, protocol.samples)
    for done in range(protocol.warmup + protocol.samples):
        start = time.perf_counter()
        runner(runner.input_of(prepare()))
        if done >= protocol.warmup:
            samples.append(1e3 * (time.perf_counter() - start))
        if samples and (time.monotonic() > deadline or settling.ends(len(samples), [samples])):
            break
    return Latency(tuple(samples))


def cold_start(
    open_runner: Callable[[], Runner], images: Pictures | Images
) -> tuple[Runner, float]:
    """Open a runner and run it once; the runner and the milliseconds that both took."""
    start = time.perf_counter()
    runner = open_runner()
    try:
        runner(runner.input_of(images))
    except BaseException:
        runner.close()
        raise
    return runner, 1e3 * (time.perf_counter() - start)


def ratios(timed: Mapping[str, Mapping[str, Latency]], baseline: str) -> dict[str, Ratio]:
    """Engine time of every runner relative to that of `baseline`, from one interleaved run."""
    base = timed[baseline][ENGINE].samples
    return {
        name: ratio(phases[ENGINE].samples, base)
        for name, phases in timed.items()
        if name != baseline
    }
