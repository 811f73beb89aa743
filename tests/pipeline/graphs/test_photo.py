"""Preprocessing inside of a graph: within one level of Pillow's, and refused where it is not."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import PIL
import pytest
from onnx import TensorProto, helper
from PIL import Image

from pipeline.core.errors import BuildError
from pipeline.core.preprocess import Preprocess
from pipeline.graphs import photo

OWN = Preprocess(24, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Preprocess(24, 0.9, "bilinear", (0.5,), (0.25,), channels="gray")
SIZES = ((24, 24), (27, 27), (100, 120), (301, 200), (13, 40), (61, 8), (1, 1), (50, 60))


def picture(height: int, width: int, kind: str = "noise") -> npt.NDArray[np.uint8]:
    if kind == "noise":
        rng = np.random.default_rng(height * width)
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    # Stripes of full contrast: a cubic filter overshoots beside them.
    stripes = np.arange(width) // 3 % 2 * 255
    return np.broadcast_to(stripes[None, :, None], (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["noise", "stripes"])
def test_pixels_are_pillows_within_a_level(
    interpolation: Literal["bilinear", "bicubic"], kind: str
) -> None:
    spec = dataclasses.replace(OWN, interpolation=interpolation)
    photos = [picture(height, width, kind) for height, width in SIZES]
    assert photo.difference_to_pillow(spec, photos) <= 1


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.95, 0.71])
def test_every_crop_has_its_offset(crop: float) -> None:
    for size in (24, 25):
        spec = dataclasses.replace(OWN, crop=crop, size=size)
        photos = [picture(height, width) for height, width in ((40, 71), (71, 40), (33, 64))]
        assert photo.difference_to_pillow(spec, photos) <= 1


def test_what_is_tall_is_resized_in_pillows_order() -> None:
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert photo.takes_fewest_rows_first(), "the Pillow of the constraints does"
    tall = [picture(height, width) for height, width in ((119, 31), (90, 40), (80, 27), (61, 8))]
    wide = [picture(width, height) for width, height in ((31, 119), (40, 90), (27, 80))]
    for crop in (1.0, 0.875, 0.71):
        assert photo.difference_to_pillow(dataclasses.replace(OWN, crop=crop), tall + wide) <= 1


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.71])
def test_other_modes_are_pillows(mode: Literal["squash", "border"], crop: float) -> None:
    photos = [picture(height, width) for height, width in SIZES]
    for size in (24, 25):
        spec = dataclasses.replace(OWN, crop=crop, crop_mode=mode, size=size)
        assert photo.difference_to_pillow(spec, photos) <= 1
    gray = dataclasses.replace(GRAY, crop=crop, crop_mode=mode)
    assert photo.difference_to_pillow(gray, photos) <= 1


def test_brightness_is_pillows() -> None:
    photos = [picture(height, width) for height, width in SIZES]
    assert photo.difference_to_pillow(GRAY, photos) <= 1
    same = dataclasses.replace(GRAY, crop=1.0)
    assert photo.difference_to_pillow(same, [picture(24, 24)]) == 0, "nothing is resized"


def test_what_has_the_size_stays_as_it_is() -> None:
    spec = dataclasses.replace(OWN, crop=1.0)
    assert photo.difference_to_pillow(spec, [picture(24, 24), picture(24, 60)]) == 0


def network(batch: str | int = "batch", opset: int = 20, channels: int = 3) -> onnx.ModelProto:
    """Means of channels as logits."""
    shape = [batch, channels, 24, 24]
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, channels])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, {"labels": "[1]"})
    return model


def run(model: onnx.ModelProto, given: npt.NDArray[Any]) -> npt.NDArray[Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (taken,) = session.get_inputs()
    logits: npt.NDArray[Any] = session.run(None, {taken.name: given})[0]
    return logits


@pytest.mark.parametrize("spec", [OWN, GRAY, dataclasses.replace(OWN, crop_mode="border")])
def test_a_photograph_gives_the_logits_of_its_prepared_image(spec: Preprocess) -> None:
    model = network(channels=spec.depth)
    before = model.SerializeToString()
    made = photo.with_photo_input(model, spec)
    assert model.SerializeToString() == before
    onnx.checker.check_model(made, full_check=True)
    assert [value.name for value in made.graph.input] == [photo.PHOTO]
    assert {entry.key: entry.value for entry in made.metadata_props} == {"labels": "[1]"}
    for height, width in ((24, 24), (90, 61)):
        shown = picture(height, width)
        expected = run(model, spec(Image.fromarray(shown))[None])
        found = run(made, shown)
        assert found.shape == expected.shape == (1, spec.depth)
        np.testing.assert_allclose(found, expected, atol=0.6 / 255 / min(spec.std))


def test_images_of_the_size_give_the_very_same_numbers() -> None:
    spec = dataclasses.replace(OWN, crop=1.0)
    shown = picture(24, 24)
    expected = run(network(), spec(Image.fromarray(shown))[None])
    assert (run(photo.with_photo_input(network(), spec), shown) == expected).all()


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (network(batch=4), OWN, "takes 4 images at once, and a photograph comes alone"),
        (network(opset=17), OWN, "antialias since operator set 18, and the graph is of 17"),
        (network(), dataclasses.replace(OWN, interpolation="lanczos"), "interpolation is lanczos"),
    ],
)
def test_what_cannot_be_said_is_refused(
    model: onnx.ModelProto, spec: Preprocess, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        photo.with_photo_input(model, spec)


def test_a_fixed_batch_of_one_is_taken() -> None:
    made = photo.with_photo_input(network(batch=1), OWN)
    assert run(made, picture(30, 40)).shape == (1, 3)


def test_another_arithmetic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photo.require_pillows(OWN)
    monkeypatch.setattr(photo, "_CUBIC_A", -0.75)
    with pytest.raises(BuildError, match="resizes otherwise than Pillow here, by"):
        photo.require_pillows(OWN)
