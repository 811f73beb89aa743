"""`bench`: how fast are the artifacts of one target here?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.table import Table

from pipeline.commands.artifacts import bench_step, builds_of, log_of
from pipeline.commands.console import RichConsole
from pipeline.commands.validate import doubts, in_words, restrict
from pipeline.config import BenchConfig, Config
from pipeline.core import contention
from pipeline.core.errors import GateFailedError, InputError, UnavailableError
from pipeline.core.figures import LatencySummary, measured_here
from pipeline.report.terminal import render
from pipeline.scheduler.plan import make_context, plan
from pipeline.stages import bench as stages_bench
from pipeline.stages.bench import BenchStep
from pipeline.stages.context import RunContext
from pipeline.stages.drawn import Drawn, choose, draw, judged_by
from pipeline.stages.samples import SampleStep
from pipeline.stages.validate import ReferenceStep
from pipeline.steps.facts.bench import PYTORCH, BenchFacts, Measured
from pipeline.targets.registry import TARGETS

Profile = list[dict[str, Any]] | None
"""Time by operator of one artifact; None where the runtime cannot tell."""

DECODED = 32
"""Images that are decoded where no run has done so."""


@dataclass(frozen=True)
class BenchReport:
    """What a measurement gave.

    Attributes:
        text: A table for people.
        plain: The same, and every sample, for JSON.
        exit_code: What the command ends with: that of a failed gate where timed calls answered
            something else than was judged, since what was timed is another thing then.
    """

    text: str
    plain: dict[str, Any]
    exit_code: int = 0


def bench(
    config: Config,
    target: str,
    *,
    batch: tuple[int, ...],
    threads: int | None,
    precision: tuple[str, ...],
    samples: int | None,
    warmup: int | None,
    max_seconds: float | None,
    profile: bool = False,
    as_cpu: str | None = None,
    contended: bool = False,
    sustained: float | None = None,
) -> BenchReport:
    """Measure artifacts of one target, or PyTorch alone.

    Args:
        config: The configuration of the run that built them.
        target: The target, or "torch".
        batch: Batch sizes; those of the configuration if none is named, as all that follow.
        threads: CPU threads.
        precision: Only these precisions.
        samples: Timed calls.
        warmup: Calls before the first timed one.
        max_seconds: Time limit.
        profile: Also tell the time by operator.
        as_cpu: Name of a class of CPUs whose kernels the runtime shall take.
        contended: Keep a process busy for every two granted CPUs.
        sustained: Also call each artifact without a rest for so many seconds.

    Raises:
        InputError: The artifacts are not built, a precision is not among them, or a number is
            beyond what makes sense.
        UnavailableError: This machine cannot run any of them.
    """
    if as_cpu is not None and target not in TARGETS:
        raise InputError(f"--as-cpu measures a target, not {target}")
    restrict(target, as_cpu)
    chosen = {
        "batches": batch or None,
        "threads": threads,
        "samples": samples,
        "warmup": warmup,
        "max_seconds": max_seconds,
    }
    config = config.model_copy(update={"bench": with_settings(config.bench, **chosen)})
    rivals, endurance_s = contention.rivals() if contended else 0, sustained or 0.0
    with (
        log_of(config, required=False) as log,
        log.captured() as screen,
        RichConsole(screen) as console,
    ):
        context = make_context(config, log, console.progress)
        if target == "torch":
            drawn = _of_pytorch(context)
            measured = stages_bench.measure(context, {}, "PyTorch", drawn, rivals, endurance_s)
            found = _Found(BenchFacts(target, {}, measured))
        else:
            found = _measure(context, target, precision, rivals, endurance_s, profile)
    return _report(found, rivals, as_cpu)


@dataclass(frozen=True)
class _Found:
    """What was measured.

    Attributes:
        facts: Latencies.
        doubtful: What speaks against the artifacts on this CPU.
        profiles: Time by operator, by precision.
    """

    facts: BenchFacts
    doubtful: Sequence[str] = ()
    profiles: Mapping[str, Profile] = field(default_factory=dict)


def _measure(
    context: RunContext,
    target: str,
    precision: tuple[str, ...],
    rivals: int,
    endurance_s: float,
    profile: bool,
) -> _Found:
    """Measure artifacts of a target."""
    runtime, bench = TARGETS[target], context.config.bench
    builds = builds_of(context, target, precision)
    doubtful = doubts(runtime, builds)
    drawn = _of_target(context, bench_step(context, target))
    facts = stages_bench.measure_target(context, runtime, builds, drawn, rivals, endurance_s)
    if not profile:
        return _Found(facts, doubtful)
    pictures = drawn.batches(bench.batches[0])[0]
    profiles = {
        step.precision: runtime.profile(step.artifact(), pictures, threads=bench.threads)
        for step in builds
        if facts.latency[step.precision].value is not None
    }
    return _Found(facts, doubtful, profiles)


def _report(found: _Found, rivals: int, as_cpu: str | None) -> BenchReport:
    """Put what was measured into words, and into plain values.

    Raises:
        UnavailableError: Nothing was measured.
    """
    facts, measured = found.facts, found.facts.measured
    if measured is None:
        reasons = {number.why for number in facts.latency.values() if number.value is None}
        raise UnavailableError(f"not measured: {'; '.join(sorted(reasons))}")
    text = render(
        _latencies(measured),
        _state(rivals),
        *found.doubtful,
        *_lines(facts, measured),
        *_profile_tables(found.profiles),
    )
    plain = {
        **facts.to_facts(),
        "state": str(measured_here()),
        "as_cpu": as_cpu,
        "validity": {str(batch): by for batch, by in _validity(measured).items()},
        **({"profile": dict(found.profiles)} if found.profiles else {}),
    }
    code = GateFailedError.exit_code if _answers_wrong(measured) else 0
    return BenchReport(text, plain, code)


def with_settings(bench: BenchConfig, **chosen: Any) -> BenchConfig:
    """How to measure, with what the command line says in place of what a configuration does.

    Args:
        bench: The configuration's.
        chosen: By name; None leaves it.

    Raises:
        InputError: A number is beyond what makes sense.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    try:
        return BenchConfig.model_validate({**bench.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        name, *_ = map(str, first["loc"])
        raise InputError(f"bench.{name}: {first['msg']}, not {first['input']}") from error


def _answers_wrong(measured: Measured) -> bool:
    """Whether timed calls, or those without a rest, answered something else than was judged."""
    lasting = (each.answers for each in measured.sustained.values())
    return any(answers.problem for answers in (*measured.answers.values(), *lasting))


def _of_target(context: RunContext, step: BenchStep) -> Drawn:
    """Images to measure a target with: those of the run, as far as they are there."""
    if not step.samples.folder.exists():
        return _decoded(context)
    steps = [*step.builds, *step.judges.values()]
    if gone := [each for each in steps if not each.folder.exists()]:
        step.do_without(gone)
    return step.drawn()


def _of_pytorch(context: RunContext) -> Drawn:
    """Images to measure PyTorch with, likewise."""
    steps = plan(context)
    samples = next(step for step in steps if isinstance(step, SampleStep))
    reference = next(step for step in steps if isinstance(step, ReferenceStep))
    if not samples.folder.exists() or not reference.folder.exists():
        return _decoded(context)
    found = judged_by(reference.artifact(), samples.artifact(), None)
    return draw(samples.artifact(), {PYTORCH: found})


def _decoded(context: RunContext) -> Drawn:
    """Images that no run decoded, so that nothing has judged what is answered for them."""
    source = context.source
    dataset, shape = source.validation, source.network.input_shape
    chosen = choose(len(dataset), int(np.prod(shape)))[:DECODED]
    return Drawn(
        source.pictures(dataset, map(int, chosen)),
        unknown="no run has judged these images: run python -m pipeline run --only validate",
    )


def validity_lines(
    valid: Mapping[int, Mapping[str, Mapping[str, str]]],
) -> Iterator[str]:
    """A line for each percentile, from what stands by batch size, runner and percentile."""
    for batch, by_name in valid.items():
        for name, states in by_name.items():
            for percentile, state in states.items():
                yield f"batch {batch}: {name}: {percentile} {state}"


def _validity(measured: Measured) -> dict[int, dict[str, dict[str, str]]]:
    """By batch size, runner and percentile, whether it stands."""
    return {
        batch: {name: measured.validity(name, batch) for name in latency.phases}
        for batch, latency in measured.batches.items()
    }


def _state(rivals: int) -> str:
    """How the figures came about."""
    beside = "processes" if rivals > 1 else "process"
    return f"{in_words()}, beside {rivals} busy {beside}" if rivals else in_words()


def _profile_tables(profiles: Mapping[str, Profile]) -> Iterator[Any]:
    """Time by operator, a table for every precision that has one."""
    for precision, rows in profiles.items():
        if not rows:
            yield f"{precision}: this runtime does not tell the time by operator"
            continue
        table = Table(*rows[0], title=f"{precision} by operator", box=None)
        for row in rows:
            cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
            table.add_row(*cells)
        yield table


def _latencies(measured: Measured) -> Table:
    """Latency by batch size, runner and phase."""
    return latency_table({batch: latency.phases for batch, latency in measured.batches.items()})


def latency_table(
    by_batch: Mapping[int, Mapping[str, Mapping[str, LatencySummary]]],
) -> Table:
    """A table of latencies.

    Args:
        by_batch: Timed calls in sum, by batch size, name and phase.
    """
    table = Table(
        *("batch", "what", "phase", "p50 ms", "95 % interval", "p90 (at most)", "p99 (at most)"),
        *("n", "images/s"),
    )
    for batch, by_name in by_batch.items():
        for name, phases in by_name.items():
            for phase, calls in phases.items():
                low, high = calls.p50_interval
                table.add_row(
                    str(batch),
                    name,
                    phase,
                    f"{calls.p50:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    bounded(calls.p90, calls.p90_bound),
                    bounded(calls.p99, calls.p99_bound),
                    str(calls.samples),
                    f"{batch / calls.p50 * 1e3:.0f}",
                )
    return table


def bounded(value: float | None, bound: float | None) -> str:
    """A percentile with what it is at most; "-" with too few calls."""
    if value is None:
        return "-"
    return f"{value:.3f}" if bound is None else f"{value:.3f} ({bound:.3f})"


def _lines(facts: BenchFacts, measured: Measured) -> Iterator[str]:
    """What was measured beside latency, and on what."""
    yield from (f"{name}: {device}" for name, device in measured.devices.items())
    yield from _trust(measured)
    for batch, latency in measured.batches.items():
        for name, ratio in latency.ratio_to_pytorch.items():
            low, high = ratio.interval
            yield (
                f"batch {batch}: {name} takes {ratio.value:.3f} ({low:.3f} to {high:.3f}) of "
                "PyTorch's time"
            )
    for name, number in facts.latency.items():
        if number.value is None:
            yield f"{name}: not measured: {number.why}"
    for name, rows in measured.throughput.items():
        for row in rows:
            yield (
                f"{name}: batch {row.batch}: {row.images_per_s:.0f} images/s, call after call"
                f" ({row.p50_ms:.3f} ms each)"
            )
    for name, state in measured.device_state.items():
        if state.throttled:
            yield f"{name}: the device was throttled: {', '.join(state.throttled)}"
    for name, cold in measured.cold_start_ms.items():
        yield f"{name}: {cold:.0f} ms from opening to the first logits"
    yield from _beside_latency(measured)


def _beside_latency(measured: Measured) -> Iterator[str]:
    """Memory, and what calls without a rest came to."""
    for name, memory in measured.memory.items():
        yield f"{name}: {memory.words}"
    for name, lasting in measured.sustained.items():
        yield f"{name}: {lasting.words}"
        yield f"{name}: without a rest: {lasting.answers.words}"


def _trust(measured: Measured) -> Iterator[str]:
    """What speaks for the figures, and against them."""
    yield f"timed calls were given {measured.distinct} distinct images in turn"
    for name in measured.devices:
        if doubt := measured.doubt(name):
            yield f"{name}: latency is not to be trusted: {doubt}"
        if name in measured.answers:
            yield f"{name}: {measured.answers[name].words}"
        if name in measured.repeated:
            yield f"{name}: {measured.repeated[name].words}"
    yield from validity_lines(_validity(measured))
