"""One process or many: the little that a training program must know about its siblings."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeline.core import signals
from pipeline.core.errors import ConfigError, PipelineError, UnavailableError
from pipeline.core.words import shown

Result = TypeVar("Result")

_LOST = re.compile(r"\b(gloo|nccl|connection|timed out|timeout|peer|\w*store)\b", re.IGNORECASE)
"""Words by which the errors of a lost process are known."""


@dataclass(frozen=True)
class World:
    """This process among its siblings.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: What this process computes on.
        local_rank: Number of this process on its machine, from 0.
        control: Group for what is no arithmetic, on the CPU; None for a process alone.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    control: dist.ProcessGroup | None = None

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

    def average_statistics(self, module: nn.Module) -> None:
        """Give every process the mean of all processes' running statistics.

        Between two steps they differ only by what the last step moved them, since
        DistributedDataParallel hands out the main process's before each step.
        """
        if self.size == 1:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.size)

    def wait(self) -> None:
        """Wait for all processes to come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def ask_all(self, values: Tensor) -> tuple[dist.Work, Tensor]:
        """Begin to find the largest of each of `values` (on the CPU) over all processes."""
        answer = values.clone()
        work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.control, async_op=True)
        return work, answer

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What the main process gets from `function`, in all processes.

        Raises:
            PipelineError: In the main process, what it raised there.
            SystemExit: In the others, with its exit code: one process tells the user.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        failed: PipelineError | None = None
        if self.is_main:
            try:
                answer[0] = function()
            except PipelineError as error:
                failed = error
                answer[1] = error.exit_code
        dist.broadcast_object_list(answer, 0, group=self.control)
        if failed is not None:
            raise failed
        if answer[1] is not None:
            raise SystemExit(answer[1])
        return cast(Result, answer[0])

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes were told, and found, the same.

        Raises:
            ConfigError: One was not; names it, its machine and what differs.
        """
        everywhere = self.gather((socket.gethostname(), dict(facts)))
        _, main = everywhere[0]
        for rank, (host, found) in enumerate(everywhere):
            differing = [name for name in main if main[name] != found.get(name)]
            if differing:
                raise ConfigError(
                    f"process {rank} on {host} has another {differing[0]} than process 0: "
                    f"{found.get(differing[0])!r}, not {main[differing[0]]!r}; all processes need "
                    "the same settings and the same data"
                )

    @contextlib.contextmanager
    def one_on_each_machine_first(self) -> Iterator[None]:
        """The first process of a machine goes alone: it fetches what the others find there then."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


@contextlib.contextmanager
def world(device: str, timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone without it.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best there is.
        timeout_minutes: How long processes wait for each other.

    Raises:
        ConfigError: The device does not exist here.
        UnavailableError: Another process does not come, or went away.
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
    if size == 1:
        yield World(rank, size, chosen, local)
        return
    signals.die_with_parent()  # torchrun may be killed; nobody would end its processes then
    timeout = timedelta(minutes=timeout_minutes)
    with _contact(rank, size, timeout_minutes):
        first: Store = next(rendezvous("env://", rank, size, timeout=timeout))[0]
        store = PrefixStore(_meet(first, rank, size, timeout), first)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            control = dist.new_group(backend="gloo", timeout=timeout)
            yield World(rank, size, chosen, local, cast(dist.ProcessGroup, control))
        finally:
            dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started these processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _meet(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that is known to the processes that are alive now, and to no earlier ones.

    torchrun keeps its store when it starts processes anew. What those before them left there, such
    as addresses, is found by the new ones, who then wait for each other in vain. So the
    main process answers each of the others, by a number of its own, with the name under which
    everything else is kept.

    Raises:
        RuntimeError: One did not come in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, size)) if rank == 0 else {rank}
    if rank:
        store.set(f"hello/{rank}", own)
    while missing:
        for other in sorted(missing):
            hello, answer = _read(store, f"hello/{other}"), _read(store, f"answer/{other}")
            if rank == 0 and hello:
                store.set(f"answer/{other}", f"{hello} {own}")
                if _read(store, f"thanks/{other}") == own:
                    missing.discard(other)
            elif rank and answer.startswith(f"{own} "):
                own = answer.split()[1]
                store.set(f"thanks/{rank}", own)
                missing.clear()
        if time.monotonic() > end:
            raise RuntimeError(f"timeout: process {min(missing)} did not come")
        time.sleep(0.02)
    return own


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


@contextlib.contextmanager
def _contact(rank: int, size: int, minutes: float) -> Iterator[None]:
    """Say in one line that another process is gone, or does not come."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's errors have no kind of their own
        reason = " ".join(str(error).split())
        if not _LOST.search(reason):
            raise
        raise UnavailableError(
            f"process {rank} of {size} on {socket.gethostname()} lost another process, or waited "
            f"{minutes:g} minutes for it ({shown(reason, 150)}): see what that one says, then go "
            "on with --resume"
        ) from error


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
