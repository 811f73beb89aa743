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
        exact: Of the program without rounding to the module; None where the weights were changed.
            A larger one is an error of the conversion.
        rounded: With every result rounded to its type; None likewise. A larger one says that the
            network is too sensitive for that type.
        half_weights: The weights are in float16. Where these alone move the module's logits
            further, as in a network whose large values cancel, twice that is the limit, up to
            `MOST_FOR_WEIGHTS`: an error that comes near to the logits' own size is an error,
            whatever the network.
        runtime: Of the executor to Apple's runtime.
    """

    exact: float | None
    rounded: float | None
    half_weights: bool
    runtime: Bound


MOST_FOR_WEIGHTS = 0.2
"""Highest limit that weights in float16 may explain."""


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
        BuildError: The asset computes something else than the module, or gives NaN or infinity.
        UnsupportedOperatorError: The executor does not know an operation.
    """
    from pipeline.targets.coreai.executor import Executor

    images = probes(network)
    expected = _logits(module, images)
    apple = _by_apple(package, images[:1], network)
    program = check(package, network)
    rounded = Executor(program)(images)
    if not np.isfinite(rounded).all():
        raise BuildError(_not_finite(network, "the executor"))
    exact = Executor(program, half=False)(images)
    found = {
        "exact_relative_error": figures.compare(exact, expected).relative_error,
        "relative_error": figures.compare(rounded, expected).relative_error,
    }
    facts: dict[str, Any] = {"images": len(images), **found}
    worst = max(found.values())
    own = 0.0
    if limits.half_weights and limits.exact is not None and worst > limits.exact:
        own = _error_of_half_weights(module, images, expected)
        facts["float16_weights_relative_error"] = own
    allowed = min(2 * own, MOST_FOR_WEIGHTS)
    _judge(network, found["exact_relative_error"], limits.exact, allowed, _CONVERSION)
    _judge(network, found["relative_error"], limits.rounded, allowed, _ROUNDING)
    facts["apple_runtime_relative_error"] = figures.compare(apple, expected[:1]).relative_error
    facts["apple_runtime_to_executor"] = figures.compare(apple, rounded[:1]).relative_error
    return facts


_CONVERSION = "the conversion is wrong; use another precision"
_ROUNDING = "its values lose too much in float16; use precision fp32"


def _judge(network: Network, error: float, limit: float | None, allowed: float, why: str) -> None:
    """Refuse an error above its limit, or above what weights in float16 alone explain."""
    if limit is None:
        return
    limit = max(limit, allowed)
    if error > limit:
        raise BuildError(
            f"{network.name}: the logits of the Core AI asset differ from PyTorch's by {error:.2g} "
            f"of their size (limit {limit:g}): {why}"
        )


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
