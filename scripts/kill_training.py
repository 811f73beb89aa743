"""Kill trainings at random moments and see that the next one ends as an undisturbed one would.

    python scripts/kill_training.py --kills 30
    python scripts/kill_training.py --kills 10 --processes 2 --seed 3

Trains the smallest network on noise, undisturbed; then again from nothing, killed with SIGKILL in
the middle of epochs again and again, with another number of workers each time; then lets it finish,
and compares everything that was learnt, bit by bit. With two processes the launcher is killed, or
one of the two: torchrun then starts both anew by itself. `--signals` sends SIGTERM instead, and
says how long it took until the run was saved and ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from PIL import Image

from care import checkpoint

EPOCHS, IMAGES, BATCH = 6, 96, 8
WAIT = 600.0
"""Seconds after which a training is taken for hung."""


def make_images(folder: Path) -> None:
    """Two classes of noise."""
    generator = np.random.default_rng(0)
    for name, level in (("bright", 150), ("dark", 50)):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES // 2):
            pixels = generator.integers(level, level + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")


def command(images: Path, output: Path, processes: int, workers: int) -> list[str]:
    """The training that is killed; a step has the same images for any number of processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += ["--max-restarts", "100", "-m"]
    return [
        *launcher,
        *("care.train", "--model", "care_tiny", "--data", f"folder:{images}", "--image-size", "32"),
        *("--batch-size", str(BATCH // processes), "--workers", str(workers)),
        *("--epochs", str(EPOCHS), "--warmup-epochs", "1", "--lr", "1e-3", "--hold-out", "0.25"),
        *("--distillation", "none", "--output", str(output), "--log-every", "1", "--threads", "1"),
        *("--ema-decay", "0.9", "--no-tensorboard", "--save-minutes", "0.001", "--resume"),
    ]


def environment() -> dict[str, str]:
    """One thread, and our packages."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a training learnt."""
    saved = checkpoint.read_all(folder / "last.pt")
    moments = {
        f"{number}.{name}": value
        for number, state in saved["optimizer"]["state"].items()
        for name, value in state.items()
    }
    averaged = {f"average.{name}": value for name, value in saved["model_ema"].items()}
    return {**saved["model"], **averaged, **moments}


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of the log."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(event["step"], event["loss"]) for event in events if event["kind"] == "step"]


def trainers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train: the children of the launcher."""
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def wait_for_steps(folder: Path, more: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a training has taken some more steps, or ended."""
    log, end = folder / "metrics.jsonl", time.monotonic() + WAIT
    before: int | None = None
    while process.poll() is None and time.monotonic() < end:
        count = log.read_text().count('"kind": "step"') if log.exists() else 0
        before = count if before is None or count < before else before
        if count - before >= more:
            return
        time.sleep(0.01)
    if process.poll() is None:
        process.kill()
        sys.exit(f"the training hung for {WAIT:.0f} s")


def finish(arguments: list[str]) -> None:
    """Train to the end."""
    subprocess.run(
        arguments, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=WAIT
    )


def leftovers(folder: Path) -> list[str]:
    """Files that no finished training has."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@click.command()
@click.option("--kills", default=30, show_default=True, help="How often to kill.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 4))
@click.option("--seed", default=0, show_default=True, help="Chooses the moments.")
@click.option("--signals", is_flag=True, help="Send SIGTERM to the launcher instead of SIGKILL.")
def main(kills: int, processes: int, seed: int, signals: bool) -> None:
    """Kill trainings at random moments and compare what is learnt in the end."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        root = Path(name)
        make_images(root / "images")
        finish(command(root / "images", root / "whole", processes, 0))
        whole, parts = root / "whole/care_tiny", root / "parts/care_tiny"
        click.echo(f"undisturbed: {len(losses(whole))} steps")
        killed, seconds = 0, []
        while killed < kills:
            arguments = command(root / "images", root / "parts", processes, moments.randrange(4))
            with subprocess.Popen(
                arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as run:
                while killed < kills and run.poll() is None:
                    wait_for_steps(parts, moments.randrange(1, 4), run)
                    if run.poll() is not None:
                        break
                    time.sleep(moments.uniform(0, 0.1))
                    victims = trainers(run) if processes > 1 and not signals else []
                    chosen = moments.randrange(len(victims) + 1)
                    asked = time.monotonic()
                    if chosen < len(victims):
                        victims[chosen].kill()  # the launcher starts all of them anew
                        who = f"process {chosen}"
                    else:
                        run.send_signal(signal.SIGTERM if signals else signal.SIGKILL)
                        run.wait()
                        who = "the launcher" if processes > 1 else "the process"
                    killed += 1
                    seconds.append(time.monotonic() - asked)
                    click.echo(f"kill {killed}: {who}, {len(losses(parts))} steps logged")
            if run.returncode == 0 and killed < kills:
                compare(whole, parts)
                click.echo("finished before it was killed: compared, and begun again")
                for path in parts.iterdir():
                    path.unlink()
        finish(command(root / "images", root / "parts", processes, 1))
        compare(whole, parts)
        found = {"kills": killed, "processes": processes, "left_over": leftovers(parts)}
        if signals:
            found["slowest_answer_s"] = round(max(seconds), 2)
    click.echo(json.dumps({**found, "identical": True}))
    if found["left_over"]:
        sys.exit("something was left over")


def compare(whole: Path, parts: Path) -> None:
    """End with the names of what differs, if anything does."""
    expected, found = learnt(whole), learnt(parts)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if expected.keys() != found.keys() or different:
        sys.exit(f"these differ from an undisturbed training: {', '.join(different[:5])}")
    if losses(whole) != losses(parts):
        sys.exit("the losses in the log differ from those of an undisturbed training")


if __name__ == "__main__":
    main()
