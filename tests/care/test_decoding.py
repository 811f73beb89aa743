from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from care import decoding
from care.decoding import DecodeAndCrop
from pipeline.core.errors import DataError

WHOLE = DecodeAndCrop(48, (1, 1), (1, 1), ("bicubic",), "apply")


def encoded(kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [encoded("JPEG"), encoded("PNG")], ids=["JPEG", "PNG"])
def test_pixels_are_pillows(data: bytes) -> None:
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(WHOLE(data, "x")), np.asarray(expected))


def test_crops_differ_and_are_resized_as_pillow_does_but_for_one_level() -> None:
    data = encoded("JPEG", quality=95)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = DecodeAndCrop(32, (0.3, 0.9), (0.75, 1.33), ("bilinear",), "apply")
    seen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        top, left, height, width = crop.part(48, 48)
        torch.manual_seed(seed)
        found = np.asarray(crop(data, "x")).astype(int)
        box = (left, top, left + width, top + height)
        expected = np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(found - expected).max() <= 1
        seen.add(box)
    assert len(seen) == 5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_torchvisions_crop(interpolation: str) -> None:
    data = encoded("JPEG", quality=95)
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    whole = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
    crop = DecodeAndCrop(32, (0.3, 0.9), (0.75, 1.33), (interpolation,), "apply")
    for seed in range(5):
        torch.manual_seed(seed)
        part = crop.part(48, 48)
        mode = InterpolationMode(interpolation)
        expected = functional.resized_crop(whole, *part, [32, 32], mode, antialias=True)
        torch.manual_seed(seed)
        found = np.asarray(crop(data, "x"))
        assert np.array_equal(found, expected.permute(1, 2, 0).numpy())


def test_parts_have_the_shares_and_ratios_that_were_asked_for() -> None:
    crop = DecodeAndCrop(32, (0.25, 0.5), (0.5, 2), ("bilinear",), "apply")
    for _ in range(200):
        top, left, height, width = crop.part(375, 500)
        assert 0 <= top <= 375 - height
        assert 0 <= left <= 500 - width
        assert 0.24 < height * width / (375 * 500) < 0.51
        assert 0.49 < width / height < 2.02
    assert crop.part(2, 1000) == (0, 498, 2, 4)  # none fits: as much of the middle as may be


def test_the_orientation_is_followed_or_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded("JPEG", exif=exif)
    ignoring = DecodeAndCrop(48, (1, 1), (1, 1), ("bicubic",), "ignore")
    upright, stored = np.asarray(WHOLE(data, "x")), np.asarray(ignoring(data, "x"))
    assert np.array_equal(upright, stored[::-1, ::-1])
    assert not np.array_equal(upright, stored)


def test_what_cannot_be_decoded_is_named_by_pillow() -> None:
    with pytest.raises(DataError, match=r"x\.JPEG is a truncated or corrupt image"):
        WHOLE(encoded("JPEG")[:300], "x.JPEG")


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"comment": b"x" * 300}, {"exif": b"Exif\0\0" + bytes(9)}],
)
def test_jpegs_need_no_pillow(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode", lambda *arguments: pytest.fail("Pillow was asked"))
    assert WHOLE(encoded("JPEG", **options), "x").size == (48, 48)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_what_unpacks_to_gigabytes_is_refused_unopened(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *arguments: pytest.fail("it was opened"))
    sides = (48).to_bytes(2, "big") * 2
    bomb = encoded("JPEG", **options).replace(sides, b"\xea\x60\xea\x60", 1)
    with pytest.raises(DataError, match="unpacks to more than 89 million pixels"):
        WHOLE(bomb, "bomb.jpg")
