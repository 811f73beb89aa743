"""OpenCV's resize in numpy, against pixels that OpenCV gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pytest

from pipeline.core.network import Pixels
from pipeline.emulate import opencv

SHAPES = {"odd": (13, 17), "even": (12, 8)}

# What cv2.resize (4.14.0 and 5.0.0 alike) made of the images, by image, width, height and filter.
GIVEN: dict[str, str] = json.loads(
    (Path(__file__).parents[2] / "data/opencv_resized.json").read_text()
)


def images() -> dict[str, Pixels]:
    rng = np.random.default_rng(11)
    return {name: rng.integers(0, 256, shape, dtype=np.uint8) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("case", GIVEN)
def test_pixels_are_opencvs(case: str) -> None:
    name, *shape, filter_ = case.split("-")
    width, height = map(int, shape)
    given = np.frombuffer(bytes.fromhex(GIVEN[case]), np.uint8).reshape(height, width)
    interpolation = cast(opencv.Interpolation, filter_)
    found = opencv.resize(images()[name][:, :, None], width, height, interpolation)
    assert found.shape == (height, width, 1)
    assert found.dtype == np.uint8
    distance = np.abs(found[:, :, 0].astype(int) - given)
    # Vectorized sums of OpenCV's cubic filter round otherwise; all else is the same.
    assert distance.max() <= 1
    assert (distance > 0).mean() < (0.1 if interpolation == "cubic" else 0.02)


def test_channels_do_not_mix() -> None:
    colours = np.stack([images()["odd"], 255 - images()["odd"], images()["odd"] // 2], 2)
    for interpolation in get_args(opencv.Interpolation):
        whole = opencv.resize(colours, 9, 6, interpolation)
        for channel in range(3):
            alone = opencv.resize(colours[:, :, channel : channel + 1], 9, 6, interpolation)
            assert (whole[:, :, channel] == alone[:, :, 0]).all()


def test_an_image_of_the_size_stays_as_it_is() -> None:
    image = images()["odd"][:, :, None]
    for interpolation in get_args(opencv.Interpolation):
        assert (opencv.resize(image, 17, 13, interpolation) == image).all()
