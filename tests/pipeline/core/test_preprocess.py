from __future__ import annotations

import dataclasses
import io
import struct
import subprocess
import sys
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import care.networks  # noqa: F401  registers our networks with timm
from pipeline.core.errors import DataError, PreprocessError
from pipeline.core.preprocess import Pictures, Preprocess, decode, to_rgb

IMAGENET: dict[str, Any] = {
    "size": 224,
    "crop": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
GRAY = {**IMAGENET, "size": 8, "mean": (0.5,), "std": (0.25,), "channels": "gray"}

SPEC = Preprocess(**{**IMAGENET, "size": 16})


def noise(height: int, width: int, depth: int = 3) -> Image.Image:
    rng = np.random.default_rng([height, width])
    shape = (height, width, depth) if depth > 1 else (height, width)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


def test_pictures_are_pixels_and_what_becomes_of_them() -> None:
    spec = Preprocess(**{**IMAGENET, "size": 8, "crop": 1.0})
    files = [noise(8, 8), noise(8, 9), noise(9, 8)]
    pictures = Pictures(np.stack([spec.pixels(image) for image in files]), spec)
    np.testing.assert_array_equal(pictures.images, np.stack([spec(image) for image in files]))
    assert pictures.images is pictures.images  # normalized once
    assert len(pictures) == 3
    last = pictures[1:]
    np.testing.assert_array_equal(last.pixels, pictures.pixels[1:])
    np.testing.assert_array_equal(last.images, pictures.images[1:])
    assert "images" in vars(pictures[:1].prepared())


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(28, 28), (375, 500), (257, 256), (301, 40), (64, 64)])
def test_equals_timm_to_the_last_bit(
    interpolation: str, crop: float, shape: tuple[int, int]
) -> None:
    spec = Preprocess(**{**IMAGENET, "size": 64, "crop": crop, "interpolation": interpolation})
    reference = create_transform(
        64, interpolation=interpolation, crop_pct=crop, mean=spec.mean, std=spec.std
    )
    image = noise(*shape)
    np.testing.assert_array_equal(spec(image), reference(image).numpy())


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [32, 33])
def test_modes_equal_timm_to_the_last_bit(
    mode: Literal["squash", "border"], crop: float, size: int
) -> None:
    spec = Preprocess(**{**IMAGENET, "size": size, "crop": crop, "crop_mode": mode})
    reference = create_transform(
        (size, size),
        interpolation="bicubic",
        crop_pct=crop,
        crop_mode=mode,
        mean=spec.mean,
        std=spec.std,
    )
    for shape in ((28, 28), (75, 100), (100, 61), (47, 11), (40, 39), (size, size)):
        image = noise(*shape)
        np.testing.assert_array_equal(spec(image), reference(image).numpy())


def test_gray_images_get_a_gray_border() -> None:
    spec = Preprocess(**{**GRAY, "crop": 1.0, "crop_mode": "border", "mean": (0.2,)})
    pixels = spec.pixels(noise(8, 4))
    assert (pixels[:, :2] == 51).all()
    assert (pixels[:, 6:] == 51).all()
    np.testing.assert_array_equal(pixels[:, 2:6, 0], flat(noise(8, 4).convert("L")))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "HSV", "1", "P"])
def test_equals_timm_for_other_colour_modes(mode: str) -> None:
    spec = Preprocess(**{**IMAGENET, "size": 32})
    reference = create_transform(
        32, interpolation="bicubic", crop_pct=0.875, mean=spec.mean, std=spec.std
    )
    image = noise(50, 40).convert(mode)
    np.testing.assert_array_equal(spec(image), reference(image.convert("RGB")).numpy())


@pytest.mark.parametrize("settings", [IMAGENET, GRAY])
def test_call_is_normalized_pixels(settings: dict[str, Any]) -> None:
    spec = Preprocess(**settings)
    images = [noise(300, 333), noise(40, 90)]
    pixels = np.stack([spec.pixels(image) for image in images])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, spec.size, spec.size, spec.depth)
    batch = spec.normalize(pixels)
    assert batch.dtype == np.float32
    assert batch.flags["C_CONTIGUOUS"]
    for image, expected in zip(images, batch, strict=True):
        np.testing.assert_array_equal(spec(image), expected)


def test_gray_is_luma() -> None:
    spec = Preprocess(**{**GRAY, "crop": 1.0})
    image = noise(8, 8)
    expected = (flat(image.convert("L")) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(spec(image), expected[None], atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    upright = noise(24, 16)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(stored, exif=exif), "x.png")
    np.testing.assert_array_equal(flat(decoded), flat(upright))
    np.testing.assert_array_equal(flat(to_rgb(decoded)), flat(upright))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_ignored_where_that_is_asked_for(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(24, 16), kind, exif=exif)
    assert decode(data, "x").size == (24, 16)
    stored = decode(data, "x", "ignore")
    assert stored.size == to_rgb(stored).size == (16, 24)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(flat(stored), flat(image.convert("RGB")))
        spec = dataclasses.replace(SPEC, exif="ignore")
        np.testing.assert_array_equal(spec.pixels(image), SPEC.pixels(stored))
        assert (spec.pixels(image) != SPEC.pixels(image)).any()


def test_a_default_that_came_later_changes_no_digest() -> None:
    """What was recorded before `exif` existed is still equal, and so are the keys made of it."""
    later = ("exif", "crop_mode")
    before = {key: value for key, value in SPEC.to_dict().items() if key not in later}
    assert SPEC.to_dict() == before
    assert Preprocess.from_dict(before) == SPEC
    ignoring = dataclasses.replace(SPEC, exif="ignore")
    assert Preprocess.from_dict(ignoring.to_dict()) == ignoring
    assert ignoring.digest() != SPEC.digest()
    squashed = dataclasses.replace(SPEC, crop_mode="squash")
    assert Preprocess.from_dict(squashed.to_dict()) == squashed
    assert len({squashed.digest(), ignoring.digest(), SPEC.digest()}) == 3
    with pytest.raises(PreprocessError, match="exif is one of apply, ignore"):
        dataclasses.replace(SPEC, exif="maybe")  # type: ignore[arg-type]


def test_unreadable_metadata_leaves_the_image_alone() -> None:
    image = noise(8, 8)
    data = encode(image, exif=b"Exif\0\0this is no TIFF header")
    np.testing.assert_array_equal(flat(decode(data, "x.png")), flat(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.putpixel((1, 0), 1)
        data = encode(image, transparency=0)
    else:
        data = encode(image.convert(mode))
    decoded = decode(data, "x.png")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_is_mixed_with_white() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert to_rgb(image).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 128, 129, 257 * 100, 65535]], dtype=np.uint16)
    decoded = decode(encode(Image.fromarray(values), kind), "x")
    assert flat(decoded)[0, :, 0].tolist() == [0, 0, 1, 100, 255]
    assert decoded.mode == "RGB"


def test_pixels_without_agreed_range_are_refused() -> None:
    with pytest.raises(DataError, match="mode F cannot be used"):
        to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(DataError, match="32-bit"):
        to_rgb(Image.new("I", (4, 4), 70000))
    with pytest.raises(DataError, match=r"^x\.tif: an image of mode F"):
        decode(encode(Image.new("F", (4, 4)), "TIFF"), "x.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_truncated_images_are_named(kind: str) -> None:
    data = encode(noise(64, 64), kind)
    assert decode(data, "whole").size == (64, 64)
    with pytest.raises(DataError, match=r"^cat\.x .*(truncated|corrupt|not an image)"):
        decode(data[: len(data) * 2 // 3], "cat.x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on odd metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_damaged_images_decode_or_are_named(kind: str) -> None:
    whole = encode(noise(16, 16), kind)
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), "x").mode == "RGB"
        except DataError as error:
            messages.append(str(error))
    assert all(message.startswith("x") for message in messages)
    assert messages or kind in ("BMP", "PPM")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x is empty"),
        (b"<html>not found</html>", "x is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x is not an image"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data, "x")


@pytest.mark.parametrize("side", [9_500, 60_000])
def test_decompression_bomb_is_refused(side: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="decompression bomb"):
        decode(bomb, "bomb.png")


def test_elongated_image_is_refused() -> None:
    with pytest.raises(DataError, match="1 x 9000 pixels is too elongated"):
        Preprocess(**IMAGENET).pixels(Image.new("RGB", (1, 9000)))
    with pytest.raises(DataError, match="9000 x 1 pixels is too elongated"):
        Preprocess(**IMAGENET, crop_mode="border").pixels(Image.new("RGB", (9000, 1)))
    squashed = Preprocess(**IMAGENET, crop_mode="squash").pixels(Image.new("RGB", (9000, 1)))
    assert squashed.shape == (224, 224, 3)


def test_dictionary_and_digest() -> None:
    spec = Preprocess(**IMAGENET)
    stored = spec.to_dict()
    assert stored["mean"] == [0.485, 0.456, 0.406]
    assert Preprocess.from_dict(stored) == spec
    assert Preprocess.from_dict(stored).digest() == spec.digest()
    assert len(spec.digest()) == 64
    for change in ({"size": 256}, {"crop": 0.9}, {"interpolation": "bilinear"}, {"std": (1, 1, 1)}):
        assert dataclasses.replace(spec, **change).digest() != spec.digest()
    whole = dataclasses.replace(spec, crop=1)
    assert whole.digest() == dataclasses.replace(spec, crop=1.0).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size is a positive number"),
        ({"size": 224.0}, "size is a positive number"),
        ({"size": True}, "size is a positive number"),
        ({"crop": 0}, "crop is a share"),
        ({"crop": 1.1}, "crop is a share"),
        ({"crop": float("nan")}, "crop is a share"),
        ({"interpolation": "cubic"}, "interpolation is one of nearest"),
        ({"channels": "bgr"}, "channels is one of rgb"),
        ({"mean": (0.5,)}, "mean has 1 values, but rgb"),
        ({"mean": "abc"}, "mean is a list"),
        ({"mean": (0, 0, "x")}, "mean is a list"),
        ({"std": (0, 1, 1)}, "std is positive"),
        ({"std": (float("inf"), 1, 1)}, "std is a list of finite"),
    ],
)
def test_senseless_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PreprocessError, match=message):
        Preprocess(**{**IMAGENET, **change})


def test_from_dict_is_strict() -> None:
    stored = Preprocess(**IMAGENET).to_dict()
    with pytest.raises(PreprocessError, match="unknown colour"):
        Preprocess.from_dict({**stored, "colour": "rgb"})
    del stored["crop"]
    with pytest.raises(PreprocessError, match="lacks crop"):
        Preprocess.from_dict(stored)
    not_a_mapping: Any = ["size", 224]
    with pytest.raises(PreprocessError, match="mapping"):
        Preprocess.from_dict(not_a_mapping)


def test_from_model_reads_what_timm_knows() -> None:
    model = timm.create_model("care_tiny")
    spec = Preprocess.from_model(model)
    assert (spec.size, spec.channels, spec.depth) == (64, "rgb", 3)
    reference = create_transform(**timm.data.resolve_data_config(model=model))
    image = noise(90, 70)
    np.testing.assert_array_equal(spec(image), reference(image).numpy())
    assert Preprocess.from_model(model, size=96).size == 96


def test_from_model_refuses_what_it_cannot_express() -> None:
    with pytest.raises(PreprocessError, match="Linear states no preprocessing"):
        Preprocess.from_model(torch.nn.Linear(1, 1))
    model: Any = torch.nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3}
    with pytest.raises(PreprocessError, match="does not state crop_pct, interpolation, std: give"):
        Preprocess.from_model(model)
    stated = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for change, message in (
        ({"input_size": (3, 224, 192)}, "square"),
        ({"input_size": (4, 224, 224)}, "1 or 3 channels"),
        ({"input_size": (3, 224, 224), "crop_mode": "stretch"}, "crop_mode is one of center, sq"),
    ):
        model.pretrained_cfg = {**stated, **change}
        with pytest.raises(PreprocessError, match=message):
            Preprocess.from_model(model)


def refusal(stated: dict[str, Any]) -> str:
    """Why what a model states is refused; "" where it is taken as it is."""
    model: Any = torch.nn.Identity()
    model.pretrained_cfg = stated
    try:
        spec = Preprocess.from_model(model)
    except PreprocessError as error:
        return str(error)
    assert stated["crop_mode"] == spec.crop_mode
    assert stated["input_size"][1:] == (spec.size, spec.size)
    return ""


def test_each_configuration_of_timm_is_taken_or_refused_with_what_to_do() -> None:
    stated = {name: timm.get_pretrained_cfg(name).to_dict() for name in timm.list_pretrained()}
    told = {name: refusal(values) for name, values in stated.items()}
    refused = {name: why for name, why in told.items() if why}
    lost = [name for name, why in refused.items() if "state preprocess" not in why]
    assert lost == []
    assert any("crop is a share in (0, 1], not 1.15" in why for why in refused.values())
    sizes = {name: values["input_size"] for name, values in stated.items()}
    oblong = [name for name, (_, rows, columns) in sizes.items() if rows != columns]
    assert all("only square inputs" in refused[name] for name in oblong)
    # None of those is a network that classifies images.
    assert not [name for name in oblong if stated[name]["num_classes"]]
    assert len(refused) < 0.02 * len(stated)


def test_normalize_refuses_other_layouts() -> None:
    spec = Preprocess(**IMAGENET)
    with pytest.raises(PreprocessError, match="uint8"):
        spec.normalize(np.zeros((1, 3, 8, 8), dtype=np.uint8))
    wrong: Any = np.zeros((1, 8, 8, 3), dtype=np.float32)
    with pytest.raises(PreprocessError, match="float32"):
        spec.normalize(wrong)


def test_images_need_no_deep_learning_framework() -> None:
    modules = "pipeline.core.preprocess, care.data, care.imagenet, care.cost"
    program = f"import sys, {modules}; print({{'torch', 'timm', 'torchvision'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("field", ["size", "crop", "interpolation", "mean", "std", "channels"])
@pytest.mark.parametrize("value", [10**400, "x" * 10_000, list(range(1000)), {"a": "x" * 10_000}])
def test_values_of_anybody_are_refused_in_a_short_line(field: str, value: object) -> None:
    values = {
        "size": 32,
        "crop": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5],
        "std": [0.5],
        "channels": "rgb",
        field: value,
    }
    with pytest.raises(PreprocessError) as caught:
        Preprocess.from_dict(values)
    assert len(str(caught.value)) < 400
    with pytest.raises(PreprocessError) as caught:
        Preprocess.from_dict({**values, "x" * 5000: 1})
    assert len(str(caught.value)) < 400


def test_a_specification_needs_no_pillow() -> None:
    program = "import sys, pipeline.core.preprocess; print('PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
