"""RandAugment's shears, shifts and sharpening, in a fraction of Pillow's time.

The result is Pillow's to one level, in rare pixels, and mostly its very bits. A third of the time
of an augmented image goes into Pillow's affine transforms, which look up 4 or 16 pixels for each;
where rows only slide, 2 or 4 of one row are enough, and the row slides as a whole.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, RandAugment
from torchvision.transforms import Compose

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.floating[Any]]

_NEARLY = 1e-3
"""Added where fractions are cut off: Pillow counts in double precision, and whole levels stay."""


def operations(transform: Compose) -> Iterator[AugmentOp]:
    """What timm's policies among the steps of a transform are made of."""
    for step in transform.transforms:
        yield from itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ()))


def hasten(transform: Compose) -> None:
    """Let timm's policies use what is here, in place; they draw the same random numbers."""
    for operation in operations(transform):
        faster = _FASTER.get(operation.aug_fn)
        if faster is not None:
            operation.aug_fn = partial(_for_colours, faster, operation.aug_fn)
    for step in transform.transforms:
        if isinstance(step, RandAugment):
            step.ops = np.array(step.ops, dtype=object)  # numpy's choice would make one each time


def _for_colours(
    faster: Callable[..., Image.Image],
    timms: Callable[..., Image.Image],
    image: Image.Image,
    amount: float,
    **options: Any,
) -> Image.Image:
    """One of the functions here for RGB, and timm's own for anything else."""
    return (faster if image.mode == "RGB" else timms)(image, amount, **options)


def _shear_x(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    return _slide_rows(image, factor * (np.arange(image.height) + 0.5), **options)


def _shift_x(image: Image.Image, share: float, **options: Any) -> Image.Image:
    return _slide_rows(image, np.full(image.height, share * image.width), **options)


def _of_columns(of_rows: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    """The same for columns."""

    def turned(image: Image.Image, amount: float, **options: Any) -> Image.Image:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        return of_rows(image, amount, **options).transpose(Image.Transpose.TRANSPOSE)

    return turned


def _slide_rows(
    image: Image.Image, shifts: Numbers, *, fillcolor: tuple[int, ...], resample: Any
) -> Image.Image:
    """`slide`, with the options of timm, which draws one of several filters as here."""
    if isinstance(resample, tuple):
        resample = random.choice(resample)
    return slide(image, shifts, resample, fillcolor)


def _sharpen(image: Image.Image, factor: float, **_: Any) -> Image.Image:
    return sharpen(image, factor)


_FASTER: dict[Callable[..., Image.Image], Callable[..., Image.Image]] = {
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _of_columns(_shear_x),
    auto_augment.translate_x_rel: _shift_x,
    auto_augment.translate_y_rel: _of_columns(_shift_x),
    auto_augment.sharpness: _sharpen,
}


def slide(image: Image.Image, shifts: Numbers, resample: int, fill: tuple[int, ...]) -> Image.Image:
    """Move each row to the left, as Pillow's affine transforms would.

    Args:
        image: RGB.
        shifts: float64 of shape (height,), in pixels, of either sign.
        resample: `Image.Resampling.BILINEAR` or `BICUBIC`.
        fill: Colour of what lies outside of the image.
    """
    pixels = np.asarray(image)
    height, width, depth = pixels.shape
    shifts = np.clip(shifts, -width - 1, width + 1)  # further away there is nothing, either
    whole = np.floor(shifts)
    near = torch.from_numpy(_neighbours(pixels, whole.astype(np.int64)))
    moved = torch.full((height, width * depth), _NEARLY)
    for tap, weights in _weights(shifts - whole, resample):
        part = near[:, depth * tap : depth * (tap + width)]
        moved.addcmul_(part, torch.from_numpy(weights)[:, None])
    levels = moved.clamp_(0, 255).numpy().astype(np.uint8)
    # A pixel lies inside where its middle comes from within the row.
    row = np.zeros((3 * width + 4, depth), dtype=np.uint8)
    row[width + 2 : 2 * width + 2] = 255
    inside = _windows(row, width + 2 + np.floor(shifts + 0.5).astype(np.int64), width)
    outside = np.tile(np.array(fill, dtype=np.uint8), width)
    return Image.fromarray(((levels & inside) | (outside & ~inside)).reshape(pixels.shape))


def _neighbours(pixels: Pixels, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Each row from the pixel before `steps` on, and three pixels longer.

    The outermost pixels go on for two more, as Pillow has it; what comes after these is of no use.
    """
    height, width, depth = pixels.shape
    spare = 2  # rows, above and below
    padded = np.empty((height + 2 * spare, width + 4, depth), dtype=np.uint8)
    rows = padded[spare:-spare]
    rows[:, 2:-2] = pixels
    rows[:, :2], rows[:, -2:] = pixels[:, :1], pixels[:, -1:]
    starts = np.arange(spare, spare + height) * (width + 4) + steps + 1
    return _windows(padded, starts, width + 3).astype(np.float32)


def sharpen(image: Image.Image, factor: float) -> Image.Image:
    """Go away from a smoothed image, or towards it, as Pillow's `ImageEnhance.Sharpness` does.

    Args:
        image: RGB, of at least 3 x 3 pixels.
        factor: 0 for the smoothed image, 1 for the image itself.
    """
    pixels = np.array(image)
    wide = pixels.astype(np.uint16)
    three = wide[:-2] + wide[1:-1] + wide[2:]
    middle = wide[1:-1, 1:-1]
    total = three[:, :-2] + three[:, 1:-1] + three[:, 2:] + 4 * middle  # of 13 parts
    smooth = ((2 * total + 13) // 26).astype(np.float32)
    mixed = smooth + np.float32(factor) * (middle.astype(np.float32) - smooth)
    pixels[1:-1, 1:-1] = np.clip(mixed, 0, 255).astype(np.uint8)  # the edge is never smoothed
    return Image.fromarray(pixels)


def _windows(pixels: Pixels, starts: npt.NDArray[np.int64], length: int) -> Pixels:
    """For each start so many pixels from there on, whatever rows they are in.

    Args:
        pixels: uint8, contiguous, the channels of a pixel last.
        starts: Numbers of pixels.
        length: In pixels.

    Returns:
        uint8 of shape (starts, length * channels).
    """
    depth = pixels.shape[-1]
    every = np.lib.stride_tricks.sliding_window_view(pixels.reshape(-1), length * depth)
    found: Pixels = every[starts * depth]
    return found


def _weights(part: Numbers, resample: int) -> list[tuple[int, npt.NDArray[np.float32]]]:
    """Which of four neighbours count, and how much.

    Args:
        part: float64 of shape (rows,): how far a place lies from the second to the third, 0 to 1.
        resample: See `slide`.
    """
    if resample == Image.Resampling.BILINEAR:
        weights = {1: 1 - part, 2: part}
    else:  # the cubic of Pillow's transforms; its resize has another one
        square, cube = part**2, part**3
        weights = {
            0: -part + 2 * square - cube,
            1: 1 - 2 * square + cube,
            2: part + square - cube,
            3: cube - square,
        }
    return [(tap, values.astype(np.float32)) for tap, values in weights.items()]
