"""8-bit weights and activations: the network with its convolutions' inputs quantized.

On the Neural Engine of the A17 and later a convolution of which input and weight are both 8 bits
wide computes in 8 bits. Core ML recognizes that by a pair of quantize and dequantize operations
before it. Scales come from our own calibration; coremltools' own needs macOS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.errors import BuildError
from pipeline.core.network import Images

if TYPE_CHECKING:
    from torch import nn

_BATCH = 16


def with_quantized_inputs(module: nn.Module, images: Images) -> tuple[nn.Module, dict[str, float]]:
    """Copy a network and quantize the inputs of its convolutions and linear layers.

    The first layer's input stays as it is: it is the image, with 8 bits already.

    Args:
        module: Takes preprocessed images, in evaluation mode.
        images: Calibration images, (images, channels, height, width).

    Returns:
        The copy, and the scale of every quantized input by the layer's name.

    Raises:
        BuildError: The network has no layer to quantize.
        DataError: An input holds NaN or infinity.
    """
    from calibration.observe import observe_callable
    from calibration.ranges import ACTIVATIONS_INT8, Method, quantization
    from calibration.table import make_table

    module = copy.deepcopy(module).eval()
    layers = _layers(module)
    with _recorded(layers) as seen:

        def run(batch: Images) -> dict[str, Any]:
            import torch

            seen.clear()
            with torch.inference_mode():
                module(torch.from_numpy(batch))
            return {name: np.concatenate(arrays) for name, arrays in seen.items()}

        # Which layer comes first is known after a run only: modules need not be in their order.
        first = next(iter(run(images[:1])), None)
        statistics = observe_callable(run, images, batch=_BATCH)
    statistics = {name: found for name, found in statistics.items() if name != first}
    if not statistics:
        raise BuildError("w8a8: the network has no convolution or linear layer after the first")
    table = make_table(statistics, Method.MSE, ACTIVATIONS_INT8, images=len(images))
    scales = {
        name: float(quantization(found, ACTIVATIONS_INT8).scale)
        for name, found in table.ranges.items()
    }
    for name, scale in scales.items():
        _insert(layers[name], scale)
    return module, scales


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Layers by name; those of a graph that was given say themselves that they are."""
    from torch import nn

    def is_layer(part: nn.Module) -> bool:
        return isinstance(part, nn.Conv2d | nn.Linear) or getattr(part, "is_product", False)

    return {name: part for name, part in module.named_modules() if is_layer(part)}


@contextmanager
def _recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Keep what enters every layer; a layer that is called twice gives both inputs."""
    seen: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].numpy().copy())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _insert(layer: nn.Module, scale: float) -> None:
    """Quantize and dequantize what enters a layer, symmetric, to int8."""
    import torch

    # Defines torch.ops.quantized_decomposed.
    import torch.ao.quantization.fx._decomposed

    operations: Any = torch.ops.quantized_decomposed
    forward = layer.forward
    arguments = (scale, 0, -128, 127, torch.int8)

    # Layers of a graph that was given are called with their weights, too.
    def quantized(x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        stored = operations.quantize_per_tensor(x, *arguments)
        entering = operations.dequantize_per_tensor(stored, *arguments)
        result: torch.Tensor = forward(entering, *more, **named)
        return result

    layer.forward = quantized
