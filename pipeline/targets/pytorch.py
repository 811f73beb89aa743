"""PyTorch on the CPU: the baseline that the targets are held against. It builds nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.machine import cpu_name, resolve_threads
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Runner

if TYPE_CHECKING:
    from torch import nn


class TorchRunner(Runner):
    """Runs a module in eager mode, in float32, on the CPU.

    Args:
        module: A network in evaluation mode.
        threads: CPU threads; None for as many as this process may use.

    Raises:
        InputError: More threads are asked for than this process may use.
    """

    def __init__(self, module: nn.Module, threads: int | None = None) -> None:
        import torch

        self.module = module
        self.threads = resolve_threads(threads)
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.device = (
            f"PyTorch {torch.__version__}, eager, float32, {self.threads} threads, {cpu_name()}"
        )

    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images."""
        import torch

        with torch.inference_mode():
            logits: Logits = self.module(torch.from_numpy(images)).numpy()
        return logits

    def close(self) -> None:
        """Give the threads back."""
        import torch

        torch.set_num_threads(self.before)
