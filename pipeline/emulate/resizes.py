"""The ways in which applications really make a network's input of a photograph.

Each is one departure from the network's own preprocessing, all else being equal: another filter,
another rounding, another decoder, another order of channels. What it costs is a matter of the
network: `pipeline.stages.resizes` measures it.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.core.network import Pixels
from pipeline.core.preprocess import Preprocess, to_rgb
from pipeline.emulate import opencv

Kind = Literal["resize", "crop", "decode", "colour", "normalize"]
"""What a way does otherwise."""

SIDES = {"center": "shorter side", "squash": "both sides", "border": "longer side"}
"""What a network's own preprocessing resizes, by its crop mode."""

_TORCH_FILTERS = ("bilinear", "bicubic")
_WRONG = 0.5
"""Mean and standard deviation that many mobile examples take for all networks."""


@dataclass(frozen=True)
class Photo:
    """One photograph.

    Attributes:
        image: Decoded: RGB and upright, as the network's own preprocessing has it.
        encoded: The file; None where images are kept otherwise.
        preprocess: The network's own.
    """

    image: Image.Image
    encoded: bytes | None
    preprocess: Preprocess

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height that it is resized to, before the crop."""
        return self.preprocess.resized_shape(self.image)

    @property
    def fits(self) -> bool:
        """It has that size already: resizing changes nothing."""
        return self.image.size == self.shape

    @cached_property
    def array(self) -> Pixels:
        """The decoded image, uint8 (height, width, channels)."""
        image = self.image.convert("L") if self.preprocess.channels == "gray" else self.image
        return np.array(image, np.uint8).reshape(image.height, image.width, self.preprocess.depth)

    @cached_property
    def own(self) -> Pixels:
        """What the network's own preprocessing makes of it, uint8 (size, size, channels)."""
        return self.preprocess.pixels(self.image)


@dataclass(frozen=True)
class Way:
    """One way from a photograph to the network's input.

    Attributes:
        name: Short, such as "opencv-linear".
        title: For people.
        kind: What it does otherwise.
        pixels: Makes uint8 (size, size, channels) of a photograph.
        normalized: How these are normalized, where that is what differs; None for the network's
            own way.
    """

    name: str
    title: str
    kind: Kind
    pixels: Callable[[Photo], Pixels]
    normalized: Preprocess | None = None


def ways(preprocess: Preprocess) -> list[Way]:
    """All ways to compare with a network's own preprocessing, in the order of a table.

    Args:
        preprocess: The network's own.
    """
    filter_ = preprocess.interpolation if preprocess.interpolation in _TORCH_FILTERS else "bilinear"
    side = SIDES[preprocess.crop_mode]
    return [
        Way("pillow-bicubic", "Pillow, bicubic", "resize", _pillow("bicubic")),
        Way("pillow-bilinear", "Pillow, bilinear", "resize", _pillow("bilinear")),
        Way("opencv-linear", "OpenCV, INTER_LINEAR", "resize", _opencv("linear")),
        Way("opencv-area", "OpenCV, INTER_AREA", "resize", _opencv("area")),
        Way("opencv-cubic", "OpenCV, INTER_CUBIC", "resize", _opencv("cubic")),
        Way(
            "tensor-antialias",
            f"torchvision on a tensor, {filter_}, antialias=True",
            "resize",
            _torchvision(filter_, antialias=True),
        ),
        Way(
            "tensor",
            f"torchvision on a tensor, {filter_}, antialias=False",
            "resize",
            _torchvision(filter_, antialias=False),
        ),
        Way(
            "half-pixel",
            "bilinear of 4 neighbours, half-pixel centres",
            "resize",
            _bilinear(aligned=False),
        ),
        Way(
            "aligned-corners",
            "bilinear of 4 neighbours, aligned corners",
            "resize",
            _bilinear(aligned=True),
        ),
        Way("crop-down", "centre crop whose offset is rounded down", "crop", _crop_rounded_down),
        Way("side-up", f"{side} rounded up before the crop", "crop", _side_rounded_up),
        Way("no-margin", f"{side} resized to the input, no margin", "crop", _no_margin),
        _other_shape(preprocess),
        Way("draft", "JPEG decoded at a reduced size (draft mode)", "decode", _draft),
        Way("bgr", "blue and red swapped (BGR)", "colour", _swapped),
        Way(
            "wrong-mean",
            f"mean and std {_WRONG:g} in place of the network's",
            "normalize",
            lambda photo: photo.own,
            _with_wrong_mean(preprocess),
        ),
    ]


def why_nothing(way: Way, photos: int, fitting: int, preprocess: Preprocess) -> str:
    """Why a way changed no image at all.

    Args:
        way: The way.
        photos: How many images there were.
        fitting: How many had the size already that they are resized to.
        preprocess: The network's own.
    """
    if way.name == f"pillow-{preprocess.interpolation}":
        return "this is the network's own preprocessing"
    if way.kind == "crop" and preprocess.crop_mode == "squash" and preprocess.crop == 1:
        return "nothing is cropped: every image is resized to the input"
    if way.kind == "resize" and fitting == photos:
        return "every image has the network's size already: nothing is resized"
    if way.kind == "decode":
        return "no image is a JPEG of at least twice the size that it is resized to"
    if way.kind == "colour" and preprocess.channels == "gray":
        return "the network takes brightness alone"
    if way.kind == "normalize":
        return "these are the network's own"
    return "it gives the same pixels for every image here"


def _pillow(interpolation: Literal["bicubic", "bilinear"]) -> Callable[[Photo], Pixels]:
    def pixels(photo: Photo) -> Pixels:
        other = dataclasses.replace(photo.preprocess, interpolation=interpolation)
        return other.pixels(photo.image)

    return pixels


def _opencv(interpolation: opencv.Interpolation) -> Callable[[Photo], Pixels]:
    def pixels(photo: Photo) -> Pixels:
        return photo.preprocess.middle(opencv.resize(photo.array, *photo.shape, interpolation))

    return pixels


def _torchvision(interpolation: str, *, antialias: bool) -> Callable[[Photo], Pixels]:
    def pixels(photo: Photo) -> Pixels:
        import torch
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        width, height = photo.shape
        tensor = torch.from_numpy(photo.array).permute(2, 0, 1)
        mode = InterpolationMode(interpolation)
        resized = functional.resize(tensor, [height, width], mode, antialias=antialias)
        return photo.preprocess.middle(resized.permute(1, 2, 0).numpy())

    return pixels


def _bilinear(*, aligned: bool) -> Callable[[Photo], Pixels]:
    def pixels(photo: Photo) -> Pixels:
        import torch

        width, height = photo.shape
        tensor = torch.from_numpy(photo.array).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(
            tensor, (height, width), mode="bilinear", align_corners=aligned
        )
        whole = resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        return photo.preprocess.middle(whole)

    return pixels


def _crop_rounded_down(photo: Photo) -> Pixels:
    return photo.preprocess.middle(_resized(photo, photo.shape), math.floor)


def _side_rounded_up(photo: Photo) -> Pixels:
    preprocess = photo.preprocess
    side = math.ceil(preprocess.size / preprocess.crop)
    return preprocess.middle(_resized(photo, preprocess.resized_shape(photo.image, side)))


def _no_margin(photo: Photo) -> Pixels:
    return dataclasses.replace(photo.preprocess, crop=1.0).pixels(photo.image)


def _other_shape(preprocess: Preprocess) -> Way:
    """The shape that most applications choose: squashed, or else, for who is squashed, as it is."""
    if preprocess.crop_mode != "squash":
        return Way("squash", "both sides resized to the input, no crop", "crop", _squash)
    return Way("keep-shape", "shorter side resized to the input, the rest cut", "crop", _keep_shape)


def _keep_shape(photo: Photo) -> Pixels:
    centred = dataclasses.replace(photo.preprocess, crop=1.0, crop_mode="center")
    return centred.pixels(photo.image)


def _squash(photo: Photo) -> Pixels:
    size = photo.preprocess.size
    return _resized(photo, (size, size))


def _resized(photo: Photo, shape: tuple[int, int]) -> Pixels:
    """The whole image at another width and height, by the network's own filter."""
    preprocess = photo.preprocess
    image = photo.image.convert("L") if preprocess.channels == "gray" else photo.image
    filter_ = Image.Resampling[preprocess.interpolation.upper()]
    resized = np.array(image.resize(shape, filter_), np.uint8)
    return resized.reshape(shape[1], shape[0], preprocess.depth)


def _draft(photo: Photo) -> Pixels:
    """What a decoder gives that leaves out frequencies which the result cannot show anyhow."""
    if photo.encoded is None:
        return photo.own
    with Image.open(io.BytesIO(photo.encoded)) as image:
        if image.format != "JPEG":
            return photo.own
        whole = image.size
        image.draft("RGB", photo.shape if _same_way_up(image, photo) else photo.shape[::-1])
        if image.size == whole:
            return photo.own
        return photo.preprocess.pixels(to_rgb(image, photo.preprocess.exif))


def _same_way_up(image: Image.Image, photo: Photo) -> bool:
    return image.size == photo.image.size


def _swapped(photo: Photo) -> Pixels:
    return np.ascontiguousarray(photo.own[:, :, ::-1])


def _with_wrong_mean(preprocess: Preprocess) -> Preprocess | None:
    wrong = (_WRONG,) * preprocess.depth
    return dataclasses.replace(preprocess, mean=wrong, std=wrong)
