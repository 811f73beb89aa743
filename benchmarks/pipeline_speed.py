"""How long the pipeline itself takes: help, a cold run, a run in which all is up to date.

    python benchmarks/pipeline_speed.py

Runs `python -m pipeline run pipeline.yaml` into a fresh folder, so that it takes some minutes. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import click

from pipeline.core import machine


def timed(*arguments: str, output: str) -> float:
    """Seconds that a command takes.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "CARE_ENGINES": output},
    )
    return time.perf_counter() - start


@click.command()
def main() -> None:
    """Time the pipeline on the embedded network."""
    here = {**machine.describe(), "load": machine.load()}
    run = ("run", "pipeline.yaml", "--quiet")
    with tempfile.TemporaryDirectory(prefix="pipeline-speed-") as output:
        figures = {
            "help_s": min(timed("--help", output=output) for _ in range(5)),
            "cold_run_s": timed(*run, output=output),
            "up_to_date_s": min(timed(*run, output=output) for _ in range(3)),
        }
    # The largest process of all: on Linux in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    figures = {name: round(value, 3) for name, value in figures.items()}
    click.echo(json.dumps({**figures, "peak_mib": round(peak), "here": here}))


if __name__ == "__main__":
    main()
