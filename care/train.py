r"""Train a network: `python -m care.train --config configs/train_care_s0.yaml`.

    python -m care.train --config configs/train_care_tiny.yaml
    python -m care.train --config configs/train_care_tiny.yaml --resume
    torchrun --nproc_per_node 12 -m care.train --config configs/train_care_s0.yaml

Settings are in care.settings, the parts of a run in care.job, what it writes in care.runs, and how
it scales in docs/training.md. A run that was killed goes on with --resume after the last step that
was saved, exactly as if nothing had happened.
"""

from __future__ import annotations

from pipeline.core import signals

if __name__ == "__main__":
    signals.leave_while_loading()

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from care import checkpoint, distributed, sampling
from care.boards import boards
from care.distributed import World
from care.evaluate import Score, score
from care.job import Job, prepare
from care.loaders import Batch
from care.meters import Meters
from care.progress import Report, clock
from care.runs import Logbook, RunFolder
from care.settings import SettingsCommand, TrainSettings, given, options, read
from care.stopping import Wishes
from care.summary import write_summary
from pipeline.core.errors import CheckpointError, ConfigError, LockedError
from pipeline.core.signals import Ended


@click.command(cls=SettingsCommand)
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with settings; flags win over it."
)
@options
def main(config: Path | None, **flags: Any) -> None:
    """Train a network.

    Every setting is a flag here and a key in the YAML file (with underscores). The published recipe
    of the CARE networks is configs/train_care_s0.yaml: 12 GPUs x 128 images, 310 epochs.
    """
    settings = read(config, given(flags))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if distributed.restarts():
        # torchrun starts all processes anew when one is lost: that goes on, whatever was asked for.
        settings = settings.model_copy(update={"resume": True, "overwrite": False})
    with distributed.world(settings.device, settings.timeout_minutes) as world:
        train(settings, world)


def train(settings: TrainSettings, world: World) -> None:
    """Start a training run, or go on with one.

    Args:
        settings: What to do.
        world: This process among its siblings.

    Raises:
        PipelineError: Settings, data or files cannot be used; nothing was overwritten.
    """
    run = world.from_main(lambda: RunFolder(settings))  # one process looks, all do the same
    job = prepare(run.settings, world)
    with contextlib.ExitStack() as stack:
        saved = world.from_main(lambda: _begin(run, job, stack))
        Course(run, job, saved).go()


class Course:
    """The course of a run, from where it was left to its end.

    Args:
        run: Its folder.
        job: Its parts.
        saved: The checkpoint to go on from, or None.
    """

    def __init__(self, run: RunFolder, job: Job, saved: dict[str, Any] | None) -> None:
        self.run, self.job = run, job
        self.settings, self.world, self.learner = job.settings, job.world, job.learner
        self.meters = Meters()
        if saved is not None:
            self.learner.restore(saved)
            self.meters = Meters.from_state(saved["meters"])
        self.first = self.learner.steps
        self.end = job.loader.steps * self.settings.all_epochs
        self.wishes = Wishes(self.world, 60 * self.settings.save_minutes)

    def go(self) -> None:
        """Train to the end, and export what came out.

        Raises:
            Ended: By a signal; the run was saved.
        """
        settings, world, learner = self.settings, self.world, self.learner
        shown = boards(settings, self.run.path, self.first) if world.is_main else []
        with (
            Report(self.end, self.first, world.is_main, settings.progress) as self.report,
            Logbook(self.run.path, self.first, learner.validated, shown, world.is_main) as self.log,
            self.wishes.heard(),
        ):
            self.report.say(_opening(self.job, self.run, self.first))
            if self.first and self._is_end_of_epoch() and not self._is_validated():
                self._close_epoch()  # it was interrupted while it was judged
            self._steps()
            self.wishes.finish()
            best = f"{learner.best:.2%}: {self.run.best}"
            self.report.say(f"best top-1 on the validation images {best}")
        if world.is_main and settings.export:
            self.run.export(settings.export)

    def _steps(self) -> None:
        batches = self.job.loader.batches(self.first, self.end)
        while self.learner.steps < self.end:
            self._step(batches)
            save, signum = self.wishes.agreed()
            closes = self._is_end_of_epoch()
            if closes:
                # Before it is saved: one process's statistics would be all that a checkpoint keeps.
                self.world.average_statistics(self.learner.model)
            if save or closes:
                self._save()
            if signum:
                raise KeyboardInterrupt if signum == signal.SIGINT else Ended(signum)
            if closes:
                self._close_epoch()

    def _step(self, batches: Iterator[Batch]) -> None:
        """Take a step over the next batches."""
        settings, learner, meters = self.settings, self.learner, self.meters
        step, epoch = learner.steps, self._epoch()
        mixing = not 0 < settings.mix_off_epoch <= epoch
        started = time.perf_counter()
        learner.begin_training()
        losses = []
        for part in range(settings.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            meters.waited(time.perf_counter() - asked)
            self._report_unreadable(batch)
            sampling.seed_step(settings.seed, step, part, self.world.rank)
            if self.job.cached is not None:
                self.job.cached.expect(step, part, batch.pixels)
            images, targets = self.job.finish(batch, mixing=mixing)
            last = part == settings.accumulate - 1
            losses.append(learner.learn(images, targets, part=part, step=last))
        loss = torch.stack(losses).mean()
        if learner.skipped_in_row:
            self._report_skipped(epoch, step, loss)
        else:
            meters.add(loss.item())
        meters.took(time.perf_counter() - started)
        self._show(epoch)

    def _show(self, epoch: int) -> None:
        """Tell of a step: of each to the bar, of some to the logs."""
        settings, learner, meters = self.settings, self.learner, self.meters
        recent = None
        if learner.steps % settings.log_every == 0:
            recent = self._mean(meters.recent)
            self.log.step(
                {
                    "epoch": epoch + 1,
                    "step": learner.steps,
                    "lr": learner.learning_rate,
                    "loss": recent,
                    "gradient_norm": _finite(learner.gradient_norm),
                    "skipped": learner.skipped,
                    **meters.figures(self.job.loader.images_per_step, self.world.device),
                }
            )
            meters.begin()
        self.report.step(epoch + 1, self.job.loader.images_per_step, recent)

    def _close_epoch(self) -> None:
        """Judge the network after an epoch, log it, and keep what is best."""
        learner, epoch = self.learner, self._epoch(self.learner.steps - 1)
        with self.wishes.interruptible():  # the last step of the epoch was saved
            mean = self._mean(self.meters.mean)
            result = validate(self.job)
        learner.validated = epoch + 1
        improved, learner.best = result.top1 > learner.best, max(learner.best, result.top1)
        self.log.epoch(_row(self.job, epoch, mean, result, self.meters))
        self.report.say(_closing(self.job, epoch, mean, result, self.meters.seconds))
        self.meters = Meters()
        if self.world.is_main and improved:
            self._keep_best(epoch, result)
        self._save()
        if self.world.is_main:
            write_summary(self.run.path)

    def _keep_best(self, epoch: int, result: Judgement) -> None:
        """Write the weights, which are the best so far."""
        average = self.learner.average if result.average_is_best else None
        described = {
            **self.job.described,
            "epoch": epoch + 1,
            "weights": "last" if average is None else "moving average",
            "validation_top1": result.top1,
            "validation_images": result.plain.images,
        }
        network = self.learner.model if average is None else average
        with self._unsaved():
            checkpoint.save(self.run.best, network.state_dict(), described)

    def _save(self) -> None:
        """Write what is needed to go on after this step."""
        if self.world.is_main:
            state = {**self.learner.state(), "meters": self.meters.state()}
            with self._unsaved():
                self.run.save_last(state, self.job.facts)
        self.wishes.saved()

    @contextlib.contextmanager
    def _unsaved(self) -> Iterator[None]:
        """Go on where a file cannot be written, if that was chosen."""
        try:
            yield
        except CheckpointError as error:
            if self.settings.unsaved == "stop":
                raise
            self.report.say(f"warning: {error}; training goes on")

    def _report_unreadable(self, batch: Batch) -> None:
        for problem in batch.unreadable:
            self.meters.unreadable += 1
            click.echo(f"warning: {problem}; another image took its place", err=True)

    def _report_skipped(self, epoch: int, step: int, loss: torch.Tensor) -> None:
        """Tell of a step that was not taken, and stop after too many in a row.

        Raises:
            ConfigError: There were as many as `skip_limit`.
        """
        losses = self.world.gather(loss.item())  # all processes came here: they share gradients
        ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)] or [0]
        names = self.job.loader.names(step, ranks[0])
        where = f"step {step + 1}, process {ranks[0]}"
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        self.log.skipped({"epoch": epoch + 1, "step": step + 1, "losses": [str(v) for v in losses],
                          "images": names})  # fmt: skip
        learner = self.learner
        what = f"the loss became {losses[ranks[0]]}, the gradient's norm {learner.gradient_norm}"
        if learner.skipped_in_row >= self.settings.skip_limit:
            raise ConfigError(
                f"{what} in {learner.skipped_in_row} steps in a row, the last is {where} ({some}): "
                "lower the learning rate or clip gradients; a run that goes on takes --resume "
                "--amend lr=… , clip_grad=5 or precision=bf16"
            )
        self.report.say(f"warning: {what} at {where} ({some}): the step is left out")

    def _mean(self, value: float) -> float | None:
        """The mean over all processes of a figure; None where there is none."""
        return _finite(self.world.mean(torch.tensor(value, device=self.world.device)).item())

    def _epoch(self, step: int | None = None) -> int:
        """The epoch of a step, from 0; by default of the next one."""
        return (self.learner.steps if step is None else step) // self.job.loader.steps

    def _is_end_of_epoch(self) -> bool:
        return self.learner.steps % self.job.loader.steps == 0

    def _is_validated(self) -> bool:
        return self.learner.validated == self._epoch()


@dataclass(frozen=True)
class Judgement:
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


def validate(job: Job) -> Judgement:
    """Judge the network, and the moving average of its weights, on the validation images."""

    def judge(network: nn.Module) -> Score:
        job.world.share_buffers(network)
        return score(network, job.validating, job.world, job.settings.precision)

    average = job.learner.average
    return Judgement(judge(job.learner.model), judge(average) if average is not None else None)


def _begin(run: RunFolder, job: Job, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """In the main process alone: lock the folder, read what there is, and prepare it."""
    stack.enter_context(run.locked())
    if RunFolder(run.given).resumes != run.resumes:
        raise LockedError(f"another process trained in {run.path} just now: start again")
    saved = run.read_last(job.facts, lambda line: click.echo(line, err=True))
    run.prepare()
    run.record(int(saved["steps"]) if saved else 0)
    return saved


def _finite(value: float) -> float | None:
    """A figure as JSON can hold it."""
    return value if math.isfinite(value) else None


def _row(
    job: Job, epoch: int, loss: float | None, result: Judgement, meters: Meters
) -> dict[str, float | None]:
    """An epoch for the log."""
    return {
        "epoch": epoch + 1,
        "step": job.learner.steps,
        "lr": job.learner.learning_rate,
        "train_loss": loss,
        **result.row(),
        "images_per_second": job.loader.images_per_epoch / max(meters.seconds, 1e-9),
        "seconds": meters.seconds,
        "skipped": job.learner.skipped,
        "unreadable": meters.unreadable,
    }


def _opening(job: Job, run: RunFolder, first: int) -> str:
    """What the user should know before the first step."""
    settings, facts, world = job.settings, job.facts, job.world
    parameters = sum(p.numel() for p in job.learner.model.parameters())
    rate = settings.learning_rate(facts["total batch"])
    whole, steps = divmod(first, job.loader.steps)
    rest = f" and {steps} steps" if steps else ""
    start = f", going on after epoch {whole}{rest}" if first else ""
    nothing = ", nothing to go on from" if settings.resume and not first else ""
    classes = len(facts["classes"])
    origin = [job.start.words(classes)] if job.start is not None else []
    if settings.freeze:
        learning = sum(p.numel() for p in job.learner.model.parameters() if p.requires_grad)
        origin.append(f"the body is frozen: {learning:,} parameters learn")
    return "\n".join(
        [
            f"{settings.model}, {parameters:,} parameters, {classes} classes",
            *origin,
            f"{facts['training images']:,} training images, "
            f"{facts['validation images']:,} for validation",
            f"{settings.all_epochs} epochs of {job.loader.steps} steps x {facts['total batch']} "
            f"images, peak learning rate {rate:.3g}, {world.size} process(es) on {world.device}",
            f"writing {run.path}{start}{nothing}",
        ]
    )


def _closing(job: Job, epoch: int, loss: float | None, result: Judgement, seconds: float) -> str:
    """What the user should know after an epoch."""
    average = f"  average {result.average.top1:.2%}" if result.average else ""
    return (
        f"epoch {epoch + 1}/{job.settings.all_epochs}  loss {loss or math.nan:.4f}  "
        f"validation top-1 {result.plain.top1:.2%}{average}  {clock(seconds)}"
    )


if __name__ == "__main__":
    main()
