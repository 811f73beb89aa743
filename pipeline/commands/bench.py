"""`bench`: how fast are the artifacts of one target here?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.commands.artifacts import builds_of, log_of
from pipeline.commands.console import RichConsole
from pipeline.config import Config
from pipeline.core.errors import UnavailableError
from pipeline.report.terminal import render
from pipeline.scheduler.plan import make_context
from pipeline.stages import bench as stages_bench
from pipeline.targets.registry import TARGETS


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
    with log_of(config) as log, log.captured() as screen, RichConsole(screen) as console:
        context = make_context(config, log, console.progress)
        one = context.source.preprocess(context.source.validation.image(0))[None]
        if target == "torch":
            facts = stages_bench.measure(context, {}, "PyTorch", one)
        else:
            builds = builds_of(context, target, precision)
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
