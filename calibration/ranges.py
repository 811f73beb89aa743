"""From what was seen of a tensor to a range, and from a range to scale and zero point.

    range_ = choose_range(histogram, Method.ENTROPY, Scheme(DType.INT8))
    parameters = quantization(range_, Scheme(DType.INT8))
    stored = parameters.quantize(values)

The methods are:

- min-max: everything that was seen.
- percentile: cuts off the outermost values; of the magnitudes for a symmetric scheme, half of them
  at either end for an asymmetric one.
- entropy: the threshold for which the quantized distribution of magnitudes has the smallest
  Kullback-Leibler divergence to the distribution that was seen (Migacz, "8-bit inference with
  TensorRT", GTC 2017).
- mse: the range with the smallest mean squared error of quantizing what was seen, clipping
  included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.histogram import Counts, Doubles, Floats, Histogram
from calibration.squares import SquaredErrors
from pipeline.core.errors import ConfigError, DataError

PERCENTILE = 99.99
"""Default share of values, in percent, that the percentile method keeps."""

SMALLEST_CUT = 1 / 16
"""Entropy and MSE keep at least this share of the largest magnitude: 128 of 2048 bins. A threshold
below would have quantization steps finer than the histogram can judge."""

LEAST_KEPT = 0.99
"""Share of values that entropy keeps at least. The divergence does not see how far clipped values
are moved: without this limit, values that are all far from zero would be clipped into one level,
which resembles their clipped distribution perfectly."""

_CANDIDATES = 96
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a subnormal scale is lost on some hardware


class Method(StrEnum):
    """How a range is chosen."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: There is none.
    """
    try:
        return Method(name)
    except ValueError as error:
        raise ConfigError(
            f"unknown calibration method {name!r}; there are {', '.join(Method)}"
        ) from error


class DType(StrEnum):
    """Type in which values are stored."""

    INT8 = "int8"
    UINT8 = "uint8"
    FLOAT8 = "float8e4m3fn"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest value."""
        return {"int8": (-128, 127), "uint8": (0, 255), "float8e4m3fn": (-448, 448)}[self.value]

    @property
    def onnx(self) -> int:
        """Its number in `onnx.TensorProto.DataType`."""
        return {"int8": 3, "uint8": 2, "float8e4m3fn": 17}[self.value]

    @property
    def numpy(self) -> np.dtype[Any]:
        """Its numpy type (float8 comes from ml_dtypes, which onnx brings along)."""
        if self is DType.FLOAT8:
            import ml_dtypes

            float8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
            return float8
        return np.dtype(self.value)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a range maps to stored values.

    Attributes:
        dtype: Type of the stored values.
        symmetric: Zero lies in the middle of the stored values (0, or 128 for uint8), and the range
            reaches equally far on both sides. Otherwise the zero point is free.
        narrow: Without the smallest value of int8, so that it spans -127 to 127: usual for weights.
        bits: Of those that the type has, how many are used; fewer than 8 in narrow int8 only.

    Raises:
        ConfigError: The combination does not exist.
    """

    dtype: DType = DType.INT8
    symmetric: bool = True
    narrow: bool = False
    bits: int = 8

    def __post_init__(self) -> None:
        if self.dtype is DType.FLOAT8 and not self.symmetric:
            raise ConfigError("float8 has no zero point: choose a symmetric scheme")
        if self.narrow and not (self.dtype is DType.INT8 and self.symmetric):
            raise ConfigError("a narrow range is for symmetric int8 only: set narrow to false")
        if not (self.bits == 8 or (self.narrow and 2 <= self.bits < 8)):
            raise ConfigError(f"{self.bits} bits are for narrow int8 only, and 2 to 8 of them")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest stored value."""
        low, high = self.dtype.limits
        if not self.narrow:
            return low, high
        most = 2 ** (self.bits - 1) - 1
        return -most, most


ACTIVATIONS_INT8 = Scheme(DType.INT8)
"""Symmetric signed activations: what TensorRT and Core ML take."""

ACTIVATIONS_UINT8 = Scheme(DType.UINT8, symmetric=False)
"""Unsigned activations with a zero point: the fastest for ONNX Runtime on x86."""

WEIGHTS_INT8 = Scheme(DType.INT8, narrow=True)
"""Symmetric weights from -127 to 127."""

WEIGHTS_INT7 = Scheme(DType.INT8, narrow=True, bits=7)
"""Symmetric weights from -63 to 63: whatever activations in 8 bits they meet, two products stay
within the 16 bits in which CPUs without VNNI add them."""

FLOAT8_E4M3 = Scheme(DType.FLOAT8)
"""Scaled float8 with 3 bits of mantissa and no infinity."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values from `low` to `high`; what lies outside is clipped.

    Raises:
        DataError: A bound is NaN or infinite, or `low` is above `high`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise DataError(
                f"the range [{self.low}, {self.high}] is not finite: the network overflows on the "
                "calibration images, so leave this tensor in float32"
            )
        if self.low > self.high:
            raise DataError(f"the range [{self.low}, {self.high}] ends before it begins")

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def constant(self) -> bool:
        """It holds a single value."""
        return self.low == self.high

    def clip(self, threshold: float) -> Range:
        """The part of the range with magnitudes up to `threshold`, and at least zero."""
        low, high = (min(max(bound, -threshold), threshold) for bound in (self.low, self.high))
        return Range(low, high)


@dataclass(frozen=True, eq=False, slots=True)
class Quantization:
    """Parameters of an ONNX QuantizeLinear: stored = round(value / scale) + zero_point, saturated.

    Attributes:
        scheme: What the values are stored in.
        scale: float32, of shape () for a tensor or (channels,).
        zero_point: Of the stored type and the shape of the scale.
        axis: Axis of the channels; None where there is one scale for the tensor.
    """

    scheme: Scheme
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[Any]
    axis: int | None = None

    def quantize(self, values: Floats) -> npt.NDArray[Any]:
        """Stored values: rounded to nearest, ties to even, as ONNX and all runtimes do."""
        scale, zero_point = self._shaped(values.ndim)
        low, high = self.scheme.limits
        scaled = values / scale
        if self.scheme.dtype is not DType.FLOAT8:
            scaled = np.rint(scaled) + zero_point
        stored: npt.NDArray[Any] = np.clip(scaled, low, high).astype(self.scheme.dtype.numpy)
        return stored

    def dequantize(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 values that stored ones stand for."""
        scale, zero_point = self._shaped(stored.ndim)
        values: npt.NDArray[np.float32] = (stored.astype(np.float32) - zero_point) * scale
        return values

    def round_trip(self, values: Floats) -> npt.NDArray[np.float32]:
        """Values as they are after quantizing and dequantizing."""
        return self.dequantize(self.quantize(values))

    def _shaped(self, ndim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        shape = [1] * ndim
        if self.axis is not None:
            shape[self.axis] = -1
        zero_point = self.zero_point.astype(np.float32)
        return (
            (self.scale, zero_point)
            if self.axis is None
            else (self.scale.reshape(shape), zero_point.reshape(shape))
        )


def quantization(range_: Range, scheme: Scheme) -> Quantization:
    """Scale and zero point of a tensor.

    The range is widened to hold zero, so that zero is exact: padding and empty channels stay
    exact. A range of zero alone gets the scale 1.
    """
    (scale,), (zero_point,) = _parameters(np.array([[range_.low, range_.high]]), scheme)
    stored = np.array(int(zero_point), dtype=scheme.dtype.numpy)
    return Quantization(scheme, np.array(scale), stored)


def _parameters(ends: Doubles, scheme: Scheme) -> tuple[npt.NDArray[np.float32], Doubles]:
    """Scales and zero points of ranges, given as their lower and upper ends, (ranges, 2)."""
    low, high = scheme.limits
    if scheme.symmetric:
        # The limit is of the positive side: -128 of int8 then stands for a little more than amax.
        middle = 128 if scheme.dtype is DType.UINT8 else 0
        scales = _usable(np.abs(ends).max(1) / (high - middle))
        zeros = np.full(len(ends), float(middle))
    else:
        bottoms, tops = np.minimum(ends[:, 0], 0.0), np.maximum(ends[:, 1], 0.0)
        scales = _usable((tops - bottoms) / (high - low))
        zeros = np.clip(np.rint(low - bottoms / scales), low, high)
    return scales.astype(np.float32), zeros


def _usable(scales: Doubles) -> Doubles:
    return np.where(scales == 0, 1.0, np.maximum(scales, _SMALLEST_SCALE))


def weight_quantization(
    weight: Floats,
    axis: int | None,
    scheme: Scheme = WEIGHTS_INT8,
    method: Method = Method.MIN_MAX,
) -> Quantization:
    """Scales of a weight, one for each channel.

    Args:
        weight: Of any shape.
        axis: Axis of the output channels (0 for Conv, the last for MatMul); None for one scale.
        scheme: A symmetric one.
        method: `MIN_MAX` or `MSE`; the others are made for activations.

    Raises:
        DataError: The weight holds NaN or infinite values.
        ConfigError: The scheme is asymmetric, or the method is for activations.
    """
    if not scheme.symmetric or scheme.dtype is DType.UINT8:
        raise ConfigError("weights are quantized symmetrically: choose int8 or float8, symmetric")
    if method not in (Method.MIN_MAX, Method.MSE):
        raise ConfigError(f"the method {method} is for activations: choose min-max or mse")
    if not np.isfinite(weight).all():
        raise DataError("a weight holds NaN or infinite values: check the checkpoint")
    channels = _as_rows(weight, axis)
    amax = np.abs(channels).max(1, initial=0.0)
    scale = _channel_scales(amax, scheme)
    if method is Method.MSE:
        scale = _best_channel_scales(channels, amax, scheme)
    if axis is None:
        scale = scale.reshape(())
    zero_point = np.zeros(scale.shape, dtype=scheme.dtype.numpy)
    return Quantization(scheme, scale, zero_point, axis)


def _as_rows(weight: Floats, axis: int | None) -> Doubles:
    doubles = np.asarray(weight, dtype=np.float64)
    if axis is None:
        return doubles.reshape(1, -1)
    return np.moveaxis(doubles, axis, 0).reshape(doubles.shape[axis], -1)


def _channel_scales(amax: Doubles, scheme: Scheme) -> npt.NDArray[np.float32]:
    scales = np.maximum(amax / scheme.limits[1], _SMALLEST_SCALE)
    return np.where(amax == 0, 1.0, scales).astype(np.float32)


def _best_channel_scales(
    channels: Doubles, amax: Doubles, scheme: Scheme
) -> npt.NDArray[np.float32]:
    """The scale of every row with the smallest squared error, of a series of thresholds."""
    best = np.full(len(channels), np.inf)
    scales = _channel_scales(amax, scheme)
    zero_point = np.zeros(len(channels), dtype=scheme.dtype.numpy)
    for fraction in np.linspace(1, 0.3, _CANDIDATES):
        candidate = _channel_scales(amax * fraction, scheme)
        rounded = Quantization(scheme, candidate, zero_point, 0).round_trip(channels)
        error = ((rounded - channels) ** 2).sum(1)
        scales = np.where(error < best, candidate, scales)
        best = np.minimum(error, best)
    return scales


def choose_range(
    histogram: Histogram, method: Method, scheme: Scheme, percentile: float = PERCENTILE
) -> Range:
    """Choose the range of a tensor.

    Args:
        histogram: Of the values that were seen.
        method: See the module's description.
        scheme: What the values will be stored in; min-max does not depend on it.
        percentile: Share of values that the percentile method keeps, in percent.

    Returns:
        A range that reaches no further from zero than what was seen.

    Raises:
        DataError: No value was seen.
        ConfigError: The percentile is not in (0, 100], or entropy is asked for float8.
    """
    if not histogram.count:
        raise DataError("no value was seen of this tensor: calibrate with at least one image")
    seen = Range(histogram.low, histogram.high)
    if method is Method.MIN_MAX or seen.constant:
        return seen
    if method is Method.PERCENTILE:
        return _percentile_range(histogram, scheme.symmetric, percentile)
    if method is Method.ENTROPY:
        if scheme.dtype is DType.FLOAT8:
            raise ConfigError("entropy is defined for integers: choose min-max or mse for float8")
        return seen.clip(_entropy_threshold(histogram, scheme))
    return _mse_range(histogram, scheme)


def _percentile_range(histogram: Histogram, symmetric: bool, percentile: float) -> Range:
    if not 0 < percentile <= 100:
        raise ConfigError(f"a percentile lies above 0 and is at most 100, not {percentile}")
    seen = Range(histogram.low, histogram.high)
    share = percentile / 100
    if symmetric:
        magnitudes = histogram.magnitudes()
        edges = np.arange(magnitudes.size + 1, dtype=np.float64) * histogram.width
        return seen.clip(_quantile(magnitudes, edges, share))
    counts, edges, outside = histogram.counts, histogram.edges, (1 - share) / 2
    low = max(seen.low, _quantile(counts, edges, outside))
    high = min(seen.high, _quantile(counts, edges, 1 - outside))
    return Range(low, max(low, high))


def _quantile(counts: Counts, edges: Doubles, share: float) -> float:
    """Value below which `share` of the counts lie; values are spread evenly within a bin."""
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(share * cumulative[-1], cumulative, edges))


def _entropy_threshold(histogram: Histogram, scheme: Scheme) -> float:
    """Threshold of the magnitudes with the smallest divergence."""
    counts = histogram.magnitudes()
    levels = 128
    if not scheme.symmetric:
        # The steps that lie between zero and the farther end of the range.
        seen = Range(min(histogram.low, 0.0), max(histogram.high, 0.0))
        levels = round(256 * seen.amax / (seen.high - seen.low))
    if counts.size <= levels:
        return counts.size * histogram.width
    # Zero is exact in every scheme. A spike of zeros (ReLU) would otherwise decide alone.
    counts[0] = min(counts[0], counts[1])
    enough = np.searchsorted(np.cumsum(counts), LEAST_KEPT * counts.sum()) + 1
    first = max(levels, math.ceil(counts.size * SMALLEST_CUT), int(enough))
    step = max(1, counts.size // 1024)
    # From the whole range downwards: of equal divergences the one that clips least wins.
    kept = np.arange(counts.size, first - 1, -step)
    return float(kept[int(np.argmin(divergences(counts, kept, levels)))] * histogram.width)


def divergences(counts: Counts, kept: npt.NDArray[np.int64], levels: int) -> Doubles:
    """Divergence of the quantized distribution from `counts`, for several thresholds at once.

    For a threshold, P is the distribution of the bins that are kept, with all that lies beyond in
    the last of them. Q is what remains of the kept bins when they are merged into `levels` groups
    of equal width and each group's count is spread over those of its bins that P does not have
    empty. Sums over groups come from cumulative sums, so that a threshold costs `levels` additions.

    Args:
        counts: Counts of the magnitudes, (bins,).
        kept: Number of bins below each threshold, at least `levels` each, (thresholds,).
        levels: Number of quantization steps from zero to the threshold.

    Returns:
        The Kullback-Leibler divergences of P and Q in nats, (thresholds,); infinite where Q lacks
        something that P has.
    """
    total = float(counts.sum())
    doubles = counts.astype(np.float64)
    cumulative = np.concatenate([[0.0], np.cumsum(doubles)])
    occupied = np.concatenate([[0.0], np.cumsum(counts > 0)])
    logs = np.concatenate([[0.0], np.cumsum(_x_log_x(doubles))])

    borders = np.rint(np.linspace(0, kept, levels + 1, axis=1)).astype(np.int64)
    inside = cumulative[kept]
    outside, last = total - inside, doubles[kept - 1]
    merged = np.diff(cumulative[borders])
    bins = np.diff(occupied[borders])
    bins[:, -1] += (last == 0) & (outside > 0)

    reference = merged.copy()
    reference[:, -1] += outside
    own = logs[kept] - _x_log_x(last) + _x_log_x(last + outside)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(reference > 0, reference * np.log(merged / bins), 0.0).sum(1)
        # sum P log(P / Q), with P = p / total and Q = q / inside
        result: Doubles = (own - spread) / total + np.log(inside / total)
    result[~np.isfinite(result)] = np.inf
    return result


def _x_log_x(x: Doubles) -> Doubles:
    result: Doubles = x * np.log(np.where(x > 0, x, 1.0))
    return result


def _mse_range(histogram: Histogram, scheme: Scheme) -> Range:
    """The range with the smallest squared error: both ends together, then each on its own."""
    seen = Range(histogram.low, histogram.high)
    fractions = np.linspace(1, SMALLEST_CUT, _CANDIDATES)
    thresholds = seen.amax * fractions
    tried = _ends(*(np.clip(end, -thresholds, thresholds) for end in (seen.low, seen.high)))
    if not scheme.symmetric:
        tried = np.concatenate([tried, _ends(seen.low * fractions, seen.high * fractions)])
    errors = SquaredErrors(histogram)
    best = best_range(errors, scheme, tried)
    if scheme.symmetric:
        return best
    for _ in range(2):
        lows = seen.low * fractions
        best = _best_beside(best, errors, scheme, lows[lows <= best.high], best.high)
        highs = seen.high * fractions
        best = _best_beside(best, errors, scheme, best.low, highs[highs >= best.low])
    return best


def _best_beside(
    best: Range, errors: SquaredErrors, scheme: Scheme, low: Doubles | float, high: Doubles | float
) -> Range:
    """The best range so far, or one with another of its ends that is better."""
    tried = np.concatenate([_ends(best.low, best.high), _ends(low, high)])
    return best_range(errors, scheme, tried)


def _ends(low: Doubles | float, high: Doubles | float) -> Doubles:
    """Ranges as an array, (ranges, 2), from their lower and upper ends."""
    return np.stack(np.broadcast_arrays(np.atleast_1d(low), np.atleast_1d(high)), axis=1)


def best_range(errors: SquaredErrors, scheme: Scheme, tried: Doubles) -> Range:
    """The first range with the smallest squared error.

    Args:
        errors: Of what is quantized.
        scheme: What it is stored in.
        tried: Lower and upper ends of the ranges, (ranges, 2), at least one.
    """
    distinct = list(dict.fromkeys(map(tuple, tried.tolist())))
    candidates = [Range(*distinct[number]) for number in _may_be_best(errors, scheme, distinct)]
    if len(candidates) == 1:
        return candidates[0]

    def error(candidate: Range) -> float:
        return errors.exact(quantization(candidate, scheme).round_trip(errors.centres))

    return min(candidates, key=error)


def _may_be_best(
    errors: SquaredErrors, scheme: Scheme, ends: Sequence[tuple[float, float]]
) -> Iterable[int]:
    """Numbers of the ranges whose error may be the smallest, ascending."""
    if scheme.dtype is DType.FLOAT8:
        return range(len(ends))  # its values do not lie evenly
    scales, zeros = _parameters(np.array(ends), scheme)
    return errors.may_be_best(scales, zeros, scheme.limits)
