"""Everything that changes while a network is trained, in one place, to be saved and restored."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from care.distributed import World, synchronize_batch_norm
from care.finetune import parameter_groups, set_training
from care.losses import DistillationLoss
from care.precision import autocast
from care.runs import to_cpu
from care.settings import TrainSettings
from pipeline.core.errors import ConfigError
from pipeline.core.words import nearest

_OF_SETTINGS = ("weight_decay", "betas", "momentum")
"""Entries of an optimizer's groups that say what the settings do, and nothing that was learnt."""


class Learner:
    """A network with its optimizer, schedule, loss scaling and moving average.

    Args:
        settings: How to optimize.
        model: The network, on the CPU.
        loss: What it learns from.
        steps_per_epoch: Optimizer steps in an epoch.
        world: This process among its siblings.

    Attributes:
        model: The bare network, on the device: what is validated and saved.
        average: The moving average of its weights, or None.
        steps: Steps of the run so far, those that were skipped included.
        skipped: Steps that changed nothing, because their gradient was not finite.
        skipped_in_row: The latest of these, without a good one between.
        gradient_norm: Of the last step, before clipping.
        best: Best validation top-1 so far, 0 to 1.
        validated: Epochs at whose end the network was judged.

    Raises:
        ConfigError: The optimizer or the schedule is unknown.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        loss: DistillationLoss,
        steps_per_epoch: int,
        world: World,
    ) -> None:
        self.settings = settings
        self.device = world.device
        self.steps = 0
        self.steps_per_epoch = steps_per_epoch
        self.skipped = self.skipped_in_row = 0
        self.gradient_norm = 0.0
        self.best = -1.0
        self.validated = 0
        if world.device.type == "cuda":
            torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        if settings.sync_bn and world.size > 1:
            model = synchronize_batch_norm(model, world.device)
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.memory_format = memory_format
        self.loss = loss.to(world.device)
        total_batch = settings.batch_size * settings.accumulate * world.size
        self.optimizer = _optimizer(settings, self.model, settings.learning_rate(total_batch))
        self.schedule = _schedule(settings, self.optimizer, steps_per_epoch)
        if self.schedule is None:
            _scale_rates(self.optimizer)
        self.go_to(0)
        half = settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type) if half else None
        self._weights = list(self.model.parameters())  # looking for them takes time at each step
        self._is_frozen_somewhere = not all(weight.requires_grad for weight in self._weights)
        self._buffers = list(self.model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._ema = ModelEmaV3(self.model, settings.ema_decay) if settings.ema_decay else None
        self.forward = _wrapped(settings, self.model, world)

    @property
    def average(self) -> nn.Module | None:
        """The network with the moving average of the weights."""
        return self._ema.module if self._ema else None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step (the largest, with layer decay)."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def begin_training(self) -> None:
        """Set the network to training; what is frozen stays as it is deployed."""
        # To look at every module takes time at each step. What validated sets all or none.
        if self._is_frozen_somewhere or not self.model.training:
            set_training(self.model)

    def learn(self, images: Tensor, targets: Tensor, *, part: int = 0, step: bool) -> Tensor:
        """Gather the gradients of a part of a step, and take the step if it is the last part.

        A step whose gradient is not finite changes nothing; it is counted in `skipped`.

        Args:
            images: (batch, channels, height, width) on the device.
            targets: What the loss takes, on the device.
            part: Which part of the step.
            step: Update the weights now.

        Returns:
            The batch's mean loss, a scalar without gradient.
        """
        images = images.contiguous(memory_format=self.memory_format)
        if part == 0:
            _copy(self._buffers, self._before)
        # Between two steps there is no need for the processes to agree on gradients.
        agree = contextlib.nullcontext() if step else _no_sync(self.forward)
        with agree:
            with autocast(self.device, self.settings.precision):
                loss: Tensor = self.loss(images, self.forward(images), targets)
            share = loss / self.settings.accumulate
            (self.scaler.scale(share) if self.scaler else share).backward()
        if step:
            self._step()
        return loss.detach()

    def _step(self) -> None:
        """Update the weights, unless the gradient is not finite."""
        # Processes share their gradients: what is not finite in one is so in all of them.
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.gradient_norm = float(norm)
        if math.isfinite(self.gradient_norm):
            self._clip(norm)
            self._update()
            self.skipped_in_row = 0
        else:
            _copy(self._before, self._buffers)  # statistics of what was not finite
            self._skip()
        self.optimizer.zero_grad()
        self.go_to(self.steps + 1)

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self._ema is not None:
            self._ema.update(self.model, step=self.steps + 1)

    def _skip(self) -> None:
        """Count a step that is not taken; with loss scaling the first ones only lower the scale."""
        if self.scaler is not None:
            lowers = self.scaler.get_scale() > 1
            self.scaler.update()
            if lowers:
                return
        self.skipped += 1
        self.skipped_in_row += 1

    def _clip(self, norm: Tensor) -> None:
        settings = self.settings
        if settings.clip_grad is None:
            return
        if settings.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.clip_grad, norm)
            return
        parameters = model_parameters(self.model, exclude_head=settings.clip_mode == "agc")
        dispatch_clip_grad(parameters, settings.clip_grad, mode=settings.clip_mode)

    def go_to(self, steps: int) -> None:
        """Stand after so many steps; the learning rate of the next is a function of that alone."""
        self.steps = steps
        if self.schedule is None:
            return
        if self.settings.schedule_per == "epoch":
            self.schedule.step(self.steps // self.steps_per_epoch)
        else:
            self.schedule.step_update(self.steps)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on after the last step, on the CPU."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "best": self.best,
            "validated": self.validated,
        }
        if self._ema is not None:
            state["model_ema"] = self._ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return to_cpu(state)  # type: ignore[no-any-return]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        self._restore_optimizer(state["optimizer"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["model_ema"])
        if self.scaler is not None and "scaler" in state:  # --amend may have brought it
            self.scaler.load_state_dict(state["scaler"])
        self.best = float(state["best"])
        self.skipped, self.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        self.validated = int(state["validated"])
        self.go_to(int(state["steps"]))

    def _restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Take over moments and counters; not what the settings say, which may be amended."""
        stated = (*_OF_SETTINGS, "lr") if self.schedule is None else _OF_SETTINGS
        groups = [
            {**saved, **{key: own[key] for key in stated if key in own}}
            for saved, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})


def _optimizer(settings: TrainSettings, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    known = list_optimizers()
    if settings.opt.lower() not in known:
        raise ConfigError(f"unknown optimizer {settings.opt!r}{nearest(settings.opt, known)}")
    optional = {"betas": settings.betas} if settings.betas else {}
    groups = None  # timm's own
    if settings.body_lr_factor != 1:
        groups = partial(
            parameter_groups,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            body_lr_factor=settings.body_lr_factor,
        )
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay,
        param_group_fn=groups,
        **optional,
    )
    return optimizer


def _scale_rates(optimizer: torch.optim.Optimizer) -> None:
    """Give each group its share of the learning rate, as timm's schedules do at each step."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)


def _schedule(
    settings: TrainSettings, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Timm's schedule."""
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            cooldown_epochs=settings.cooldown_epochs,
            step_on_epochs=settings.schedule_per == "epoch",
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"schedule {settings.sched!r} cannot be used: {error}") from error
    return schedule


def _wrapped(settings: TrainSettings, model: nn.Module, world: World) -> nn.Module:
    """The network as it is called in training: compiled, shared among processes."""
    if world.size > 1:
        ids = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)
    return torch.compile(model) if settings.compile else model  # type: ignore[return-value]


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for value, place in zip(source, target, strict=True):
        place.copy_(value)


def _no_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    bare = getattr(module, "_orig_mod", module)
    if isinstance(bare, DistributedDataParallel):
        return bare.no_sync()
    return contextlib.nullcontext()
