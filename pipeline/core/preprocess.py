"""From an image file to the network's input: one specification, used by everything.

    data = Path("cat.jpg").read_bytes()
    spec = Preprocess.from_model(model)      # or Preprocess(size=224, crop=0.875, …)
    batch = spec(decode(data, "cat.jpg"))    # float32 (3, 224, 224)

A batch of `Pictures` holds both forms of images, pixels and normalized: some runtimes take the one,
some the other, and nobody has to undo a normalization.

What is decided here, once:

- **Orientation.** An EXIF (or XMP) orientation is applied, so that a phone's photograph is seen as
  people see it. timm and torchvision ignore it; images without such a tag come out as theirs do.
  `exif: ignore` does as they do: published checkpoints were trained and judged so.
- **Transparency** is composited over white: colours under fully transparent pixels are arbitrary,
  and dropping the alpha channel would show them to the network.
- **16-bit gray** is scaled to 8 bits (65535 becomes 255); Pillow's own conversion clips at 255.
- **CMYK, palette, gray, YCbCr, HSV** are converted by Pillow, as timm and torchvision do.
  Floating-point images have no agreed range and are refused.

Everything else equals `timm.data.create_transform(…, is_training=False)` to the last bit. Only
numpy and Pillow are needed, Pillow only where there are images: a configuration is read without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import struct
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import DataError, PreprocessError
from pipeline.core.network import Images, Pixels
from pipeline.core.words import shown

if TYPE_CHECKING:
    from PIL import Image

Channels = Literal["rgb", "gray"]
CropMode = Literal["center", "squash", "border"]
Exif = Literal["apply", "ignore"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

GRAPH_FILTERS: tuple[Interpolation, ...] = ("bilinear", "bicubic")
"""Filters that an ONNX graph can resize by, as Pillow does."""

# Formats that Pillow decodes by itself; others (EPS, PDF, …) would start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Above this an image is taken for a decompression bomb: a quarter GiB as RGB, Pillow's threshold.
MAX_PIXELS = 89_478_485

_SMALLEST_CROP = 1e-4
_SMALLEST_STD = 1e-6

_ORIENTATION_TAG = 0x0112
_TAGGED = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
"""Where Pillow looks for the tag. It turns TIFF files by itself (`tag_v2`), for timm too."""
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def decode(data: bytes, name: str, exif: Exif = "apply") -> Image.Image:
    """Decode an image file's bytes to an RGB image.

    Args:
        data: The encoded file.
        name: What to call the file in an error message.
        exif: Whether an orientation tag turns the image.

    Returns:
        An image of mode "RGB", fully loaded, without an orientation tag.

    Raises:
        DataError: `data` is empty, no image, truncated, corrupt or a decompression bomb.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError(f"{name} is empty (0 bytes): replace or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            image.load()
            return to_rgb(image, exif)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name} unpacks to more than {MAX_PIXELS / 1e6:.0f} million pixels, as a "
            f"decompression bomb does ({error}): scale it down or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name} is not an image (expected one of {', '.join(FORMATS)}): replace or remove it"
        ) from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    # Broken files surface as any of these, by format (SyntaxError: PNG, struct.error: TIFF).
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise DataError(
            f"{name} is a truncated or corrupt image ({error}): replace or remove it"
        ) from error


def to_rgb(image: Image.Image, exif: Exif = "apply") -> Image.Image:
    """Turn an image of any mode into an opaque RGB image (see the module's decisions).

    Args:
        image: Of any mode.
        exif: Whether an orientation tag turns it.

    Raises:
        DataError: The pixel format has no agreed meaning as colours, such as floating point.
    """
    from PIL import Image

    upright = _orient(image) if exif == "apply" else _without_tag(image)
    if upright.mode == "RGB":
        return upright
    if upright.mode.startswith("I"):
        return _to_eight_bits(upright).convert("RGB")
    try:
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        if upright.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        return upright.convert("RGB")
    except ValueError as error:
        raise DataError(
            f"an image of mode {image.mode} cannot be used ({error}): save it as 8-bit RGB"
        ) from error


def _orient(image: Image.Image) -> Image.Image:
    """Apply the orientation tag; the result carries no tag, so that it is never applied twice."""
    from PIL import Image

    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, OSError, struct.error, TypeError):
        # Metadata that cannot be read states no orientation; the pixels are unharmed.
        return image
    if method is None:
        return image
    upright = image.transpose(Image.Transpose[method])
    transparency = image.info.get("transparency")  # a palette's transparent entry lives here
    upright.info = {} if transparency is None else {"transparency": transparency}
    return upright


def _without_tag(image: Image.Image) -> Image.Image:
    """The image as it is stored, without the tag that would turn it later."""
    if not image.info.keys() & _TAGGED and not hasattr(image, "tag_v2"):
        return image
    bare = image.copy()
    transparency = image.info.get("transparency")
    bare.info = {} if transparency is None else {"transparency": transparency}
    return bare


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a gray image of mode I;16 (or I, as older Pillow reads 16-bit PNG) to 8 bits."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError(
            "32-bit pixels outside 0 … 65535 have no agreed range: save the image with 8 or 16 bits"
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input: a value that can be compared, stored and hashed.

    Attributes:
        size: Height and width of the input in pixels.
        crop: Share of the resized shorter side that the centre crop keeps, in (0, 1]: the shorter
            side is resized to floor(size / crop) pixels, as timm does; see `crop_mode`.
        interpolation: Pillow's resampling filter, antialiased.
        mean: Per-channel mean, for pixels scaled to 0 … 1.
        std: Per-channel standard deviation, for pixels scaled to 0 … 1.
        channels: "rgb", or "gray" (ITU-R 601 luma) for a network with one input channel.
        exif: Whether an orientation tag turns an image. The default is left out of `to_dict`, so
            that what was recorded before this field existed means, and hashes to, the same.
        crop_mode: What is resized to floor(size / crop) pixels, as timm names it: "center", the
            shorter side; "squash", both sides, whatever the shape; "border", the longer side, with
            the mean colour around what is left. Its default is left out of `to_dict`, too.

    Raises:
        PreprocessError: A value makes no sense.
    """

    size: int
    crop: float
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Channels = "rgb"
    exif: Exif = "apply"
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if problem := problem_with(field.name, getattr(self, field.name)):
                raise PreprocessError(f"{field.name} {problem}")
        # Canonical types, so that equal values have equal digests (1 and 1.0, list and tuple).
        object.__setattr__(self, "crop", float(self.crop))
        object.__setattr__(self, "mean", self._per_channel("mean", self.mean))
        object.__setattr__(self, "std", self._per_channel("std", self.std))
        if self.resized**2 > MAX_PIXELS:
            raise PreprocessError(
                f"size {self.size} with crop {self.crop:g} resizes images to {self.resized} pixels "
                f"a side, more than the {math.isqrt(MAX_PIXELS)} that can be"
            )

    def _per_channel(self, field: str, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) != self.depth:
            raise PreprocessError(
                f"{field} has {len(values)} values, but {self.channels} images have {self.depth} "
                "channel(s)"
            )
        return tuple(float(v) for v in values)

    @property
    def depth(self) -> int:
        """Number of channels: 3 for rgb, 1 for gray."""
        return 3 if self.channels == "rgb" else 1

    @property
    def resized(self) -> int:
        """Length in pixels of the side that `crop_mode` names after the resize, before the crop."""
        return math.floor(self.size / self.crop)

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean colour in 0 … 255, by channel: what is around an image in "border"."""
        return tuple(round(255 * mean) for mean in self.mean)

    @classmethod
    def from_model(cls, model: object, size: int | None = None) -> Preprocess:
        """Read what a timm model states about itself (`pretrained_cfg`, `default_cfg`).

        Args:
            model: A model made by `timm.create_model`.
            size: Input size to use in place of the stated one.

        Raises:
            PreprocessError: The model states no preprocessing, or one that cannot be expressed.
        """
        stated = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        if not stated:
            raise PreprocessError(
                f"{type(model).__name__} states no preprocessing: give size, crop, interpolation, "
                "mean and std"
            )
        needed = ("input_size", "crop_pct", "interpolation", "mean", "std")
        if missing := [key for key in needed if key not in stated]:
            raise PreprocessError(
                f"{type(model).__name__} does not state {', '.join(missing)}: give size, crop, "
                "interpolation, mean and std"
            )
        depth, height, width = stated["input_size"]
        if height != width and size is None:
            raise PreprocessError(
                f"only square inputs are supported, the model states {height} x {width}: take a "
                "network of square images, or state preprocess, if it takes such, too"
            )
        if depth not in (1, 3):
            raise PreprocessError(f"images have 1 or 3 channels, the model states {depth}")
        try:
            return cls(
                size=height if size is None else size,
                crop=stated["crop_pct"],
                interpolation=stated["interpolation"],
                mean=tuple(stated["mean"]),
                std=tuple(stated["std"]),
                channels="rgb" if depth == 3 else "gray",
                crop_mode=stated.get("crop_mode") or "center",
            )
        except PreprocessError as error:
            raise PreprocessError(
                f"of what {type(model).__name__} states, {error}: state preprocess in its place"
            ) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; strict: every field once (defaults may lack), nothing else.

        Raises:
            PreprocessError: A field is missing, unknown or makes no sense.
        """
        if not isinstance(values, Mapping):
            raise PreprocessError(
                f"preprocessing is a mapping of fields, not {shown(repr(values))}"
            )
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in fields if name not in values and name not in LATER]
        unknown = [str(name) for name in values if name not in fields]
        if missing or unknown:
            problem = (
                f"lacks {', '.join(missing)}"
                if missing
                else f"has unknown {shown(', '.join(unknown))}"
            )
            raise PreprocessError(f"preprocessing {problem}: its fields are {', '.join(fields)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, with JSON's types; what came later only where it is not the default."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        for name, default in LATER.items():
            if values[name] == default:
                del values[name]
        return values

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the canonical JSON form; equal values have equal digests."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """The network's input for one image: float32 of shape (depth, size, size)."""
        normalized: Images = self.normalize(self.pixels(image)[None])[0]
        return normalized

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The image resized and cropped, not yet normalized: what a Core ML image input receives.

        Returns:
            uint8 of shape (size, size, depth).

        Raises:
            DataError: The image cannot be used, or is too elongated to be resized within bounds.
        """
        from PIL import Image

        image = to_rgb(image, self.exif)
        if self.channels == "gray":
            image = image.convert("L")
        width, height = self.resized_shape(image)
        # timm and torchvision leave an image alone that has the right size already; so does Pillow.
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        return self.middle(np.asarray(image, np.uint8).reshape(height, width, self.depth))

    def middle(self, resized: Pixels, round_: Callable[[float], int] = round) -> Pixels:
        """The middle of a resized image; where that is smaller, in the middle of the mean colour.

        Args:
            resized: uint8 of shape (height, width, depth).
            round_: How the offset of a crop is rounded; to the next even number, as torchvision
                does.

        Returns:
            uint8 of shape (size, size, depth), a copy.
        """
        top, left = (self._offset(side, round_) for side in resized.shape[:2])
        shown_ = resized[max(top, 0) : top + self.size, max(left, 0) : left + self.size]
        if min(resized.shape[:2]) >= self.size:
            return np.array(shown_)
        whole = np.empty((self.size, self.size, self.depth), np.uint8)
        whole[:] = self.fill
        height, width = shown_.shape[:2]
        down, across = max(-top, 0), max(-left, 0)
        whole[down : down + height, across : across + width] = shown_
        return whole

    def _offset(self, side: int, round_: Callable[[float], int]) -> int:
        """Where the middle begins; negative where something is put before the image."""
        if side < self.size:
            return -((self.size - side) // 2)
        return round_((side - self.size) / 2)

    def resized_shape(self, image: Image.Image, resized: int | None = None) -> tuple[int, int]:
        """Width and height after the resize, before the crop.

        In "center" the longer side is rounded down, as torchvision does; in "border" the shorter
        one is rounded, as timm does.

        Args:
            image: The image.
            resized: Length in place of `Preprocess.resized`.

        Raises:
            DataError: The image is empty, or too elongated to be resized within bounds.
        """
        length = self.resized if resized is None else resized
        short, long = sorted(image.size)
        if not short:
            raise DataError(f"an image of {image.width} x {image.height} pixels is empty")
        if self.crop_mode == "squash":
            return length, length
        if self.crop_mode == "border":
            other = round(short / (long / length))
            shorter_first = other, length
        else:
            other = int(length * long / short)
            shorter_first = length, other
        if not other or length * other > MAX_PIXELS:
            raise DataError(
                f"an image of {image.width} x {image.height} pixels is too elongated to be "
                "resized: crop it first"
            )
        return shorter_first if image.width <= image.height else shorter_first[::-1]

    def normalize(self, batch: Pixels) -> Images:
        """Scale pixels to 0 … 1, subtract the mean, divide by the standard deviation.

        Args:
            batch: uint8 of shape (batch, height, width, depth), as `pixels` makes them.

        Returns:
            float32 of shape (batch, depth, height, width), contiguous.

        Raises:
            PreprocessError: `batch` has another type or shape.
        """
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != self.depth:
            raise PreprocessError(
                f"normalize takes uint8 (batch, height, width, {self.depth}), "
                f"not {batch.dtype} {batch.shape}"
            )
        output = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32)
        # In place and in this order: the same roundings as torchvision's.
        output /= np.float32(255)
        output -= np.array(self.mean, dtype=np.float32)[:, None, None]
        output /= np.array(self.std, dtype=np.float32)[:, None, None]
        return output


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """A batch of images before and after their normalization, for whoever takes which.

    Attributes:
        pixels: uint8 of shape (batch, height, width, channels), as `Preprocess.pixels` makes them.
        preprocess: How they are normalized.
    """

    pixels: Pixels
    preprocess: Preprocess

    @cached_property
    def images(self) -> Images:
        """Normalized when first asked for: float32 of shape (batch, channels, height, width)."""
        return self.preprocess.normalize(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, part: slice) -> Pictures:
        """Some of them, such as `pictures[:8]`."""
        return Pictures(self.pixels[part], self.preprocess)

    def prepared(self) -> Pictures:
        """The same, normalized by now: nobody who times a call waits for it."""
        assert len(self.images) == len(self)
        return self


def problem_with(field: str, value: object) -> str | None:
    """What is wrong with the value of a field of `Preprocess`, by itself; None if nothing is.

    Args:
        field: Name of the field.
        value: Of any type.

    Returns:
        The rest of a sentence that begins with the field's name.
    """
    return _PROBLEMS[field](value)


def _problem_with_size(value: object) -> str | None:
    if not _is_int(value) or value < 1:
        return f"is a positive number of pixels, not {shown(repr(value))}"
    if value**2 > MAX_PIXELS:
        return f"is at most {math.isqrt(MAX_PIXELS)} pixels, not {shown(value)}"
    return None


def _problem_with_crop(value: object) -> str | None:
    # A smaller share would resize images to more pixels than there are.
    if not _is_number(value) or not _SMALLEST_CROP <= value <= 1:
        return f"is a share in (0, 1], not {shown(repr(value))}"
    return None


def _problem_with_mean(value: object) -> str | None:
    return _problem_with_values(value, lambda v: v >= 0, "0 or more in every channel")


def _problem_with_std(value: object) -> str | None:
    return _problem_with_values(value, lambda v: v >= _SMALLEST_STD, "positive in every channel")


def _problem_with_values(values: object, fits: Callable[[float], bool], needed: str) -> str | None:
    if not isinstance(values, list | tuple) or not all(_is_number(v) for v in values):
        return f"is a list of finite numbers, not {shown(repr(values))}"
    if not all(map(fits, values)):
        return f"is {needed}, not {shown(list(values))}"
    if values and max(values) > 1:
        return (
            f"{shown(list(values))} is for pixels of 0 … 255, and here they are scaled to 0 … 1: "
            "divide it by 255"
        )
    return None


def _problem_with_choice(choices: tuple[str, ...]) -> Callable[[object], str | None]:
    def problem(value: object) -> str | None:
        if value in choices:
            return None
        return f"is one of {', '.join(choices)}, not {shown(repr(value))}"

    return problem


_PROBLEMS: dict[str, Callable[[object], str | None]] = {
    "size": _problem_with_size,
    "crop": _problem_with_crop,
    "interpolation": _problem_with_choice(get_args(Interpolation)),
    "mean": _problem_with_mean,
    "std": _problem_with_std,
    "channels": _problem_with_choice(get_args(Channels)),
    "exif": _problem_with_choice(get_args(Exif)),
    "crop_mode": _problem_with_choice(get_args(CropMode)),
}

LATER = {"exif": "apply", "crop_mode": "center"}
"""Fields that came later, with their defaults."""


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
