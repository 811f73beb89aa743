"""What huge pages bring to ONNX Runtime, for the published path and for our artifacts.

    python benchmarks/huge_pages.py
    python benchmarks/huge_pages.py --as-cpu avx2-vnni --docs docs/benchmarks.md

Every round starts one process for each file and each way, in turn: pages of 4 KB, memory moved to
huge pages as `pipeline` does, and glibc told to ask for them from the beginning. A sample is the
median of a process' calls, since where memory lies is drawn anew with each process. Ratios are to
pages of 4 KB, with 95 % bootstrap intervals over the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from cpu_latency import (
    BASELINE,
    as_cpu_option,
    build_ours,
    export_graphs,
    kernels,
    play,
    restrict,
)
from documents import fill
from networks import NETWORKS, SHAPE

from pipeline.core import machine
from pipeline.core.figures import ratio
from pipeline.core.huge_pages import why_not
from pipeline.steps.artifact import Artifact
from pipeline.targets.ort.runner import OrtRunner
from pipeline.targets.ort.session import Settings
from pipeline.targets.ort.target import how_to_open

SMALL, MOVED, ASKED = "pages of 4 KB", "moved", "glibc asks"
WAYS = (SMALL, MOVED, ASKED)
ASK = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
WARMUP = 10


def call(source: Path, way: str, threads: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of calls in this process, and its memory in megabytes."""
    path, settings = (
        (source, Settings()) if source.is_file() else how_to_open(Artifact.read(source))
    )
    image = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
    times = []
    with OrtRunner(path, replace(settings, huge_pages=way == MOVED), threads) as runner:
        for _ in range(WARMUP):
            runner(image)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            times.append(runner.timed(image).phases["engine"])
    memory = machine.peak_memory()
    assert memory is not None  # Linux tells it
    return {"ms": float(np.median(times)), "mb": memory / 1e6}


def elsewhere(
    source: Path, way: str, threads: int, seconds: float, as_cpu: str | None
) -> dict[str, float]:
    """`call` in a process of its own."""
    job = json.dumps([str(source), way, threads, seconds, as_cpu])
    environment = {**os.environ, **(ASK if way == ASKED else {})}
    done = subprocess.run(
        [sys.executable, __file__, "--child", job],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise click.ClickException(f"{source.name}, {way}: {done.stderr.strip()[-400:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    sources: dict[str, Path], threads: int, rounds: int, seconds: float, as_cpu: str | None
) -> list[dict[str, Any]]:
    """All ways of all files, in turns."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        label: {way: [] for way in WAYS} for label in sources
    }
    for _ in range(rounds):
        for label, source in sources.items():
            for way in WAYS:
                found[label][way].append(elsewhere(source, way, threads, seconds, as_cpu))
    rows = []
    for label, ways in found.items():
        base = [each["ms"] for each in ways[SMALL]]
        for way in WAYS:
            samples = [each["ms"] for each in ways[way]]
            compared = ratio(samples, base)
            rows.append(
                {
                    "file": label,
                    "threads": threads,
                    "way": way,
                    "ms": float(np.median(samples)),
                    "mb": float(np.median([each["mb"] for each in ways[way]])),
                    "ratio": compared.value,
                    "interval": compared.interval,
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    """A row for each file and number of threads, a column for each way."""
    lines = [about, "", f"| | {' | '.join(WAYS)} | memory, MB |", "|---|---|---|---|---|"]
    by_file: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_file.setdefault((row["file"], row["threads"]), []).append(row)
    for (label, threads), ways in by_file.items():
        first, *others = ways
        cells = [f"{first['ms']:.2f} ms"]
        for row in others:
            low, high = row["interval"]
            cells.append(f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})")
        count = f"{threads} thread{'' if threads == 1 else 's'}"
        memory = ", ".join(f"{row['mb']:.0f}" for row in ways)
        lines.append(f"| {label}, {count} | {' | '.join(cells)} | {memory} |")
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--model", "models", multiple=True, type=click.Choice(NETWORKS), help="Default: S0.")
@click.option("--threads", "counts", multiple=True, type=click.IntRange(1), help="Default: 1, 2.")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(4))
@click.option("--seconds", default=1.5, show_default=True, help="Of each process.")
@as_cpu_option
@click.option("--docs", type=click.Path(path_type=Path), help="Fill the table of a document.")
@click.option("--child", "child", hidden=True)
def main(
    models: tuple[str, ...],
    counts: tuple[int, ...],
    rounds: int,
    seconds: float,
    as_cpu: str | None,
    docs: Path | None,
    child: str | None,
) -> None:
    if child is not None:
        source, way, threads, lasting, cls = json.loads(child)
        restrict(cls)
        click.echo(json.dumps(call(Path(source), way, threads, lasting)))
        return
    if why := why_not():
        raise click.ClickException(f"not measured: {why}")
    play(as_cpu)
    here = machine.describe()
    about = (
        f"cpu {here['cpu']}, date {time.strftime('%Y-%m-%d')}, load {machine.load():.2f}, kernels "
        f"of {kernels()}; {rounds} processes each."
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="huge-pages-") as name:
        for model in models or ("care_s0",):
            folder = Path(name) / model
            folder.mkdir()
            graphs = export_graphs(model, folder)
            built = build_ours(model, graphs["exact"], folder, int8=True)
            sources = {
                f"{model} {BASELINE}": graphs["published"],
                f"{model} ours fp32": built["fp32"],
                f"{model} ours int8": built["int8"],
            }
            for threads in counts or (1, 2):
                rows += measure(sources, threads, rounds, seconds, as_cpu)
    click.echo(markdown(rows, about))
    if docs is not None:
        fill(docs, f"huge pages as {as_cpu}" if as_cpu else "huge pages", markdown(rows, about))
    click.echo(json.dumps({"here": here, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
