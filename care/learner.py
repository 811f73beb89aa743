"""Everything that changes while a network is trained, in one place, to be saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from care.distributed import World, synchronize_batch_norm
from care.evaluate import autocast
from care.losses import DistillationLoss
from care.runs import to_cpu
from care.settings import TrainSettings
from pipeline.core.errors import ConfigError
from pipeline.core.words import nearest


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
        steps: Optimizer steps taken.
        best: Best validation top-1 so far, 0 to 1.
        improved: The last validation was the best so far.

    Raises:
        SettingsError: The optimizer or the schedule is unknown.
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
        self.best = -1.0
        self.improved = False
        if settings.sync_bn and world.size > 1:
            model = synchronize_batch_norm(model, world.device)
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.memory_format = memory_format
        self.loss = loss.to(world.device)
        total_batch = settings.batch_size * settings.accumulate * world.size
        self.optimizer = _optimizer(settings, self.model, settings.learning_rate(total_batch))
        self.schedule = _schedule(settings, self.optimizer, steps_per_epoch)
        self.scaler = NativeScaler(world.device.type) if settings.precision == "fp16" else None
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

    def learn(self, images: Tensor, targets: Tensor, *, step: bool) -> Tensor:
        """Gather the gradients of a batch, and take a step if it is the last of its group.

        Args:
            images: (batch, channels, height, width) on the device.
            targets: What the loss takes, on the device.
            step: Update the weights now.

        Returns:
            The batch's mean loss, a scalar without gradient.
        """
        images = images.contiguous(memory_format=self.memory_format)
        # Between two steps there is no need for the processes to agree on gradients.
        agree = contextlib.nullcontext() if step else _no_sync(self.forward)
        with agree:
            with autocast(self.device, self.settings.precision):
                loss: Tensor = self.loss(images, self.forward(images), targets)
            self._descend(loss / self.settings.accumulate, step)
        if step:
            self.optimizer.zero_grad()
            self.steps += 1
            if self._ema is not None:
                self._ema.update(self.model, step=self.steps)
            if self.schedule is not None:
                self.schedule.step_update(self.steps)
        return loss.detach()

    def state(self, epochs: int) -> dict[str, Any]:
        """Everything needed to go on after `epochs` whole epochs, on the CPU."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": epochs,
            "steps": self.steps,
            "best": self.best,
        }
        if self._ema is not None:
            state["model_ema"] = self._ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return to_cpu(state)  # type: ignore[no-any-return]

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take over what `state` returned.

        Returns:
            Number of whole epochs done.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["model_ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps, self.best = int(state["steps"]), float(state["best"])
        if self.schedule is not None:
            self.schedule.step_update(self.steps)  # a function of the steps alone
        return int(state["epochs"])

    def _descend(self, loss: Tensor, step: bool) -> None:
        """Backward pass; with `step`, clip the gradients and update the weights."""
        settings = self.settings
        parameters = model_parameters(self.model, exclude_head=settings.clip_mode == "agc")
        if self.scaler is not None:
            self.scaler(
                loss,
                self.optimizer,
                clip_grad=settings.clip_grad,
                clip_mode=settings.clip_mode,
                parameters=parameters,
                need_update=step,
            )
            return
        loss.backward()
        if step:
            if settings.clip_grad is not None:
                dispatch_clip_grad(parameters, settings.clip_grad, mode=settings.clip_mode)
            self.optimizer.step()


def _optimizer(settings: TrainSettings, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    known = list_optimizers()
    if settings.opt.lower() not in known:
        raise ConfigError(f"unknown optimizer {settings.opt!r}{nearest(settings.opt, known)}")
    optional = {"betas": settings.betas} if settings.betas else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=settings.opt,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        layer_decay=settings.layer_decay,
        **optional,
    )
    return optimizer


def _schedule(
    settings: TrainSettings, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """Timm's schedule, moved on after every step."""
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"schedule {settings.sched!r} cannot be used: {error}") from error
    if schedule is not None:
        schedule.step_update(0)
    return schedule


def _wrapped(settings: TrainSettings, model: nn.Module, world: World) -> nn.Module:
    """The network as it is called in training: compiled, shared among processes."""
    if world.size > 1:
        ids = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)
    return torch.compile(model) if settings.compile else model  # type: ignore[return-value]


def _no_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    bare = getattr(module, "_orig_mod", module)
    if isinstance(bare, DistributedDataParallel):
        return bare.no_sync()
    return contextlib.nullcontext()
