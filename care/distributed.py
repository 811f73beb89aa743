"""One process or many: the little that a training program must know about its siblings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among its siblings.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: What this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """This is the process that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The element-wise mean of `values` over all processes."""
        return self.sum(values) / self.size

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main process's buffers, such as BatchNorm's running statistics.

        Each process gathers statistics of its own images; only the main process's are saved.
        """
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait for all processes to come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone without it.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.

    Raises:
        ConfigError: The device does not exist here.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda" and size > 1:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU, it has {torch.cuda.device_count()}: "
                "give torchrun as many processes as there are GPUs"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # What torch raises for a missing device depends on how it was built.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}") from error
    return device


class _SumOverProcesses(torch.autograd.Function):
    """Sum over all processes that gradients flow through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with statistics over all processes, on any device.

    torch's own SyncBatchNorm is faster but runs on accelerators only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (batch, channels, height, width)."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x.float()  # sums of squares overflow in half precision
        count = wide.new_tensor([x.numel() / x.shape[1]])
        local = torch.cat([wide.sum((0, 2, 3)), (wide * wide).sum((0, 2, 3)), count])
        total: Tensor = _SumOverProcesses.apply(local)
        sums, squares, number = total.split([x.shape[1], x.shape[1], 1])
        mean = sums / number
        variance = squares / number - mean * mean
        self._track(mean.detach(), variance.detach(), number.detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        normalized: Tensor = wide * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return normalized.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, number: Tensor) -> None:
        """Move the running statistics, with the unbiased variance as torch does."""
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (number / (number - 1)), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm compute its statistics over all processes; names of weights stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return]
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            synced = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced.to(next(child.parameters()).device))
        else:
            synchronize_batch_norm(child, device)
    return module
