"""Timing of runners: warm up, keep every sample, interleave what is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.core.figures import Latency, Ratio, ratio
from pipeline.core.network import Images
from pipeline.core.runner import Runner

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


def settle(call: Callable[[], object]) -> None:
    """Rest, then call without timing until what follows is as in steady use."""
    time.sleep(PAUSE_S)
    end = time.perf_counter() + WARM_S
    call()
    while time.perf_counter() < end:
        call()


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        warmup: Calls before the first timed one.
        samples: Timed calls.
        max_seconds: End after this time with the samples that there are.
    """

    warmup: int
    samples: int
    max_seconds: float


def interleaved(
    runners: Mapping[str, Runner],
    images: Pictures | Images,
    protocol: Protocol,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Latency]]:
    """Time several runners on the same images in turn: A B A B and so on.

    A turn is a rest, some calls that do not count (see `settle`), and `CALLS` that do.

    Args:
        runners: What to time, by name.
        images: One batch: pictures, of which every runner is given what it takes, or what all of
            them take, such as (batch, channels, height, width).
        protocol: How to measure. `max_seconds` counts for all runners together.
        tick: Is told how many calls of each are done.

    Returns:
        By runner and phase, the timed calls.
    """
    inputs = {name: runner.input_of(images) for name, runner in runners.items()}
    for name, runner in runners.items():
        for _ in range(protocol.warmup):
            runner(inputs[name])
    phases: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    deadline = time.monotonic() + protocol.max_seconds
    for done in range(0, protocol.samples, CALLS):
        calls = min(CALLS, protocol.samples - done)
        for name, runner in runners.items():
            settle(partial(runner, inputs[name]))
            for _ in range(calls):
                for phase, milliseconds in runner.timed(inputs[name]).items():
                    phases[name].setdefault(phase, []).append(milliseconds)
        tick(done + calls)
        if time.monotonic() > deadline:
            break
    return {
        name: {phase: Latency(tuple(samples)) for phase, samples in by_phase.items()}
        for name, by_phase in phases.items()
    }


def end_to_end(
    runner: Runner, prepare: Callable[[], Pictures | Images], protocol: Protocol
) -> Latency:
    """Time decoding, preprocessing and running one batch.

    Args:
        runner: What to time.
        prepare: Decodes and preprocesses a batch: pictures, or what the runner takes.
        protocol: How to measure.
    """
    samples = []
    deadline = time.monotonic() + protocol.max_seconds
    for done in range(protocol.warmup + protocol.samples):
        start = time.perf_counter()
        runner(runner.input_of(prepare()))
        if done >= protocol.warmup:
            samples.append(1e3 * (time.perf_counter() - start))
        if samples and time.monotonic() > deadline:
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
