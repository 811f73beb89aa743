"""The exported torch program that a Core AI asset is converted from.

It takes preprocessed images of float32 and gives logits of float32, whatever it computes in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BuildError, ConfigError
from pipeline.core.network import Network
from pipeline.targets.coreai.norms import fold

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

IMAGE, LOGITS = "image", "logits"
"""Names of an asset's input and output."""

_NO_LOWERING = ("elu", "celu", "selu")
"""ATen operations for which coreai-torch 0.4.3 has no lowering, and torch a decomposition."""


def export(module: nn.Module, network: Network, *, half: bool) -> ExportedProgram:
    """Export a network in operations that coreai-torch converts.

    Args:
        module: Takes preprocessed images, (batch, channels, height, width), gives logits. Stays as
            it is.
        network: Shape and labels.
        half: Store weights and compute in float16.

    Raises:
        BuildError: torch cannot export the network.
        ConfigError: The labels do not fit the logits.
    """
    import torch

    module = copy.deepcopy(module).eval().requires_grad_(False)
    example = torch.zeros(1, *network.input_shape)
    _without_2d_products(module, example)

    class Classifier(torch.nn.Module):
        """Float32 in and out."""

        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(image.half() if half else image)
            return logits.float()

    try:
        if half:
            fold(module, example)
            module.half()
        exported = torch.export.export(Classifier().eval(), (example,))
        program: ExportedProgram = exported.run_decompositions(_decompositions())
    # torch.export raises whatever the traced code or its compiler does.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(f"torch.export cannot export {network.name}: {reason}") from error
    _check_logits(program, network)
    return program


def _decompositions() -> dict[Any, Any]:
    import torch
    from coreai_torch import get_decomp_table
    from torch._decomp import get_decompositions

    known = [getattr(torch.ops.aten, name) for name in _NO_LOWERING]
    return {**get_decomp_table(), **get_decompositions(known)}


def _check_logits(program: ExportedProgram, network: Network) -> None:
    (results,) = next(node for node in program.graph.nodes if node.op == "output").args
    shape = tuple(results[0].meta["val"].shape)
    if shape != (1, len(network.labels)):
        raise ConfigError(
            f"{network.name} has {len(network.labels)} labels, the network gives logits of shape "
            f"{shape}: give one label a class"
        )


def _without_2d_products(module: nn.Module, example: Any) -> None:
    """Write linear layers on (batch, features) as 1x1 convolutions.

    A product of matrices with two axes before a hardswish gives wrong numbers on the Neural Engine
    of iOS 27, one with four does not: https://github.com/apple/coreai-torch/issues/51.
    """
    import torch

    with _two_axes_alone(module) as layers:
        with torch.inference_mode():
            module(example)
        chosen = [layer for layer, ranks in layers.items() if ranks == {2}]
    for layer in chosen:
        layer.weight = torch.nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)
        layer.forward = _convolution(layer)


@contextmanager
def _two_axes_alone(module: nn.Module) -> Iterator[dict[Any, set[int]]]:
    """Linear layers, and the ranks of what enters each."""
    from torch import nn

    # Layers that share a weight stay as they are.
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    owners = [id(part) for other in module.modules() for part in other._parameters.values()]
    ranks: dict[Any, set[int]] = {
        layer: set() for layer in layers if owners.count(id(layer.weight)) == 1
    }

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        ranks[layer].add(inputs[0].ndim)

    handles = [layer.register_forward_pre_hook(note) for layer in ranks]
    try:
        yield ranks
    finally:
        for handle in handles:
            handle.remove()


def _convolution(layer: nn.Linear) -> Any:
    import torch.nn.functional as F

    def forward(x: Any) -> Any:
        return F.conv2d(x[:, :, None, None], layer.weight, layer.bias).flatten(1)

    return forward
