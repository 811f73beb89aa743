"""8-bit weights whose products x86 CPUs without VNNI add up exactly.

Such CPUs multiply unsigned activations by signed weights two at a time, and add the two products in
16 bits, with saturation (the instruction vpmaddubsw): 255 * 127 * 2 is twice what fits. Weights of
which no two neighbours come to more than 128 of the same sign cannot saturate, whatever the
activations are, so that the network computes the same on every CPU. Halving all weights would do it
too, at the cost of a whole bit; here every output channel gives up only what its own pairs demand,
about a third of a bit.

Which weights are neighbours follows from how ONNX Runtime's kernels (MLAS) lay them out: the
channels of one position of the kernel follow each other, then comes the next position. Depthwise
convolutions have kernels of their own, which add in 32 bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from calibration.histogram import Floats
from calibration.ranges import Quantization

LARGEST_ACTIVATION = 255
LIMITS = (-32768, 32767)
"""What 16 bits hold."""

MOST = LIMITS[1] // LARGEST_ACTIVATION
"""Largest sum of two neighbouring weights of the same sign: 128."""

STEPS = 33
"""Scales that are tried for a channel, from its own to twice that."""

Stored = npt.NDArray[np.int8]


def rows(weight: npt.NDArray[np.generic], axis: int = 0) -> npt.NDArray[np.generic]:
    """A weight as MLAS reads it: (output channels, products of one output).

    Args:
        weight: Of a convolution, (outputs, inputs, height, width), or of a linear layer.
        axis: Axis of the output channels.
    """
    outputs_first = np.moveaxis(weight, axis, 0)
    channels_last = np.moveaxis(outputs_first, 1, -1)
    return channels_last.reshape(len(channels_last), -1)


def neighbours(weight: npt.NDArray[np.generic], axis: int = 0) -> npt.NDArray[np.int64]:
    """The pairs that are multiplied together, (output channels, pairs, 2); a last one with zero."""
    flat = rows(weight, axis).astype(np.int64)
    if flat.shape[1] % 2:
        flat = np.concatenate([flat, np.zeros((len(flat), 1), np.int64)], 1)
    pairs: npt.NDArray[np.int64] = flat.reshape(len(flat), -1, 2)
    return pairs


def excess(weight: npt.NDArray[np.generic], axis: int = 0) -> npt.NDArray[np.int64]:
    """By how much each pair is too large to be safe, (output channels, pairs); 0 for safe ones."""
    pairs = neighbours(weight, axis)
    sums = np.maximum(_both(np.maximum(pairs, 0)), _both(np.maximum(-pairs, 0)))
    over: npt.NDArray[np.int64] = np.maximum(sums - MOST, 0)
    return over


def _both(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums of pairs, (..., 2): numpy takes several times as long to sum so short an axis."""
    sums: npt.NDArray[np.int64] = pairs[..., 0] + pairs[..., 1]
    return sums


def is_safe(weight: npt.NDArray[np.generic], axis: int = 0) -> bool:
    """No activations can make a pair of the stored weight saturate."""
    return not excess(weight, axis).any()


def safe_weights(weight: Floats, found: Quantization) -> tuple[Quantization, Stored]:
    """Store a weight so that no pair can saturate.

    Every output channel that is not safe as it is gets the scale with the smallest squared error of
    those from its own to twice that; pairs that are still too large are cut to size.

    Args:
        weight: Of any layer but a depthwise convolution.
        found: How it would be stored otherwise: int8, one scale for each output channel.

    Returns:
        The scales, and the stored values in the shape of the weight.
    """
    axis = found.axis or 0
    stored = found.quantize(weight)
    unsafe = np.flatnonzero(excess(stored, axis).any(1))
    if not len(unsafe):
        return found, stored
    channels = replace(found, scale=found.scale[unsafe], zero_point=found.zero_point[unsafe])
    scale, values = _best_safe(weight.take(unsafe, axis), channels)
    scales = found.scale.copy()
    scales[unsafe] = scale
    np.moveaxis(stored, axis, 0)[unsafe] = np.moveaxis(values, axis, 0)
    return replace(found, scale=scales), stored


def _best_safe(weight: Floats, found: Quantization) -> tuple[npt.NDArray[np.float32], Stored]:
    """Scales and stored values of channels that are not safe with the scales that were found."""
    axis = found.axis or 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    scale, stored = found.scale, found.quantize(weight)
    best = np.full(len(scale), np.inf)
    for factor in np.linspace(1, 2, STEPS):
        tried = replace(found, scale=(found.scale * factor).astype(np.float32))
        values = _cut(tried.quantize(weight), axis)
        error = rows((tried.dequantize(values) - weight) ** 2, axis).sum(1)
        better = error < best
        best = np.where(better, error, best)
        scale = np.where(better, tried.scale, scale)
        stored = np.where(better.reshape(shape), values, stored)
    return scale, stored


def _cut(stored: Stored, axis: int) -> Stored:
    """The nearest safe values: each of two that are too large gives half of what is too much."""
    flat = rows(stored, axis).astype(np.int64)
    odd = flat.shape[1] % 2
    pairs = neighbours(stored, axis)
    for sign in (1, -1):
        sized = np.maximum(sign * pairs, 0)
        over = np.maximum(_both(sized) - MOST, 0)
        # Where only one of them has the sign, it is at most 127 and nothing is over.
        give = np.stack([over // 2, over - over // 2], 2)
        lacking = np.maximum(give - sized, 0)
        give = np.minimum(give, sized) + lacking[..., ::-1]
        pairs = pairs - sign * give
    flat = pairs.reshape(len(flat), -1)[:, : flat.shape[1]] if odd else pairs.reshape(flat.shape)
    outputs_first = np.moveaxis(stored, axis, 0)
    channels_last = np.moveaxis(outputs_first, 1, -1)
    back = np.moveaxis(flat.reshape(channels_last.shape), -1, 1)
    return np.moveaxis(back, 0, axis).astype(np.int8)
