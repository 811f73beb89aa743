"""What the commands of `python -m pipeline` do, as functions that return text and exit codes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline import check as checks
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.console import JsonConsole, QuietConsole, RichConsole
from pipeline.errors import GateFailedError, InputError, UnavailableError
from pipeline.quiet import Log
from pipeline.render.terminal import render, summary
from pipeline.run import (
    LOG_FILE,
    Selection,
    execute,
    locked,
    make_context,
    plan,
    refuse_foreign,
)
from pipeline.run import dry_run as plan_run
from pipeline.stages import bench as stages_bench
from pipeline.stages import report
from pipeline.stages.base import Context
from pipeline.stages.build import BuildStep, in_precisions
from pipeline.stages.graph import GRAPH, ExportStep, SimplifyStep
from pipeline.stages.samples import CalibrationStep, read_calibration
from pipeline.targets import TARGETS
from pipeline.targets.base import Images

LOOKS = {"rich": RichConsole, "quiet": QuietConsole, "json": JsonConsole}


@contextlib.contextmanager
def _log(config: Config) -> Iterator[Log]:
    log = Log(config.folder / LOG_FILE)
    try:
        yield log
    finally:
        log.close()


def run(config: Config, path: Path, selection: Selection, *, look: str, wait_s: float) -> int:
    """Run the pipeline, print its summary and return the exit code."""
    _refuse_foreign(config, selection)
    with (
        locked(config.folder, wait_s),
        _log(config) as log,
        log.captured() as screen,
        LOOKS[look](screen) as console,
    ):
        context = make_context(config, log, console)
        outcome = execute(context, selection, console)
        results = report.write(config, path, outcome)
    if look != "json":
        print(summary(results, str(config.folder)))
    return outcome.exit_code


def _refuse_foreign(config: Config, selection: Selection) -> None:
    """Refuse what is in the way before as much as a log file is written."""
    silent = QuietConsole(sys.stderr)
    refuse_foreign(make_context(config, lambda line: None, silent), selection)


def dry_run(config: Config, selection: Selection) -> str:
    """The plan, with the reason for every step."""
    _refuse_foreign(config, selection)
    with _log(config) as log:
        context = make_context(config, log, QuietConsole(sys.stderr))
        rows = [
            (step.stage, step.name, why or "up to date")
            for step, why in plan_run(context, selection)
        ]
    # Lines, not a table: reasons may name long paths, and scripts read this.
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {why}" for a, b, why in rows)


def check(output: Path, name: str | None) -> int:
    """Check what lies under `output`, print what was found and return the exit code."""
    table = Table("artifact", "MB", "opened by", "", box=None)
    problems: list[str] = []
    for folder in checks.results(output, name):
        for finding in checks.check(folder):
            size = f"{finding.size / 1e6:.2f}"
            state = "[red]damaged[/]" if finding.problem else "[green]ok[/]"
            table.add_row(finding.name, size, finding.opened, state)
            if finding.problem:
                problems.append(f"{finding.name}: {finding.problem}")
    print(render(table))
    for problem in problems:
        print(problem)
    if problems:
        print("rebuild what is damaged with: python -m pipeline run CONFIG", file=sys.stderr)
    return GateFailedError.exit_code if problems else 0


def doctor(target: str | None) -> str:
    """What targets need and what is there."""
    table = Table("target", "needs", "found", "for", "how to get it", box=None)
    for name, runtime in TARGETS.items():
        if target in (None, name):
            for need in runtime.requirements():
                found = need.found or "[yellow]missing[/]"
                remedy = "" if need.found else need.remedy
                table.add_row(name, need.name, found, need.needed_for, remedy)
    return render(table)


@dataclass(frozen=True)
class BenchReport:
    """What a measurement gave.

    Attributes:
        text: A table for people.
        plain: The same, and every sample, for JSON.
    """

    text: str
    plain: dict[str, Any]


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
) -> BenchReport:
    """Measure artifacts of one target, or PyTorch alone.

    Raises:
        InputError: The artifacts are not built, or a precision is not among them.
        UnavailableError: This machine cannot run any of them.
    """
    chosen = {
        "batches": batch or None,
        "threads": threads,
        "samples": samples,
        "warmup": warmup,
        "max_seconds": max_seconds,
    }
    settings = {name: value for name, value in chosen.items() if value is not None}
    config = config.model_copy(update={"bench": config.bench.model_copy(update=settings)})
    with _log(config) as log, log.captured() as screen, RichConsole(screen) as console:
        context = make_context(config, log, console)
        one = context.source.preprocess(context.source.validation.image(0))[None]
        if target == "torch":
            facts = stages_bench.measure(context, {}, "PyTorch", one)
        else:
            builds = _builds(context, target, precision)
            facts = stages_bench.measure_target(context, TARGETS[target], builds, one)
            if profile:
                images = np.repeat(one, config.bench.batches[0], 0)
                facts["profile"] = {
                    step.precision: TARGETS[target].profile(
                        step.artifact(), images, threads=config.bench.threads
                    )
                    for step in builds
                    if facts["latency"][step.precision]["value"] is not None
                }
    reasons = {n["why"] for n in facts.get("latency", {}).values() if n["value"] is None}
    if "batches" not in facts:
        raise UnavailableError(f"not measured: {'; '.join(sorted(reasons))}")
    return BenchReport(render(*_bench_tables(facts), *_profile_tables(facts)), facts)


def _builds(context: Context, target: str, precisions: Sequence[str]) -> list[BuildStep]:
    """The target's built artifacts, verified; only those of the named precisions, if any."""
    path = "python -m pipeline run"
    steps = [s for s in plan(context) if isinstance(s, BuildStep) and s.target == target]
    if not steps:
        raise InputError(f"the configuration has no target {target}: add it under targets")
    chosen = in_precisions(steps, precisions)
    for step in chosen:
        if not step.folder.exists():
            raise InputError(f"{step.folder} is not built yet: run {path} --target {target}")
        step.artifact().verify()
    return chosen


def _profile_tables(facts: dict[str, Any]) -> Iterator[Any]:
    """Time by operator, a table for every precision that has one."""
    for precision, rows in facts.get("profile", {}).items():
        if not rows:
            yield f"{precision}: this runtime does not tell the time by operator"
            continue
        table = Table(*rows[0], title=f"{precision} by operator", box=None)
        for row in rows:
            cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
            table.add_row(*cells)
        yield table


def _bench_tables(facts: dict[str, Any]) -> list[Any]:
    """Latency by batch size, phase and runner, and what it was measured on."""
    table = Table(
        "batch", "what", "phase", "p50 ms", "95 % interval", "p90", "p99", "n", "images/s"
    )
    for batch, measured in facts["batches"].items():
        for name, phases in measured["phases"].items():
            for phase, latency in phases.items():
                low, high = latency["p50_interval"]
                table.add_row(
                    batch,
                    name,
                    phase,
                    f"{latency['p50']:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    *(f"{latency[p]:.3f}" if latency[p] else "-" for p in ("p90", "p99")),
                    str(latency["samples"]),
                    f"{int(batch) / latency['p50'] * 1e3:.0f}",
                )
    return [table, *_bench_lines(facts)]


def _bench_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What was measured beside latency, and on what."""
    yield from (f"{name}: {device}" for name, device in facts["devices"].items())
    for batch, measured in facts["batches"].items():
        for name, ratio in measured["ratio_to_pytorch"].items():
            low, high = ratio["interval"]
            yield (
                f"batch {batch}: {name} takes {ratio['value']:.3f} ({low:.3f} to {high:.3f}) of "
                "PyTorch's time"
            )
    for name, number in facts.get("latency", {}).items():
        if number["value"] is None:
            yield f"{name}: not measured: {number['why']}"
    for name, rows in facts["throughput"].items():
        for row in rows:
            yield (
                f"{name}: batch {row['batch']}: {row['images_per_s']:.0f} images/s, call after call"
                f" ({row['p50_ms']:.3f} ms each)"
            )
    for name, noted in facts["notes"].items():
        if reasons := noted.get("throttled"):
            yield f"{name}: the device was throttled: {', '.join(reasons)}"
    for name, cold in facts["cold_start_ms"].items():
        yield f"{name}: {cold:.0f} ms from opening to the first logits"


def calibrate(config: Config, *, method: str | None, stored: str, limit: int | None) -> str:
    """Ranges of all tensors of the graph over the calibration set, as text.

    Args:
        config: The configuration; its `run` must have made the graph and the calibration set.
        method: How ranges are chosen; None for the configuration's.
        stored: "int8" (symmetric) or "uint8" (asymmetric).
        limit: Most tensors to show.

    Raises:
        InputError: The graph or the calibration set is not there yet.
    """
    from calibration.cache import CacheKey, cached
    from calibration.observe import observe
    from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method
    from calibration.show import text
    from calibration.table import Table as Ranges
    from calibration.table import make_table

    chosen = Method(method or config.calibration.method)
    scheme = ACTIVATIONS_INT8 if stored == "int8" else ACTIVATIONS_UINT8
    with locked(config.folder), _log(config) as log, log.captured() as screen:
        with RichConsole(screen) as console:
            context = make_context(config, log, console)
            simplify, step = _calibration_steps(context)
            graph = simplify.artifact().path(GRAPH)
            images = read_calibration(step.artifact(), context.source)
        key = CacheKey.of(graph, images.hashes, context.source.preprocess.to_dict(), chosen, scheme)

        def make() -> Ranges:
            return make_table(
                observe(graph, images.images), chosen, scheme, images=len(images.images)
            )

        path = config.folder / f"ranges-{chosen}-{stored}.json"
        table, note = cached(path, key, make)
        log(note)
    return text(table, limit)


def _calibration_steps(context: Context) -> tuple[SimplifyStep, CalibrationStep]:
    """The graph and the calibration set, both up to date."""
    export = ExportStep(context)
    simplify, calibration = SimplifyStep(context, export), CalibrationStep(context)
    for step in (export, simplify):
        if why := step.stale():
            raise InputError(f"{step.folder}: {why}: run python -m pipeline run first")
    if calibration.stale():
        calibration.run()
    return simplify, calibration


def diff(config: Config, target: str, *, precision: str | None, images: int) -> str:
    """Error of a built artifact against PyTorch, layer by layer, and where it jumps.

    Raises:
        InputError: The artifact is not built, or the target cannot compare layer by layer.
    """
    with _one_artifact(config, target, precision, images) as (context, artifact, chosen):
        rows = TARGETS[target].diff(artifact, context.source.fused(), chosen)
    if rows is None:
        raise InputError(f"{target} has no comparison by layer; it has: coreml")
    table = Table("module", "operation", "line", "relative error", "largest", "", box=None)
    for row in rows:
        table.add_row(
            row["module"],
            row["operation"],
            str(row["line"]),
            f"{row['relative']:.2e}",
            f"{row['largest']:.2e}",
            "[red]jumps here[/]" if row["jump"] else "",
        )
    first = next((row["module"] or "the network itself" for row in rows if row["jump"]), None)
    verdict = f"the error jumps at {first}" if first else "the error grows slowly: it jumps nowhere"
    return render(table, verdict)


def fitness(config: Config, target: str, *, precision: str | None, images: int) -> str:
    """Checks of a built artifact for the device's accelerator, with advice.

    Raises:
        InputError: The artifact is not built, or the target has no such checks.
    """
    with _one_artifact(config, target, precision, images) as (_, artifact, chosen):
        rows = TARGETS[target].fitness(artifact, chosen)
    if rows is None:
        raise InputError(f"{target} has no checks of fitness; it has: coreml")
    lines = []
    for row in rows:
        lines.append(f"{row['level']:<8} {row['check']}: {row['found']}")
        if row["advice"]:
            lines.append(f"{'':<8} {row['advice']}")
        if row["where"]:
            lines.append(f"{'':<8} such as {', '.join(row['where'])}")
    return "\n".join(lines)


@contextlib.contextmanager
def _one_artifact(
    config: Config, target: str, precision: str | None, images: int
) -> Iterator[tuple[Context, Artifact, Images]]:
    """One built artifact of a target, the first if none is named, and some validation images."""
    with _log(config) as log, log.captured() as screen, RichConsole(screen) as console:
        context = make_context(config, log, console)
        step = _builds(context, target, (precision,) if precision else ())[0]
        yield context, step.artifact(), context.source.first_images(images)
