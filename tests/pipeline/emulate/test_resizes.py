"""Ways in which applications prepare images: each departs from the network's own in one thing."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.preprocess import Preprocess, decode
from pipeline.emulate import opencv
from pipeline.emulate.resizes import Photo, Way, ways, why_nothing

OWN = Preprocess(32, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Preprocess(32, 0.875, "bilinear", (0.5,), (0.25,), channels="gray")


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with a fine grid on them, so that filters differ."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // width, y * 255 // height, ((x // 2 + y // 2) % 2) * 255]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8))


def photo(width: int = 150, height: int = 101, own: Preprocess = OWN) -> Photo:
    return Photo(picture(width, height), None, own)


def as_file(image: Image.Image, kind: str, own: Preprocess = OWN, turned: int = 1) -> Photo:
    exif = Image.Exif()
    exif[0x0112] = turned
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif)
    data = stream.getvalue()
    return Photo(decode(data, "photo"), data, own)


def way(name: str, own: Preprocess = OWN) -> Way:
    return next(each for each in ways(own) if each.name == name)


def test_every_way_gives_the_networks_shape_and_something_else() -> None:
    shown = as_file(picture(300, 196), "JPEG")
    for each in ways(OWN):
        pixels = each.pixels(shown)
        assert pixels.shape == (32, 32, 3), each.name
        assert pixels.dtype == np.uint8, each.name
        own = each.name in ("pillow-bicubic", "wrong-mean")
        assert (pixels == shown.own).all() == own, each.name
    names = [each.name for each in ways(OWN)]
    assert len(set(names)) == len(names) == 16


def test_squashing_networks_are_compared_with_squashed_images() -> None:
    own = dataclasses.replace(OWN, crop_mode="squash")
    shown = as_file(picture(300, 196), "JPEG", own)
    for each in ways(own):
        if each.name != "crop-down":  # both margins are even
            same = each.name in ("pillow-bicubic", "wrong-mean")
            assert (each.pixels(shown) == shown.own).all() == same, each.name
    assert (way("no-margin", own).pixels(shown) == way("squash").pixels(shown)).all()
    centred = dataclasses.replace(OWN, crop=1.0)
    assert (way("keep-shape", own).pixels(shown) == centred.pixels(shown.image)).all()
    assert way("side-up", own).title.startswith("both sides")
    whole = dataclasses.replace(own, crop=1.0)
    assert "nothing is cropped" in why_nothing(way("crop-down", whole), 5, 0, whole)


def test_bordered_networks_have_their_border_in_every_way() -> None:
    own = dataclasses.replace(OWN, crop=1.0, crop_mode="border")
    shown = as_file(picture(300, 196), "JPEG", own)
    border = shown.own[:3]
    assert (border == own.fill).all()
    for each in ways(own):
        if each.name not in ("squash", "bgr"):
            assert (each.pixels(shown)[:3] == border).all(), each.name


def test_gray_networks_have_all_ways_too() -> None:
    shown = as_file(picture(300, 202), "JPEG", GRAY)
    for each in ways(GRAY):
        assert each.pixels(shown).shape == (32, 32, 1), each.name
    assert (way("bgr", GRAY).pixels(shown) == shown.own).all()
    assert (way("pillow-bilinear", GRAY).pixels(shown) == shown.own).all()


def test_filters_resize_to_the_same_shape_and_crop_the_same_middle() -> None:
    shown = photo()
    width, height = shown.shape
    assert (width, height) == (53, 36)
    whole = opencv.resize(shown.array, width, height, "area")
    # Offsets of 10.5 and 2: halves go to the even number, as timm has it.
    assert (way("opencv-area").pixels(shown) == whole[2:34, 10:42]).all()


def test_rounding_of_the_crop_moves_it_by_a_pixel() -> None:
    # 33 x 36 of 32: an offset of 0.5 is rounded to 0 by both, one of 1.5 to 2 or down to 1.
    own = dataclasses.replace(OWN, crop=32 / 35.0)
    shown = Photo(picture(105, 105), None, own)
    assert shown.shape == (35, 35)
    resized = np.array(shown.image.resize((35, 35), Image.Resampling.BICUBIC))
    assert (shown.own == resized[2:34, 2:34]).all()
    assert (way("crop-down", own).pixels(shown) == resized[1:33, 1:33]).all()


def test_geometries_are_what_they_say() -> None:
    shown, bicubic = photo(), Image.Resampling.BICUBIC
    squashed = np.array(shown.image.resize((32, 32), bicubic))
    assert (way("squash").pixels(shown) == squashed).all()
    bare = np.array(shown.image.resize((47, 32), bicubic))[:, 8:40]
    assert (way("no-margin").pixels(shown) == bare).all()
    up = np.array(shown.image.resize((54, 37), bicubic))[2:34, 11:43]
    assert (way("side-up").pixels(shown) == up).all()


def test_aligned_corners_keep_the_corners_and_half_pixels_do_not() -> None:
    own = dataclasses.replace(OWN, size=9, crop=1.0)
    shown = Photo(picture(64, 64), None, own)
    aligned = way("aligned-corners", own).pixels(shown)
    assert (aligned[0, 0] == shown.array[0, 0]).all()
    assert (aligned[-1, -1] == shown.array[-1, -1]).all()
    half = way("half-pixel", own).pixels(shown)
    assert (half != aligned).mean() > 0.5
    linear = torch.nn.functional.interpolate(
        torch.from_numpy(shown.array).permute(2, 0, 1)[None].float(), (9, 9), mode="bilinear"
    )
    assert np.abs(half - linear[0].permute(1, 2, 0).numpy()).max() <= 0.5


def test_antialias_is_pillows_filter_within_a_level_and_without_it_is_not() -> None:
    shown = photo()
    distance = np.abs(way("tensor-antialias").pixels(shown).astype(int) - shown.own)
    assert distance.max() <= 1
    distance = np.abs(way("tensor").pixels(shown).astype(int) - shown.own)
    assert distance.max() > 20


def test_colours_are_swapped() -> None:
    shown = photo()
    assert (way("bgr").pixels(shown)[:, :, 0] == shown.own[:, :, 2]).all()


def test_a_wrong_mean_is_for_the_normalization_alone() -> None:
    wrong = way("wrong-mean")
    assert wrong.normalized == dataclasses.replace(OWN, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert all(each.normalized is None for each in ways(OWN) if each.name != "wrong-mean")


@pytest.mark.parametrize("turned", [1, 6])
def test_draft_reduces_large_jpegs_upright_too(turned: int) -> None:
    # So long that the wrong way round nothing would be reduced.
    shown = as_file(picture(640, 160), "JPEG", turned=turned)
    reduced = way("draft").pixels(shown)
    distance = np.abs(reduced.astype(int) - shown.own)
    assert distance.max() > 0
    assert distance.mean() < 25, "it is the same picture, upright"


@pytest.mark.parametrize(
    "shown", [photo(), as_file(picture(640, 480), "PNG"), as_file(picture(60, 50), "JPEG")]
)
def test_draft_leaves_alone_what_is_no_large_jpeg(shown: Photo) -> None:
    assert (way("draft").pixels(shown) == shown.own).all()


def test_reasons_say_why_nothing_changed() -> None:
    assert "own preprocessing" in why_nothing(way("pillow-bicubic"), 5, 0, OWN)
    assert "size already" in why_nothing(way("opencv-linear"), 5, 5, OWN)
    assert "same pixels" in why_nothing(way("opencv-linear"), 5, 4, OWN)
    assert "JPEG" in why_nothing(way("draft"), 5, 5, OWN)
    assert "brightness" in why_nothing(way("bgr", GRAY), 5, 0, GRAY)
    assert "same pixels" in why_nothing(way("bgr"), 5, 0, OWN)


def test_an_image_of_the_size_is_changed_by_no_filter() -> None:
    own = dataclasses.replace(OWN, crop=1.0)
    shown = Photo(picture(32, 32), None, own)
    assert shown.fits
    for each in ways(own):
        if each.kind in ("resize", "crop"):
            assert (each.pixels(shown) == shown.own).all(), each.name
    assert not photo().fits
