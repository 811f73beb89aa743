"""PyTorch on the CPU: the baseline that the targets are held against. It builds nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.core.machine import cpu_as_seen, resolve_threads
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Runner
from pipeline.steps.facts.accuracy import FLOAT16_LIMIT, ModuleRange

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        granted = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        self.device = f"PyTorch {torch.__version__}, eager, float32, {granted}, {cpu_as_seen()}"

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


def range_of(module: nn.Module, images: Images) -> ModuleRange:
    """The largest value that any layer gives for some images.

    Args:
        module: A network in evaluation mode.
        images: Preprocessed images, (batch, channels, height, width).
    """
    import torch

    seen: list[tuple[str, float]] = []

    def look(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            seen.append((name, _magnitude(output)))

    layers = [
        (n or "the network", part) for n, part in module.named_modules() if not [*part.children()]
    ]
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, part in layers
    ]
    try:
        with torch.inference_mode():
            look("the logits", module(torch.from_numpy(images)))
    finally:
        for handle in handles:
            handle.remove()
    at, largest = max(seen, key=lambda entry: entry[1])
    first = next((name for name, value in seen if value > FLOAT16_LIMIT), "")
    return ModuleRange(largest, at, first, len(images))


def _magnitude(values: Tensor) -> float:
    """The largest magnitude; infinite where there is a NaN."""
    low, high = (float(end) for end in values.aminmax())
    largest = max(-low, high)
    return math.inf if math.isnan(low) or math.isnan(high) else largest
