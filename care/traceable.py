"""Functions of torch that exporters and runtimes do not take, by others that they do.

`torch.nn.functional.fold` adds up patches that overlap. TensorRT has no such operation and Core ML
only one for patches that do not overlap; both have the transposed convolution, which does the same
with kernels of a single 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Pair = int | tuple[int, int]


class Replaced(TorchFunctionMode):
    """Puts equal functions in the place of torch's while it is active.

    Args:
        others: What to call instead, by torch's function; it may call that one itself.
    """

    def __init__(self, others: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take the place of a call of torch."""
        return self._others.get(function, function)(*args, **(kwargs or {}))


def fold(
    patches: Tensor,
    output_size: Pair,
    kernel_size: Pair,
    dilation: Pair = 1,
    padding: Pair = 0,
    stride: Pair = 1,
) -> Tensor:
    """Add up patches, as `torch.nn.functional.fold` does, by a transposed convolution.

    Args:
        patches: (batch, channels x height x width of a patch, number of patches), or without batch.
        output_size: Height and width of the result.
        kernel_size: Of a patch.
        dilation: Distance of a patch's pixels.
        padding: What the patches go beyond the result, on each side.
        stride: Distance of patches.

    Returns:
        (batch, channels, height, width), or without batch.
    """
    if patches.ndim == 2:
        return fold(patches[None], output_size, kernel_size, dilation, padding, stride)[0]
    size, kernel, step = _pair(output_size), _pair(kernel_size), _pair(stride)
    around, distance = _pair(padding), _pair(dilation)
    reach = [d * (k - 1) + 1 for d, k in zip(distance, kernel, strict=True)]
    places = [(size[i] + 2 * around[i] - reach[i]) // step[i] + 1 for i in range(2)]
    missing = [size[i] + 2 * around[i] - reach[i] - (places[i] - 1) * step[i] for i in range(2)]
    pixels = kernel[0] * kernel[1]
    channels = patches.shape[1] // pixels
    # From numpy, so that a trace holds the numbers, not how they are made.
    ones = np.tile(
        np.eye(pixels, dtype=np.float32).reshape(pixels, 1, *kernel), (channels, 1, 1, 1)
    )
    return torch.nn.functional.conv_transpose2d(
        patches.reshape(-1, channels * pixels, *places),
        torch.from_numpy(ones),
        stride=step,
        padding=around,
        output_padding=missing,
        groups=channels,
        dilation=distance,
    )


def _pair(given: Pair) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else (given[0], given[1])


FOR_ALL_TARGETS: Mapping[Callable[..., Any], Callable[..., Any]] = {torch.nn.functional.fold: fold}
"""What no target takes as torch has it."""
