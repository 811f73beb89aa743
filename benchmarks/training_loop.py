"""CPU time that the training loop adds to a step, over a bare loop of the same work.

    python benchmarks/training_loop.py
    python benchmarks/training_loop.py --model care_s0 --image-size 224 --batch-size 8 --steps 20

`care.train` trains on a batch that is kept in memory, with logs, guard against NaN and all; each
time it asks for the next batch, a bare loop takes a step of its own: the same network, batch,
mixing, loss and optimizer, and nothing else. So the two take turns step by step. Prints CPU
milliseconds of a step, the share that the loop adds (the median over pairs of steps, and its
quarters; and over all steps together), and a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image

from care import sampling, train
from care.distributed import World
from care.evaluate import Score
from care.job import Job, prepare
from care.loaders import Batch, TrainLoader
from care.precision import autocast
from care.settings import TrainSettings
from care.train import Judgement

WARM = 5
"""Pairs of steps that do not count."""


def make_images(folder: Path, count: int) -> None:
    """Names for so many steps; the pixels of training come from memory."""
    image = Image.new("RGB", (32, 32), "gray")
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


class Turns:
    """Hands a batch to the loop that is measured, and takes a bare step before each.

    Args:
        bare: The parts of the bare loop.
        batch: What both learn from.

    Attributes:
        loop: CPU seconds of each step of `care.train`.
        plain: CPU seconds of each bare step.
    """

    def __init__(self, bare: Job, batch: Batch) -> None:
        self.bare, self.batch = bare, batch
        self.loop: list[float] = []
        self.plain: list[float] = []

    def batches(self, loader: TrainLoader, first: int, last: int) -> Iterator[Batch]:
        """In place of `TrainLoader.batches`."""
        for step in range(first, last):
            started = time.process_time()
            self._step(step)
            given = time.process_time()
            self.plain.append(given - started)
            yield self.batch
            self.loop.append(time.process_time() - given)

    def _step(self, step: int) -> None:
        """What a training has to do, and nothing else."""
        learner = self.bare.learner
        if step == 0:
            learner.model.train()
        sampling.seed_step(self.bare.settings.seed, step, 0, 0)  # the same share is mixed
        images, targets = self.bare.finish(self.batch)
        images = images.contiguous(memory_format=learner.memory_format)
        with autocast(learner.device, self.bare.settings.precision):
            loss = learner.loss(images, learner.model(images), targets)
        loss.backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()


def run(settings: TrainSettings) -> Turns:
    """Train, in turns with a bare loop."""
    world = World(0, 1, torch.device("cpu"))
    job = prepare(settings, world)
    generator = torch.Generator().manual_seed(0)
    side = settings.image_size or 0
    shape = (settings.batch_size, side, side, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(2, (settings.batch_size,), generator=generator)
    turns = Turns(job, Batch(pixels.permute(0, 3, 1, 2), targets, ()))
    # A plain function in place of a method gets the loader as its first argument.
    with mock.patch.object(TrainLoader, "batches", lambda *given: turns.batches(*given)):
        train.train(settings, world)
    return turns


@click.command()
@click.option("--model", default="care_tiny", show_default=True)
@click.option("--image-size", default=32, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=60, show_default=True, type=click.IntRange(WARM + 4))
def main(model: str, image_size: int, batch_size: int, steps: int) -> None:
    """Print what the training loop adds to the CPU time of a step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loop-") as name:
        make_images(Path(name) / "images", steps * batch_size)
        data = f"folder:{name}/images"
        settings = TrainSettings(
            model=model, image_size=image_size, batch_size=batch_size, data=data, validation=data,
            epochs=1, warmup_epochs=0, distillation="none", workers=0, log_every=10, threads=1,
            output=Path(name) / "runs", progress=False,
        )  # fmt: skip
        judged = Judgement(Score(images=1, first=1, fifth=1, loss=0), None)
        with mock.patch.object(train, "validate", return_value=judged):
            turns = run(settings)
    loop, plain = np.array(turns.loop[WARM:]), np.array(turns.plain[WARM : len(turns.loop)])
    low, middle, high = statistics.quantiles((loop / plain - 1).tolist(), n=4)
    click.echo(f"bare loop   {1000 * np.median(plain):8.2f} ms a step")
    click.echo(f"care.train  {1000 * np.median(loop):8.2f} ms a step")
    total = loop.sum() / plain.sum() - 1
    click.echo(f"it adds {middle:.2%} ({low:.2%} to {high:.2%}), over all steps {total:.2%}")
    figures = {
        "bare_ms": round(1000 * float(np.median(plain)), 3),
        "loop_ms": round(1000 * float(np.median(loop)), 3),
        "overhead": round(middle, 4),
        "total_overhead": round(float(total), 4),
    }
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
