r"""Train a network: `python -m care.train --data folder:/data/imagenet`.

    python -m care.train --config configs/train_care_tiny.yaml
    python -m care.train --config configs/train_care_tiny.yaml --resume
    torchrun --nproc_per_node 4 -m care.train --model care_s1 --data folder:/data/imagenet \
        --validation folder:/data/imagenet

Settings are in care.settings, the parts of a run in care.job, and what it writes in care.runs. A
run that was killed goes on with --resume after its last whole epoch, exactly as if nothing had
happened.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from care import checkpoint, distributed
from care.distributed import World
from care.evaluate import Score, score
from care.job import Job, prepare
from care.loaders import seed_epoch
from care.progress import Report, clock
from care.runs import Logbook, RunFolder
from care.settings import SettingsCommand, TrainSettings, given, options, read
from pipeline.core.errors import ConfigError


@click.command(cls=SettingsCommand)
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with settings; flags win over it."
)
@options
def main(config: Path | None, **flags: Any) -> None:
    """Train a network.

    Every setting is a flag here and a key in the YAML file (with underscores). Defaults are the
    published recipe of the CARE networks: 12 GPUs x 128 images, 300 epochs.
    """
    settings = read(config, given(flags))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with distributed.world(settings.device) as world:
        train(settings, world)


def train(settings: TrainSettings, world: World) -> None:
    """Start a training run, or go on with one.

    Args:
        settings: What to do.
        world: This process among its siblings.

    Raises:
        PipelineError: Settings, data or files cannot be used; nothing was overwritten.
    """
    run = RunFolder(settings)
    seed_epoch(settings.seed, 0, 0)  # the same initial weights in every process
    job = prepare(settings, world)
    saved = run.read_last(job.facts)
    world.wait()  # every process has looked at the folder before one changes it
    if world.is_main:
        run.prepare()
    first = job.learner.restore(saved) if saved else 0
    done, steps = job.learner.steps, job.loader.steps * settings.epochs
    with (
        Report(steps, done, world.is_main, settings.progress) as report,
        Logbook(run.path, first, done, settings.tensorboard, world.is_main) as log,
    ):
        report.say(_opening(job, run, first))
        for epoch in range(first, settings.epochs):
            seed_epoch(settings.seed, epoch, world.rank)
            started = time.perf_counter()
            loss = train_epoch(job, epoch, report, log)
            rate = job.loader.images_per_epoch / (time.perf_counter() - started)
            result = validate(job)
            seconds = time.perf_counter() - started
            log.epoch(_row(job, epoch, loss, result, rate, seconds))
            if world.is_main:
                save(run, job, epoch, result)
            report.say(_closing(job, epoch, loss, result, seconds))
        report.say(f"best top-1 on the validation images {job.learner.best:.2%}: {run.best}")
    if world.is_main and settings.export:
        run.export(settings.export)


def train_epoch(job: Job, epoch: int, report: Report, log: Logbook) -> float:
    """One pass over the training images; returns the mean loss."""
    settings, learner, world = job.settings, job.learner, job.world
    learner.model.train()
    if job.mix is not None:
        job.mix.mixup_enabled = not 0 < settings.mix_off_epoch <= epoch
    total = torch.zeros((), device=world.device)
    since, count = torch.zeros((), device=world.device), 0
    batches = itertools.islice(job.loader.epoch(epoch), job.loader.steps * settings.accumulate)
    for number, (images, targets) in enumerate(batches, start=1):
        if job.mix is not None:
            images, targets = job.mix(images, targets)
        step = number % settings.accumulate == 0
        loss = learner.learn(images, targets, step=step)
        total, since, count = total + loss, since + loss, count + 1
        if not step:
            continue
        recent = None
        if learner.steps % settings.log_every == 0:
            recent = world.mean(since / count).item()
            _require_finite(recent, learner.steps)
            log.step(
                {
                    "epoch": epoch + 1,
                    "step": learner.steps,
                    "lr": learner.learning_rate,
                    "loss": recent,
                    "images_per_second": report.rate,
                }
            )
            since, count = torch.zeros((), device=world.device), 0
        report.step(epoch + 1, job.loader.images_per_step, recent)
    mean = world.mean(total / (job.loader.steps * settings.accumulate)).item()
    _require_finite(mean, learner.steps)
    return mean


def validate(job: Job) -> Validation:
    """Judge the network, and the moving average of its weights, on the validation images."""

    def judge(network: nn.Module) -> Score:
        job.world.share_buffers(network)
        return score(network, job.validating, job.world, job.settings.precision)

    average = job.learner.average
    result = Validation(judge(job.learner.model), judge(average) if average is not None else None)
    job.learner.improved = result.top1 > job.learner.best
    job.learner.best = max(job.learner.best, result.top1)
    return result


def save(run: RunFolder, job: Job, epoch: int, result: Validation) -> None:
    """Write what is needed to go on and, if they are the best so far, the weights."""
    if job.learner.improved:
        average = job.learner.average if result.average_is_best else None
        described = {
            **job.described,
            "epoch": epoch + 1,
            "weights": "last" if average is None else "moving average",
            "validation_top1": result.top1,
            "validation_images": result.plain.images,
        }
        network = job.learner.model if average is None else average
        checkpoint.save(run.best, network.state_dict(), described)
    run.save_last(job.learner.state(epoch + 1), job.facts)


@dataclass(frozen=True)
class Validation:
    """Scores on the validation images: of the network, and of the moving average of its weights."""

    plain: Score
    average: Score | None

    @property
    def average_is_best(self) -> bool:
        """The moving average is at least as good as the weights themselves."""
        return self.average is not None and self.average.first >= self.plain.first

    @property
    def top1(self) -> float:
        """Top-1 of the better of the two."""
        return max(score.top1 for score in (self.plain, self.average) if score is not None)

    def row(self) -> dict[str, float | None]:
        """For the log."""
        average = self.average
        return {
            "val_loss": self.plain.loss,
            "val_top1": self.plain.top1,
            "val_top5": self.plain.top5,
            "ema_loss": average.loss if average else None,
            "ema_top1": average.top1 if average else None,
            "ema_top5": average.top5 if average else None,
        }


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise ConfigError(
            f"the loss became {loss} before step {step}: lower the learning rate, clip gradients "
            "(--clip-grad 5), or use --precision fp32 or bf16"
        )


def _row(
    job: Job, epoch: int, loss: float, result: Validation, rate: float, seconds: float
) -> dict[str, float | None]:
    """An epoch for the log."""
    return {
        "epoch": epoch + 1,
        "step": job.learner.steps,
        "lr": job.learner.learning_rate,
        "train_loss": loss,
        **result.row(),
        "images_per_second": rate,
        "seconds": seconds,
    }


def _opening(job: Job, run: RunFolder, first: int) -> str:
    """What the user should know before the first step."""
    settings, facts, world = job.settings, job.facts, job.world
    parameters = sum(p.numel() for p in job.learner.model.parameters())
    rate = settings.learning_rate(facts["total batch"])
    start = f", going on after epoch {first}" if first else ""
    nothing = ", nothing to go on from" if settings.resume and not first else ""
    return "\n".join(
        [
            f"{settings.model}, {parameters:,} parameters, {len(facts['classes'])} classes",
            f"{facts['training images']:,} training images, "
            f"{facts['validation images']:,} for validation",
            f"{settings.epochs} epochs of {job.loader.steps} steps x {facts['total batch']} "
            f"images, peak learning rate {rate:.3g}, {world.size} process(es) on {world.device}",
            f"writing {run.path}{start}{nothing}",
        ]
    )


def _closing(job: Job, epoch: int, loss: float, result: Validation, seconds: float) -> str:
    """What the user should know after an epoch."""
    average = f"  average {result.average.top1:.2%}" if result.average else ""
    return (
        f"epoch {epoch + 1}/{job.settings.epochs}  loss {loss:.4f}  "
        f"validation top-1 {result.plain.top1:.2%}{average}  {clock(seconds)}"
    )


if __name__ == "__main__":
    main()
