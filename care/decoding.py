"""Decoding and cropping a training image in one go, by torchvision: `decoder: torchvision`.

Its JPEG decoder gives Pillow's pixels, bit for bit, in three quarters of the time; its resize
differs from Pillow's by one level, since it rounds once instead of twice. It refuses truncated
files, and other formats under a JPEG's name: Pillow is asked then, and says what is wrong.
"""

from __future__ import annotations

import contextlib
import math
import struct

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode

from pipeline.core.preprocess import MAX_PIXELS, Exif, decode

_JPEG = b"\xff\xd8\xff"
_MARKER = 0xFF
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers; those left out are of tables and reserved (ITU-T T.81, table B.1)."""
_decode_jpeg = torch.ops.image.decode_jpeg
"""What torchvision.io.decode_jpeg calls, after it has warned of its end for each image anew: its
decoders will move to torchcodec, which needs FFmpeg. The warning takes 3 % of an image's time."""

_MOST_ATTEMPTS = 10
"""Draws of a crop before the middle is taken, as in timm."""


class DecodeAndCrop:
    """A random part of an image, resized to a square; timm's RandomResizedCropAndInterpolation.

    Args:
        size: Side of the square.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest ratio of width to height.
        interpolations: Resampling filters, of which one is drawn for each image.
        exif: Whether an orientation tag turns an image.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolations: tuple[str, ...],
        exif: Exif,
    ) -> None:
        self.size, self.scale, self.ratio, self.exif = size, scale, ratio, exif
        self.interpolations = interpolations

    def __call__(self, encoded: bytes, name: str) -> Image.Image:
        """Decode and crop.

        Args:
            encoded: The file.
            name: What to call it in a message.

        Raises:
            DataError: It cannot be decoded.
        """
        pixels = _decoded(encoded, name, self.exif)
        top, left, height, width = self.part(pixels.shape[1], pixels.shape[2])
        chosen = int(torch.randint(len(self.interpolations), ()))
        part = pixels.narrow(1, top, height).narrow(2, left, width).unsqueeze(0)
        # With the channels of a pixel side by side, as Pillow has them, resizing takes two thirds
        # of the time, and the result is handed over without being turned.
        part = part.contiguous(memory_format=torch.channels_last)
        side = (self.size, self.size)
        # What torchvision's resize does with 8-bit pixels, without its checks of the arguments.
        square = interpolate(part, side, mode=self.interpolations[chosen], antialias=True)
        return Image.fromarray(square.squeeze(0).permute(1, 2, 0).numpy())

    def part(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part."""
        draws: npt.NDArray[np.float64] = torch.rand(_MOST_ATTEMPTS, 4, dtype=torch.float64).numpy()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for share, shape, down, right in draws.tolist():
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        # An image that is very long: as much of its middle as the ratios allow.
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w


def _stated_pixels(encoded: bytes) -> int:
    """Pixels by the frame header of a JPEG (ITU-T T.81, B.2.2); 0 where there is none to be found.

    torchvision takes the memory for as many as are stated, however small the file.
    """
    at = 2 if encoded[:3] == _JPEG else len(encoded)
    while at + 9 <= len(encoded) and encoded[at] == _MARKER:
        kind = encoded[at + 1]
        if kind in _FRAMES:
            height, width = struct.unpack_from(">HH", encoded, at + 5)
            return int(height * width)
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return 0


def _decoded(encoded: bytes, name: str, exif: Exif) -> torch.Tensor:
    """uint8 of shape (3, height, width)."""
    if 0 < _stated_pixels(encoded) <= MAX_PIXELS:
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        # Truncated, or of a kind that it does not know: Pillow decides below.
        with contextlib.suppress(RuntimeError):
            return _decode_jpeg(data, ImageReadMode.RGB.value, exif == "apply")  # type: ignore[no-any-return]
    image = decode(encoded, name, exif)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
