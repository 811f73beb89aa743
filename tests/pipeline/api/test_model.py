from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.core.errors import ArtifactError, DataError, InputError, UnavailableError
from pipeline.core.figures import State
from pipeline.core.network import Batch, Logits
from pipeline.core.runner import Runner
from pipeline.targets.ort.target import OrtTarget


@pytest.fixture
def model(results: pipeline.Results) -> pipeline.Model:
    return results.model("ort/fp32")


def test_a_prediction_is_the_softmax_of_the_logits(
    model: pipeline.Model, photos: list[Path]
) -> None:
    prediction = model.predict(photos[0], top=3)
    logits = model(model.preprocess(photos[0]))[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert prediction.best.label == "Ankle boot"
    assert [score.index for score in prediction.scores] == np.argsort(-logits)[:3].tolist()
    np.testing.assert_allclose(
        [score.probability for score in prediction.scores], np.sort(shares)[::-1][:3], rtol=1e-6
    )
    assert [model.labels[score.index] for score in prediction.scores] == [
        score.label for score in prediction.scores
    ]
    np.testing.assert_array_equal(prediction.logits, logits.astype(np.float32))
    assert prediction.milliseconds is not None
    assert prediction.image == str(photos[0])


def test_files_and_images_give_the_same(model: pipeline.Model, photos: list[Path]) -> None:
    with Image.open(photos[1]) as image:
        given = model.predict(image)
    assert given.image == ""
    np.testing.assert_array_equal(given.logits, model.predict(photos[1]).logits)


def test_there_are_no_more_classes_than_the_network_has(
    model: pipeline.Model, photos: list[Path]
) -> None:
    assert len(model.predict(photos[0], top=99).scores) == len(model.labels) == 10
    with pytest.raises(InputError, match="at least 1, not 0"):
        model.predict(photos[0], top=0)


def test_any_number_of_images_is_taken(model: pipeline.Model) -> None:
    images = np.random.default_rng(0).standard_normal((37, 3, 64, 64)).astype(np.float32)
    logits = model(images)
    assert logits.shape == (37, 10)
    np.testing.assert_allclose(model(images[30:31])[0], logits[30], rtol=1e-3, atol=1e-4)
    assert model(images[:0]).shape == (0, 10)


def test_pixels_and_preprocessed_images_give_the_same(
    model: pipeline.Model, photos: list[Path]
) -> None:
    pixels = model.pixels(photos[0])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(model(pixels), model(model.preprocess(photos[0])))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 64, 64)),
        np.zeros((1, 1, 64, 64), np.float32),
        np.zeros((3, 64, 64), np.float32),
        np.zeros((1, 64, 64, 3), np.float32),
        np.zeros((1, 3, 64, 64), np.uint8),
    ],
)
def test_other_arrays_are_refused(model: pipeline.Model, images: np.ndarray) -> None:
    with pytest.raises(
        InputError,
        match=r"takes uint8 of shape .*64, 64, 3\) or float32 of shape \(images, 3, 64, 64\)",
    ):
        model(images)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, InputError, "does not exist"),
        (b"", DataError, "is empty"),
        (b"no image", DataError, "is not an image"),
    ],
)
def test_what_is_no_image_is_refused(
    model: pipeline.Model,
    content: bytes | None,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=message):
        model.predict(path)
    with pytest.raises(InputError, match="is no file"):
        model.predict(tmp_path)


def test_an_executor_answers_where_the_runtime_is_missing(
    results: pipeline.Results, photos: list[Path]
) -> None:
    with results.model("trt/fp16") as model:
        if model.state is State.MEASURED:
            pytest.skip("this machine runs the engine")
        prediction = model.predict(photos[0])
    assert model.state is State.EMULATED
    assert "GPU" in model.why
    assert prediction.milliseconds is None
    assert prediction.best.label == "Ankle boot"


def test_emulation_takes_the_graph_that_the_artifact_was_built_from(
    results: pipeline.Results, tmp_path: Path
) -> None:
    folder = tmp_path / "trial"
    shutil.copytree(results.folder, folder)
    form = folder / "precision" / "float16"
    manifest = json.loads((form / "artifact.json").read_text())
    manifest["files"]["model.onnx"]["sha256"] = "0" * 64
    (form / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"float16/artifact.json is damaged"):
        pipeline.load(folder / "trt" / "fp16")
    shutil.rmtree(form)
    with pytest.raises(UnavailableError, match="does not lie in"):
        pipeline.load(folder / "trt" / "fp16")


def test_an_artifact_needs_nothing_but_its_folder_where_its_runtime_is(
    results: pipeline.Results, photos: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(results.folder / "ort" / "fp32", tmp_path / "alone")
    with pipeline.load(tmp_path / "alone") as model:
        assert model.predict(photos[0]).best.label == "Ankle boot"


def test_a_damaged_artifact_is_not_opened(results: pipeline.Results, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(results.folder / "ort" / "fp32", folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="has changed"):
        pipeline.load(folder)


def test_what_is_no_built_model_is_refused(results: pipeline.Results, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no built model but export"):
        pipeline.load(results.folder / "export")
    with pytest.raises(ArtifactError, match="nothing was built there"):
        pipeline.load(tmp_path)


def test_what_can_neither_run_nor_be_emulated_is_unavailable(
    results: pipeline.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtTarget, "missing", lambda self, artifact: "no runtime today")
    with pytest.raises(UnavailableError, match="no runtime today; nor be emulated"):
        results.model("ort/fp32")


def test_values_that_are_not_finite_are_no_prediction(
    model: pipeline.Model, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_runner", Broken())
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        model.predict(photos[0])


class Broken(Runner):
    device = "a broken one"

    def __call__(self, images: Batch) -> Logits:
        return np.full((len(images), 10), np.nan, np.float32)
