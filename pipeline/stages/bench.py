"""The stage that measures latency: all precisions of a target and PyTorch, interleaved."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import machine, timing
from pipeline.core.answers import Answers, Audit, Drawing
from pipeline.core.contention import contended
from pipeline.core.errors import InputError
from pipeline.core.figures import Latency, Number, ratio
from pipeline.core.network import Logits
from pipeline.core.preprocess import Pictures
from pipeline.core.runner import Runner
from pipeline.stages.context import RunContext
from pipeline.stages.drawn import Drawn, draw, judged_by
from pipeline.stages.memory import WORKER, memory_of
from pipeline.stages.target_step import TargetStep
from pipeline.steps.facts.bench import (
    FEWEST_CALLS,
    PYTORCH,
    BatchLatency,
    BenchFacts,
    EndToEnd,
    Measured,
    Sustained,
)
from pipeline.steps.step import LACKS, MACHINE, Step
from pipeline.targets.base import Target
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from pipeline.config import BenchConfig
    from pipeline.stages.build import BuildStep
    from pipeline.stages.samples import SampleStep
    from pipeline.stages.validate import ReferenceStep, ValidateStep

TENTHS = 10

LACKS_FOR = f"{LACKS} for"
"""Name of the input that says which artifacts run."""


class BenchStep(TargetStep):
    """Latency of one target, in all its precisions, beside PyTorch.

    Answers of timed calls are held against the validations of what runs here.
    """

    stage = "bench"
    from_source = True

    def __init__(
        self,
        context: RunContext,
        target: str,
        builds: Sequence[BuildStep],
        samples: SampleStep,
        judges: Mapping[str, ReferenceStep | ValidateStep],
    ) -> None:
        super().__init__(context, f"bench/{target}", [*builds, samples, *judges.values()], target)
        self.builds: Sequence[BuildStep] = builds
        self.samples, self.runtime = samples, TARGETS[target]
        self.judges = judges

    @property
    def measures(self) -> bool:
        """See `Step.measures`."""
        return True

    def do_without(self, missing: Sequence[Step]) -> bool:
        """Measure what was built: one precision that failed hides no other.

        Without its validation a precision is measured, but nobody says whether it answers right.
        """
        left = [build for build in self.builds if build not in missing]
        if self.samples in missing or not left:
            return False
        gone = [build.name for build in self.builds if build not in left]
        if gone:
            self.notes.append(f"measured without {', '.join(gone)}")
        self.judges = {name: step for name, step in self.judges.items() if step not in missing}
        self.builds, self.requires = left, (*left, self.samples, *self.judges.values())
        return True

    def inputs(self) -> Mapping[str, Any]:
        """The protocol, the machine, and the network, which is measured as PyTorch has it."""
        lacking = {step.name: self._lacking(step) for step in self.builds}
        return {
            **self.source.network_inputs(),
            "settings bench": self.context.config.bench.model_dump(mode="json"),
            MACHINE: self.machine(),
            LACKS_FOR: lacking,
        }

    def _lacking(self, build: BuildStep) -> str | None:
        """What the machine lacks to run an artifact; None if nothing."""
        found: str | None = self.of_the_machine(
            f"{LACKS_FOR}.{build.name}", lambda: self.runtime.missing(build.artifact())
        )
        return found

    def made_from(self) -> dict[str, str]:
        """The artifacts, the samples, who judged them, and the checkpoint of the baseline."""
        steps = [*self.builds, self.samples, *self._needed().values()]
        digests = {step.name: step.artifact().digest for step in steps}
        return {**digests, "checkpoint": self.source.checkpoint_hash}

    def seals(self) -> dict[str, str]:
        """See `Step.seals`; of what `made_from` names."""
        steps = [*self.builds, self.samples, *self._needed().values()]
        return {step.name: step.artifact().seal for step in steps}

    def _needed(self) -> dict[str, ReferenceStep | ValidateStep]:
        """Who judged what runs here; what was measured on other devices depends on nobody else."""
        here = {step.precision for step in self.builds if self._lacking(step) is None}
        if not here:
            return {}
        return {name: step for name, step in self.judges.items() if name in {*here, PYTORCH}}

    def modules(self) -> list[str]:
        """The step's own, the target's, and those of the process that it starts."""
        return [*super().modules(), WORKER]

    def tools(self) -> dict[str, str]:
        """PyTorch, the baseline, and what runs the artifacts."""
        return {**self.source.tools(), **self.runtime.versions()}

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Measure what runs here; say of the rest why it does not."""
        facts = measure_target(self.context, self.runtime, self.builds, self.drawn()).to_facts()
        return {**facts, "measured_on": self.machine()}

    def drawn(self) -> Drawn:
        """Images to measure with, and what was judged of them."""
        samples, needed = self.samples.artifact(), self._needed()
        judged: dict[str, Logits | str] = {}
        for build in self.builds:
            judged[build.precision] = f"validate/{build.name.replace('/', '-')} is not there"
            if build.precision in needed:
                validation = needed[build.precision].artifact()
                judged[build.precision] = judged_by(validation, samples, build.artifact())
        judged[PYTORCH] = "validate/pytorch is not there"
        if PYTORCH in needed:
            judged[PYTORCH] = judged_by(needed[PYTORCH].artifact(), samples, None)
        return draw(samples, judged)


def measure_target(
    context: RunContext,
    runtime: Target,
    builds: Sequence[BuildStep],
    drawn: Drawn,
    rivals: int = 0,
    endurance_s: float = 0.0,
) -> BenchFacts:
    """Measure artifacts of one target, as far as this machine runs them.

    Args:
        context: Configuration and network.
        runtime: The target.
        builds: Which artifacts.
        drawn: Images to measure with.
        rivals: Processes to keep busy meanwhile.
        endurance_s: How long each artifact is called without a rest; 0 for not at all.
    """
    threads, batch = context.config.bench.threads, context.config.bench.batches[0]
    missing = {step.precision: runtime.missing(step.artifact()) for step in builds}
    openers = {
        step.precision: partial(runtime.open, step.artifact(), threads=threads)
        for step in builds
        if missing[step.precision] is None
    }
    measured = None
    if openers:
        measured = measure(context, openers, runtime.title, drawn, rivals, endurance_s)
        memory = {}
        for step in builds:
            if step.precision in openers:
                context.progress(0, None, f"{runtime.title} {step.precision}, memory")
                artifact = step.artifact()
                memory[step.precision] = memory_of(runtime.name, artifact, batch, threads)
        measured = replace(measured, memory=memory)
    latency = {}
    for precision, why in missing.items():
        if why is not None:
            latency[precision] = Number.not_measured(why, unit="ms")
        else:
            assert measured is not None
            latency[precision] = measured.headline(precision)
    return BenchFacts(runtime.name, latency, measured)


def measure(
    context: RunContext,
    openers: Mapping[str, Callable[[], Runner]],
    title: str,
    drawn: Drawn,
    rivals: int = 0,
    endurance_s: float = 0.0,
) -> Measured:
    """Measure runners and PyTorch, interleaved.

    Args:
        context: Configuration and network.
        openers: Open the runners, by name; may be empty.
        title: What is measured, for people.
        drawn: Images to measure with.
        rivals: Processes to keep busy meanwhile.
        endurance_s: How long each runner is called without a rest; 0 for not at all.
    """
    settings = context.config.bench
    load_before = machine.load()
    first = drawn.batches(min(settings.batches))[0].prepared()
    runners: dict[str, Runner] = {}
    cold: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(contended(rivals))
        for name, open_runner in openers.items():
            context.progress(0, None, f"opening {title} {name}")
            runner, cold[name] = timing.cold_start(open_runner, first)
            runners[name] = stack.enter_context(runner)
            _check_batches(settings.batches, runner, f"{title} {name}")
        baseline = context.source.baseline(settings.threads)
        runners[PYTORCH] = stack.enter_context(baseline)
        measured = _in_turns(context, runners, title, drawn, load_before)
        lasting = {
            name: _endure(context, title, name, runners[name], drawn, endurance_s)
            for name in (openers or runners)
            if endurance_s > 0
        }
        states = {name: runner.device_state() for name, runner in runners.items()}
    return replace(
        measured,
        cold_start_ms=cold,
        device_state={name: state for name, state in states.items() if state},
        rivals=rivals,
        sustained=lasting,
    )


def _in_turns(
    context: RunContext,
    runners: Mapping[str, Runner],
    title: str,
    drawn: Drawn,
    load_before: float,
) -> Measured:
    """All that is measured of open runners beside each other."""
    settings = context.config.bench
    protocol = timing.Protocol.of(settings)
    watch = machine.Watch()
    drawings = {name: Drawing() for name in runners}
    by_batch = {}
    for size in settings.batches:
        # Answers of the batch size that stands for an artifact: one is enough.
        hearing = drawings if size == settings.batches[0] else {}
        images = drawn.batches(size)
        by_batch[size] = _measure_batch(context, runners, images, protocol, title, hearing)
    audits = _audit(context, runners, title, drawn.batches(settings.batches[0]), protocol)
    context.progress(0, None, f"{title}, end to end")
    smallest = min(settings.batches)
    prepare = _preparation(context, smallest)
    whole = {
        name: timing.end_to_end(runner, prepare, protocol).summary()
        for name, runner in runners.items()
    }
    context.progress(0, None, f"{title}, throughput")
    queued = {name: runner.throughput(protocol.samples) for name, runner in runners.items()}
    return Measured(
        protocol=protocol,
        machine=machine.Machine.here(),
        load_before=load_before,
        date=time.strftime("%Y-%m-%d"),
        batches=by_batch,
        end_to_end=EndToEnd(smallest, whole),
        cold_start_ms={},
        throughput={name: tuple(rows) for name, rows in queued.items() if rows},
        device_state={},
        devices={name: runner.device for name, runner in runners.items()},
        distinct=_distinct(drawn, settings.batches[0], by_batch[settings.batches[0]]),
        load_during=watch.others(),
        answers={
            name: drawn.compare(name, settings.batches[0], drawing)
            for name, drawing in drawings.items()
        },
        repeated=audits,
    )


def _distinct(drawn: Drawn, size: int, latency: BatchLatency) -> int:
    """Different images that timed calls were given: a measurement may end before it had all."""
    calls = len(latency.samples_ms[latency.baseline])
    return min(len(drawn.pictures), size * calls)


def _audit(
    context: RunContext,
    runners: Mapping[str, Runner],
    title: str,
    images: Sequence[Pictures],
    protocol: timing.Protocol,
) -> dict[str, Audit]:
    context.progress(0, None, f"{title}, audit of a repeated image")
    return audited(runners, images, protocol)


def audited(
    runners: Mapping[str, Runner], images: Sequence[Pictures], protocol: timing.Protocol
) -> dict[str, Audit]:
    """By runner, the time of one batch again and again relative to distinct ones.

    Args:
        runners: By name; they were measured before. One without distinct batches is left out.
        images: Batches of equal size.
        protocol: How to measure; its time counts for all of them together.
    """
    own = replace(protocol, max_seconds=protocol.max_seconds / len(runners))
    audits = {name: timing.repeated(runner, images, own) for name, runner in runners.items()}
    return {name: audit for name, audit in audits.items() if audit is not None}


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
    images: Sequence[Pictures],
    protocol: timing.Protocol,
    title: str,
    drawings: Mapping[str, Drawing],
) -> BatchLatency:
    def tick(done: int) -> None:
        context.progress(done, protocol.samples, f"{title}, batch {len(images[0])}")

    def hear(name: str, batch: int, logits: Logits) -> None:
        if name in drawings:
            drawings[name].hear(batch, logits)

    # PyTorch takes ten times as long, and would take the time of what is chosen between.
    seldom = {PYTORCH} if len(runners) > 1 else ()
    timed = timing.interleaved(runners, images, protocol, tick, hear, seldom=seldom)
    return batch_latency(timed, next(iter(runners)))


def _endure(
    context: RunContext, title: str, name: str, runner: Runner, drawn: Drawn, seconds: float
) -> Sustained:

    def tick(done: float) -> None:
        context.progress(round(done), round(seconds), f"{title} {name}, seconds without a rest")

    return endured(name, runner, drawn, context.config.bench, seconds, tick)


def endured(
    name: str,
    runner: Runner,
    drawn: Drawn,
    settings: BenchConfig,
    seconds: float,
    tick: Callable[[float], None] = lambda done: None,
) -> Sustained:
    """Call a runner without a rest.

    Args:
        name: Its name.
        runner: What to call.
        drawn: Images, and what was judged of them.
        settings: Batches, of which the first size is taken, and calls before.
        seconds: How long.
        tick: Is told how many seconds are done.
    """
    drawing, size, watch = Drawing(), settings.batches[0], machine.Watch()
    images = drawn.batches(size)
    found = timing.sustained(runner, images, seconds, settings.warmup, tick, drawing.hear)
    return endurance(found, size, drawn.compare(name, size, drawing), watch.others())


def endurance(
    found: timing.Endurance, batch: int, answers: Answers, load: float, cpus: int | None = None
) -> Sustained:
    """What calls without a rest come to.

    Args:
        found: The calls.
        batch: Images in a call.
        answers: Whether they answered right.
        load: CPUs that others kept busy meanwhile.
        cpus: CPUs that are granted; None for those that are.
    """
    calls, granted = len(found.samples), cpus or machine.granted()
    ends = [round(i * calls / TENTHS) for i in range(TENTHS + 1)]
    parts = [found.samples[a:b] for a, b in itertools.pairwise(ends)]
    reasons = []
    if calls < TENTHS * FEWEST_CALLS:
        reasons.append(f"{calls} calls, and {TENTHS * FEWEST_CALLS} are needed")
    if told := machine.busy_with_others(load, granted):
        reasons.append(told)
    reasons += [answers.problem] if answers.problem else []
    known = all(parts)
    return Sustained(
        seconds=found.seconds,
        latency=Latency(found.samples).summary(),
        images_per_s=batch * calls / found.seconds,
        tenths_ms=tuple(Latency(part).p50 for part in parts) if known else (),
        drift=ratio(parts[-1], parts[0]) if known else None,
        answers=answers,
        load=load,
        doubt="; ".join(reasons),
    )


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
