"""How OpenCV resizes 8-bit images, in numpy: what an application gets that uses `cv2.resize`.

OpenCV itself is not needed. The arithmetic is that of its own code (modules/imgproc/src/resize.cpp
of 4.x): coefficients of 11 bits for linear and cubic, float32 sums for area. Vectorized paths of
OpenCV sum in another order, so that a pixel may differ by one level (tests compare with pixels
that OpenCV gave).

Linear and cubic look at 2 and 4 neighbours, however much smaller the image becomes: they alias.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.core.network import Pixels

Interpolation = Literal["linear", "cubic", "area"]

_COEFFICIENT = 2048
"""INTER_RESIZE_COEF_SCALE."""
_CUBIC = np.float32(-0.75)
"""The A of OpenCV's cubic; Pillow and ONNX's default take -0.5 and -0.75."""

Taps = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""For each output position the source positions, and their weights: (outputs, taps) each."""


def resize(image: Pixels, width: int, height: int, interpolation: Interpolation) -> Pixels:
    """Resize as `cv2.resize(image, (width, height), interpolation=INTER_…)` does.

    Args:
        image: uint8 (height, width, channels).
        width: Of the result, in pixels.
        height: Of the result, in pixels.
        interpolation: INTER_LINEAR, INTER_CUBIC or INTER_AREA.

    Returns:
        uint8 (height, width, channels).
    """
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    if interpolation == "area" and rows >= height and columns >= width:
        return _area(image, width, height)
    if interpolation == "cubic":
        return _cubic(image, _cubic_taps(columns, width), _cubic_taps(rows, height))
    taps = _area_taps if interpolation == "area" else _linear_taps
    return _linear(image, taps(columns, width), taps(rows, height))


def _linear_taps(source: int, target: int) -> Taps:
    position = _positions(source, target)
    first = np.floor(position)
    fraction = np.where((first < 0) | (first >= source - 1), 0, position - first)
    return _pair(source, first, fraction.astype(np.float32))


def _area_taps(source: int, target: int) -> Taps:
    """INTER_AREA of an image that grows: linear, but with the flat parts of larger pixels."""
    scale, index = source / target, np.arange(target)
    first = np.floor(index * scale)
    fraction = ((index + 1) - (first + 1) / scale).astype(np.float32)
    fraction = np.where(fraction <= 0, np.float32(0), fraction - np.floor(fraction))
    return _pair(source, first, np.where(first >= source - 1, np.float32(0), fraction))


def _pair(source: int, first: npt.NDArray[np.float64], fraction: npt.NDArray[np.float32]) -> Taps:
    index = np.stack([first, first + 1], 1).astype(np.int64).clip(0, source - 1)
    return index, np.stack([1 - fraction, fraction], 1).astype(np.float32)


def _cubic_taps(source: int, target: int) -> Taps:
    position = _positions(source, target)
    first = np.floor(position)
    x = (position - first).astype(np.float32)
    one, a = np.float32(1), _CUBIC
    weights = [
        ((a * (x + one) - 5 * a) * (x + one) + 8 * a) * (x + one) - 4 * a,
        ((a + 2) * x - (a + 3)) * x * x + one,
        ((a + 2) * (one - x) - (a + 3)) * (one - x) * (one - x) + one,
    ]
    weights.append(one - weights[0] - weights[1] - weights[2])
    index = (first[:, None] + np.arange(-1, 3)).astype(np.int64).clip(0, source - 1)
    return index, np.stack(weights, 1).astype(np.float32)


def _positions(source: int, target: int) -> npt.NDArray[np.float32]:
    """Where the middles of the result's pixels lie in the source, as float32 has it."""
    return ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)


def _across(image: Pixels, taps: Taps) -> npt.NDArray[np.int64]:
    """Rows resized in whole numbers, 2048 times too large: (rows, width, channels)."""
    index, weights = taps
    whole = np.rint(weights * _COEFFICIENT).astype(np.int64)
    found = np.zeros((image.shape[0], len(index), image.shape[2]), np.int64)
    for tap in range(index.shape[1]):
        found += image[:, index[:, tap]] * whole[:, tap, None]
    return found


def _linear(image: Pixels, across: Taps, down: Taps) -> Pixels:
    rows = _across(image, across) >> 4
    index, weights = down
    whole = np.rint(weights * _COEFFICIENT).astype(np.int64)[:, :, None, None]
    upper, lower = rows[index[:, 0]], rows[index[:, 1]]
    mixed = ((whole[:, 0] * upper) >> 16) + ((whole[:, 1] * lower) >> 16)
    return ((mixed + 2) >> 2).astype(np.uint8)


def _cubic(image: Pixels, across: Taps, down: Taps) -> Pixels:
    rows = _across(image, across)
    index, weights = down
    whole = np.rint(weights * _COEFFICIENT).astype(np.int64)
    found = np.zeros((len(index), *rows.shape[1:]), np.int64)
    for tap in range(index.shape[1]):
        found += rows[index[:, tap]] * whole[:, tap, None, None]
    return ((found + (1 << 21)) >> 22).clip(0, 255).astype(np.uint8)


def _area(image: Pixels, width: int, height: int) -> Pixels:
    """Means over the parts of the source that each pixel of the result covers."""
    rows, columns = image.shape[:2]
    if rows % height == 0 and columns % width == 0:
        return _whole_area(image, width, height)
    across, down = _cover(columns, width), _cover(rows, height)
    found = np.tensordot(image.astype(np.float32), across, ((1,), (1,)))  # rows, channels, width
    found = np.tensordot(down, found, ((1,), (0,))).transpose(0, 2, 1)
    return np.rint(found).clip(0, 255).astype(np.uint8)


def _whole_area(image: Pixels, width: int, height: int) -> Pixels:
    """Means over blocks of whole pixels; of 2 x 2, halves are rounded up, else to even."""
    down, across = image.shape[0] // height, image.shape[1] // width
    blocks = image.reshape(height, down, width, across, -1).astype(np.int64)
    total = blocks.sum((1, 3))
    if (down, across) == (2, 2):
        halves_up: Pixels = ((total + 2) >> 2).astype(np.uint8)
        return halves_up
    mean = total.astype(np.float32) * np.float32(1 / (down * across))
    to_even: Pixels = np.rint(mean).astype(np.uint8)
    return to_even


def _cover(source: int, target: int) -> npt.NDArray[np.float32]:
    """Share of each source position in each one of the result, (target, source)."""
    scale = source / target
    shares = np.zeros((target, source), np.float32)
    for index in range(target):
        start, end = index * scale, min((index + 1) * scale, source)
        first, last = math.ceil(start), math.floor(end)
        width = min(scale, source - start)
        shares[index, first:last] = 1 / width
        if first - start > 1e-3:
            shares[index, first - 1] = (first - start) / width
        if end - last > 1e-3:
            shares[index, last] = (end - last) / width
    return shares
