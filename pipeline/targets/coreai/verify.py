"""Every asset is held against the module that it was made from before it counts as built."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import figures
from pipeline.core.errors import BuildError
from pipeline.core.network import Images, Logits, Network
from pipeline.targets.coreai.package import check
from pipeline.targets.coreai.runner import APPLE, Bound
from pipeline.targets.coreai.runtime import Runtime

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Limits:
    """Largest relative errors of the logits, Euclidean.

    Attributes:
        module: Of the asset to the module, in the executor's arithmetic; None where the weights
            were changed.
        half_weights: The weights are in float16. Where these alone move the module's logits
            further, as in a network whose large values cancel, twice that is the limit.
        runtime: Of the executor to Apple's runtime.
    """

    module: float | None
    half_weights: bool
    runtime: Bound


def probes(network: Network, count: int = 4) -> Images:
    """Preprocessed pictures with structure at several scales, always the same.

    Returns:
        float32 (count, channels, height, width).
    """
    channels, height, width = network.input_shape
    rng = np.random.default_rng(0)
    values = np.zeros((count, channels, height, width))
    cells = 1
    while cells <= min(height, width):
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        coarse = rng.normal(size=(count, channels, cells, cells))
        values += coarse[:, :, rows][..., columns]
        cells *= 4
    return np.ascontiguousarray(values / 2, np.float32)


def verify(package: Path, module: nn.Module, network: Network, limits: Limits) -> dict[str, Any]:
    """Compare an asset with its module by the executor, and one picture by Apple's runtime.

    Args:
        package: An asset of ours.
        module: Takes preprocessed images, gives logits.
        network: Its shape.
        limits: What is an error.

    Returns:
        The errors, for the artifact's facts.

    Raises:
        BuildError: The asset computes something else than the module, or Apple's runtime something
            else than the executor.
        UnsupportedOperatorError: The executor does not know an operation.
    """
    from pipeline.targets.coreai.executor import Executor

    images = probes(network)
    expected = _logits(module, images)
    apple = _by_apple(package, images[:1], network)
    emulated = Executor(check(package, network))(images)
    if not np.isfinite(emulated).all():
        raise BuildError(_not_finite(network, "the executor"))
    error = figures.compare(emulated, expected).relative_error
    limit = limits.module
    facts: dict[str, Any] = {"images": len(images)}
    if limit is not None and limits.half_weights and error > limit:
        own = _error_of_half_weights(module, images, expected)
        facts["float16_weights_relative_error"] = own
        limit = max(limit, 2 * own)
    if limit is not None and error > limit:
        raise BuildError(
            f"{network.name}: the logits of the Core AI asset differ from PyTorch's by {error:.2g} "
            f"of their size (limit {limit:g}): the conversion is wrong; use another precision"
        )
    difference = figures.compare(apple, emulated[:1]).relative_error
    facts["relative_error"] = error
    facts["apple_runtime_relative_error"] = figures.compare(apple, expected[:1]).relative_error
    facts["apple_runtime_to_executor"] = difference
    return facts


def _by_apple(package: Path, images: Images, network: Network) -> Logits:
    runtime = Runtime(package)
    try:
        logits = runtime(images)
    finally:
        runtime.close()
    if not np.isfinite(logits).all():
        raise BuildError(_not_finite(network, APPLE))
    return logits


def _not_finite(network: Network, what: str) -> str:
    return (
        f"{network.name}: the Core AI asset gives NaN or infinity, by {what}: a value leaves the "
        "range of float16; use precision fp32"
    )


def _error_of_half_weights(module: nn.Module, images: Images, expected: Logits) -> float:
    """How far a module's own logits move when nothing but its weights is rounded to float16."""
    rounded = copy.deepcopy(module)
    for tensor in [*rounded.parameters(), *rounded.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().to(tensor.dtype)
    return figures.compare(_logits(rounded, images), expected).relative_error


def _logits(module: nn.Module, images: Images) -> Logits:
    import torch

    with torch.inference_mode():
        logits: Logits = module.eval()(torch.from_numpy(images)).numpy()
    return logits
