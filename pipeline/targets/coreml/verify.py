"""Every package is held against the module that it was made from before it counts as built."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.core import figures
from pipeline.core.errors import BuildError
from pipeline.core.network import Images, Logits, Network
from pipeline.core.preprocess import Pictures
from pipeline.targets.coreml.network import preprocess_of
from pipeline.targets.coreml.runner import answer
from pipeline.targets.pytorch import range_of

if TYPE_CHECKING:
    from torch import nn

    from pipeline.targets.coreml.build import Limits


REMEDY = (
    "set targets.coreml.repair: true, which keeps the fewest modules in float32, or build "
    "precision mixed or fp32"
)
"""For networks that float16 breaks."""

Mode = Literal["float32", "half"]


MOST_FOR_WEIGHTS = 0.2
"""Highest limit that weights in float16 may explain. Swapped channels, a wrong mean and the like
move logits by 0.3 of their size and more."""

CONTRAST = 57.0
"""Standard deviation of the pixels of ImageNet's photographs, of 255."""


def probes(network: Network, count: int = 4) -> Pictures:
    """Pictures with structure at every scale, always the same, with the contrast of photographs.

    Where contrasts are much stronger than any that BatchNorms were made for, small errors grow: a
    LeViT with settled random weights magnifies them 118 times at a deviation of 75, and 12 times on
    the noise that it was settled with.

    Raises:
        ConfigError: See `preprocess_of`.
    """
    channels, height, width = network.input_shape
    rng = np.random.default_rng(0)
    values = np.zeros((count, height, width, channels))
    scales = [4**power for power in range(32) if 4**power <= min(height, width)]
    for cells in scales:
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        coarse = rng.normal(size=(count, cells, cells, channels))
        values += coarse[:, rows][:, :, columns]
    values *= CONTRAST / np.sqrt(len(scales))
    pixels = np.clip(128 + values, 0, 255).astype(np.uint8)
    return Pictures(pixels, preprocess_of(network))


def verify(package: Path, module: nn.Module, network: Network, limits: Limits) -> dict[str, Any]:
    """Compare a package's logits with its module's on a few pictures.

    Args:
        package: A classifier of ours.
        module: Takes preprocessed images, gives logits.
        network: Shape and preprocessing.
        limits: What is an error.

    Returns:
        The errors, for the artifact's facts.

    Raises:
        BuildError: The package computes something else than the module.
    """
    from pipeline.emulate.mil.executor import MilExecutor

    pictures = probes(network)
    expected = _logits(module, pictures.images)
    facts: dict[str, Any] = {"images": len(pictures)}
    modes: tuple[tuple[Mode, str, float | None], ...] = (
        ("float32", "exact", limits.exact),
        ("half", "rounded", limits.rounded),
    )
    for mode, name, limit in modes:
        executor = MilExecutor(package, precision=mode)
        found = figures.compare(answer(executor, pictures.pixels, package), expected)
        if not found.finite:
            reason = (
                range_of(module.eval(), pictures.images).words
                or "a value leaves the range of float16"
            )
            raise BuildError(
                f"{network.name}: the Core ML package gives NaN or infinity ({name} arithmetic): "
                f"{reason}; {REMEDY}"
            )
        if limit is not None and limits.half_weights and found.relative_error > limit:
            own = _error_of_half_weights(module, pictures.images, expected)
            facts["float16_weights_relative_error"] = own
            limit = max(limit, min(2 * own, MOST_FOR_WEIGHTS))
        if limit is not None and found.relative_error > limit:
            raise BuildError(
                f"{network.name}: the logits of the Core ML package differ from PyTorch's by "
                f"{found.relative_error:.2g} of their size ({name} arithmetic, limit {limit:g}); "
                f"{_where(package, module, network, pictures, mode)}"
                f"{f'; {REMEDY}' if mode == 'half' else ''}"
            )
        facts[f"{name}_relative_error"] = found.relative_error
        facts[f"{name}_flips"] = found.flips
    return facts


def _error_of_half_weights(module: nn.Module, images: Images, expected: Logits) -> float:
    """How far a module's own logits move when nothing but its weights is rounded to float16."""
    rounded = copy.deepcopy(module)
    for tensor in [*rounded.parameters(), *rounded.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().to(tensor.dtype)
    return figures.compare(_logits(rounded, images), expected).relative_error


def _where(
    package: Path, module: nn.Module, network: Network, pictures: Pictures, mode: Mode
) -> str:
    """Where the error begins, for the message of a build that failed and left no package."""
    from pipeline.emulate.layers import jump
    from pipeline.targets.coreml.diff import diff_package

    first = jump(diff_package(package, network, module, pictures[:1], mode))
    if first is None:
        return "it grows slowly over all layers"
    return f"it begins at {first.module or 'the network itself'} ({first.operation} {first.tensor})"


def _logits(module: nn.Module, images: Images) -> Logits:
    import torch

    with torch.inference_mode():
        logits: Logits = module.eval()(torch.from_numpy(images)).numpy()
    return logits
