"""Run a small network on local Dask workers, kill one, and see that a plain run makes the same.

    python scripts/fleet.py --workers 1 --workers 2 --workers 7

Runs the pipeline on the embedded network with a few images, in shards, in one process; then on so
many workers of a scheduler on the loopback address, of which one is ended by SIGKILL in the middle
of a step (a single one is started again), with results and a store of its own each time. Compares
the digests of everything that is built. What is measured or chosen by timing is left out, and
listed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from pipeline.core.errors import ArtifactError
from pipeline.steps.artifact import MANIFEST, Artifact

CONFIG = """\
name: trial
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
calibration: {{images: 64, shard: 16}}
targets:
  trt: {{precisions: [fp16, int8]}}
  ort: {{precisions: [fp32, int8]}}
  coreml: {{precisions: [fp16]}}
validation: {{images: 64, batch: 16, shard: 16}}
bench: {{samples: 20, warmup: 2, max_seconds: 2}}
output: {output}
store: {{address: {output}-store, push: true}}
"""

TIMED = ("ort/", "bench/", "precision/int8-ort", "validate/ort-int8")
"""Beginnings of what is measured or chosen by timing, and of what is made from that."""

PATIENCE_S = 120.0


def found_in(output: Path) -> dict[str, Artifact]:
    """Every artifact that is there, whole."""
    found = {}
    for path in (output / "trial").rglob(MANIFEST):
        artifact = Artifact.read(path.parent)
        artifact.verify()
        found[artifact.name] = artifact
    return found


def run(root: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    """Begin a run with results and a store of its own."""
    config = root / f"{name}.yaml"
    config.write_text(CONFIG.format(output=root / name))
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--quiet", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def begun(kind: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of Dask's."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard"]
    environment = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "error"}
    return subprocess.Popen([*command, "--host", "127.0.0.1", *arguments], env=environment)


def worker(address: str, folder: Path) -> subprocess.Popen[bytes]:
    """A worker, as `python -m pipeline worker` has them."""
    options = ["--nthreads", "1", "--no-nanny", "--memory-limit", "0"]
    options += ["--resources", "cpu=1 bench=1", "--local-directory", str(folder)]
    return begun("worker", address, *options)


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    """Address of a scheduler of our own."""
    file = folder / "scheduler.json"
    process = begun("scheduler", "--port", "0", "--scheduler-file", str(file))
    try:
        end = time.monotonic() + PATIENCE_S
        while not (file.is_file() and file.stat().st_size):
            if time.monotonic() > end:
                sys.exit("the scheduler never came up")
            time.sleep(0.1)
        yield str(json.loads(file.read_text())["address"])
    finally:
        process.kill()
        process.wait()


def busy(pid: int) -> bool:
    """Whether a worker has a process of its own that runs a step."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return any(task.joinpath("children").read_text().split() for task in tasks)


def on_workers(root: Path, count: int) -> tuple[dict[str, Artifact], float, bool]:
    """A run on so many workers, of which one is killed while it runs a step.

    Returns:
        What it made, the seconds that it took, and whether one was killed while it was busy.
    """
    name, folder = f"with{count}", root / f"workers{count}"
    folder.mkdir()
    with scheduler(folder) as address:
        workers = [worker(address, folder) for _ in range(count)]
        start, killed = time.monotonic(), False
        with run(root, name, "--scheduler", address) as process:
            while process.poll() is None:
                time.sleep(0.2)
                # After the export there are several steps on their way.
                if (
                    not killed
                    and (root / name / "trial" / "export").exists()
                    and busy(workers[0].pid)
                ):
                    workers[0].kill()
                    workers[0].wait()
                    killed = True
                    if count == 1:
                        workers.append(worker(address, folder))
        seconds = time.monotonic() - start
        for each in workers:
            each.kill()
            each.wait()
        if process.returncode:
            sys.exit(f"the run on {count} workers ended with {process.returncode}")
    return found_in(root / name), seconds, killed


def differing(plain: Mapping[str, Artifact], made: Mapping[str, Artifact]) -> list[str]:
    """Names of artifacts that only one run made, or that differ though no timing decides them."""
    return [
        name
        for name in sorted(plain.keys() | made.keys())
        if not (name in plain and name in made)
        or (not name.startswith(TIMED) and plain[name].digest != made[name].digest)
    ]


@click.command()
@click.option("--workers", "counts", type=click.IntRange(1, 64), multiple=True, default=(1, 2, 7))
def main(counts: tuple[int, ...]) -> None:
    """Compare what a plain run and runs on workers make."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        root, start = Path(name), time.monotonic()
        if run(root, "plain").wait():
            sys.exit("the plain run failed")
        plain = found_in(root / "plain")
        click.echo(f"plain: {len(plain)} artifacts in {time.monotonic() - start:.0f} s")
        rows = []
        for count in counts:
            try:
                made, seconds, killed = on_workers(root, count)
            except ArtifactError as error:
                sys.exit(str(error))
            wrong = differing(plain, made)
            click.echo(
                f"{count} workers: {len(made)} artifacts in {seconds:.0f} s, killed: {killed}, "
                f"different: {wrong or 'none'}"
            )
            rows.append({"workers": count, "killed": killed, "different": wrong})
        left_out = sorted(name for name in plain if name.startswith(TIMED))
        click.echo(json.dumps({"runs": rows, "artifacts": len(plain), "left_out": left_out}))
        if any(row["different"] or not row["killed"] for row in rows):
            sys.exit("a run on workers made something else, or no worker was killed")


if __name__ == "__main__":
    main()
