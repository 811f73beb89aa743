"""The stage that measures latency: all precisions of a target and PyTorch, interleaved."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import machine, timing
from pipeline.core.errors import InputError
from pipeline.core.figures import Latency, Number
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import Runner
from pipeline.stages.context import RunContext
from pipeline.stages.images import batches
from pipeline.stages.target_step import TargetStep
from pipeline.steps.facts.bench import PYTORCH, BatchLatency, BenchFacts, EndToEnd, Measured
from pipeline.steps.step import Step
from pipeline.targets.base import Target
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.stages.build import BuildStep
    from pipeline.stages.samples import SampleStep


class BenchStep(TargetStep):
    """Latency of one target, in all its precisions, beside PyTorch."""

    stage = "bench"
    from_source = True

    def __init__(
        self, context: RunContext, target: str, builds: Sequence[BuildStep], samples: SampleStep
    ) -> None:
        super().__init__(context, f"bench/{target}", [*builds, samples], target)
        self.builds: Sequence[BuildStep] = builds
        self.samples, self.runtime = samples, TARGETS[target]

    @property
    def measures(self) -> bool:
        """See `Step.measures`."""
        return True

    def do_without(self, missing: Sequence[Step]) -> bool:
        """Measure what was built: one precision that failed hides no other."""
        left = [build for build in self.builds if build not in missing]
        if self.samples in missing or not left:
            return False
        gone = [build.name for build in self.builds if build not in left]
        self.notes.append(f"measured without {', '.join(gone)}")
        self.builds, self.requires = left, (*left, self.samples)
        return True

    def inputs(self) -> Mapping[str, Any]:
        """The protocol, the machine, and the network, which is measured as PyTorch has it."""
        lacking = {step.name: self.runtime.missing(step.artifact()) for step in self.builds}
        return {
            **self.source.network_inputs(),
            "settings bench": self.context.config.bench.model_dump(mode="json"),
            "machine": self.machine(),
            "what this machine lacks for": lacking,
        }

    def made_from(self) -> dict[str, str]:
        """The artifacts, the samples, and the checkpoint of the baseline."""
        return {**super().made_from(), "checkpoint": self.source.checkpoint_hash}

    def tools(self) -> dict[str, str]:
        """PyTorch, the baseline, and what runs the artifacts."""
        return {**self.source.tools(), **self.runtime.versions()}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Measure what runs here; say of the rest why it does not."""
        one = next(batches(self.samples.artifact(), 1))
        facts = measure_target(self.context, self.runtime, self.builds, one).to_facts()
        return {**facts, "measured_on": self.machine()}


def measure_target(
    context: RunContext, runtime: Target, builds: Sequence[BuildStep], one: Pictures
) -> BenchFacts:
    """Measure artifacts of one target, as far as this machine runs them.

    Args:
        context: Configuration and network.
        runtime: The target.
        builds: Which artifacts.
        one: One picture.
    """
    threads = context.config.bench.threads
    missing = {step.precision: runtime.missing(step.artifact()) for step in builds}
    openers = {
        step.precision: partial(runtime.open, step.artifact(), threads=threads)
        for step in builds
        if missing[step.precision] is None
    }
    measured = measure(context, openers, runtime.title, one) if openers else None
    latency = {}
    for precision, why in missing.items():
        if why is not None:
            latency[precision] = Number.not_measured(why, unit="ms")
        else:
            assert measured is not None
            latency[precision] = measured.headline(precision)
    return BenchFacts(runtime.name, latency, measured)


def measure(
    context: RunContext, openers: Mapping[str, Callable[[], Runner]], title: str, one: Pictures
) -> Measured:
    """Measure runners and PyTorch, interleaved.

    Args:
        context: Configuration and network.
        openers: Open the runners, by name; may be empty.
        title: What is measured, for people.
        one: One picture.
    """
    settings = context.config.bench
    protocol = timing.Protocol(settings.warmup, settings.samples, settings.max_seconds)
    load_before = machine.load()
    smallest = min(settings.batches)
    first = one.repeated(smallest).prepared()
    runners: dict[str, Runner] = {}
    cold: dict[str, float] = {}
    with ExitStack() as stack:
        for name, open_runner in openers.items():
            context.progress(0, None, f"opening {title} {name}")
            runner, cold[name] = timing.cold_start(open_runner, first)
            runners[name] = stack.enter_context(runner)
            _check_batches(settings.batches, runner, f"{title} {name}")
        baseline = context.source.baseline(settings.threads)
        runners[PYTORCH] = stack.enter_context(baseline)
        by_batch = {}
        for batch in settings.batches:
            pictures = one.repeated(batch)
            by_batch[batch] = _measure_batch(context, runners, pictures, protocol, title)
        context.progress(0, None, f"{title}, end to end")
        prepare = _preparation(context, smallest)
        whole = {
            name: timing.end_to_end(runner, prepare, protocol).summary()
            for name, runner in runners.items()
        }
        context.progress(0, None, f"{title}, throughput")
        queued = {name: runner.throughput(protocol.samples) for name, runner in runners.items()}
        states = {name: runner.device_state() for name, runner in runners.items()}
        devices = {name: runner.device for name, runner in runners.items()}
    return Measured(
        protocol=protocol,
        machine=machine.Machine.here(),
        load_before=load_before,
        date=time.strftime("%Y-%m-%d"),
        batches=by_batch,
        end_to_end=EndToEnd(smallest, whole),
        cold_start_ms=cold,
        throughput={name: tuple(rows) for name, rows in queued.items() if rows},
        device_state={name: state for name, state in states.items() if state},
        devices=devices,
    )


def _check_batches(batches: Sequence[int], runner: Runner, what: str) -> None:
    """Refuse batch sizes that a runner does not take, before anything is measured."""
    for batch in batches:
        if not runner.smallest <= batch <= (runner.largest or batch):
            raise InputError(
                f"{what} takes batches of {runner.smallest} to {runner.largest}, not {batch}: "
                "change bench.batches (or --batch), or build with other batches"
            )


def _measure_batch(
    context: RunContext,
    runners: Mapping[str, Runner],
    pictures: Pictures,
    protocol: timing.Protocol,
    title: str,
) -> BatchLatency:
    def tick(done: int) -> None:
        context.progress(done, protocol.samples, f"{title}, batch {len(pictures)}")

    timed = timing.interleaved(runners, pictures, protocol, tick)
    return batch_latency(timed, next(iter(runners)))


def batch_latency(timed: Mapping[str, Mapping[str, Latency]], baseline: str) -> BatchLatency:
    """What calls of several runners come to.

    Args:
        timed: By runner and phase, the calls of one interleaved run, PyTorch's among them.
        baseline: The runner that the others are held against, beside PyTorch.
    """
    return BatchLatency(
        phases={
            name: {phase: latency.summary() for phase, latency in phases.items()}
            for name, phases in timed.items()
        },
        baseline=baseline,
        ratio_to_baseline=timing.ratios(timed, baseline),
        ratio_to_pytorch=timing.ratios(timed, PYTORCH),
        samples_ms={name: phases[timing.ENGINE].samples for name, phases in timed.items()},
    )


def _preparation(context: RunContext, batch: int) -> Callable[[], Pictures]:
    """Decodes, resizes and crops so many images after the others, the first few in turn."""
    source = context.source
    dataset = source.validation
    order = itertools.cycle(range(min(32, len(dataset))))

    def prepare() -> Pictures:
        return source.pictures(dataset, (next(order) for _ in range(batch)))

    return prepare
