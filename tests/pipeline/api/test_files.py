"""Models' files of whomever: asked by what they say, and by what the user says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from pipeline.api.files import NormalizesItselfError, Stated, is_model_file, open_file
from pipeline.core.errors import ArtifactError, InputError, PipelineError
from pipeline.core.figures import State
from pipeline.emulate.onnx.executor import OnnxExecutor

SmallGraph = Callable[..., onnx.ModelProto]

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)
FULL = Stated(mean=MEAN, std=STD, crop=1.0)


@pytest.fixture
def graph(small_graph: SmallGraph, tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    onnx.save(small_graph(), path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def normalized(photo: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(photo), np.float32) / 255
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))
    images: np.ndarray = ((pixels - mean) / std).transpose(2, 0, 1)[None]
    return images


def test_a_graph_answers_by_what_is_stated(graph: Path, photo: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\ndog\n")
    expected = OnnxExecutor(graph).run(normalized(photo))[0]
    stated = Stated(labels=str(labels), mean=MEAN, std=STD, crop=1.0)
    with open_file(graph, stated, threads=1) as model:
        found = model.predict(photo)
    assert np.abs(found.logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert found.best.label == ("ant", "bee", "cat", "dog")[int(expected.argmax())]
    assert (model.name, model.state) == ("small.onnx", State.MEASURED)


def test_a_graph_in_half_precision_or_integers_is_asked_all_the_same(
    graph: Path, photo: Path
) -> None:
    model = onnx.load(graph)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        *model.graph.node,
    ]
    nodes[2].input[0] = "d"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(helper.make_tensor("scale", 1, [], [0.05]))
    onnx.save(model, graph)
    with open_file(graph, FULL) as opened:
        assert opened.predict(photo).logits.shape == (4,)


def test_classes_without_names_are_numbers(graph: Path) -> None:
    assert open_file(graph, FULL).labels == ("0", "1", "2", "3")


def test_a_graph_of_this_project_says_everything_itself(graph: Path) -> None:
    model = onnx.load(graph)
    said = {
        "size": 8,
        "crop": 0.5,
        "interpolation": "bilinear",
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "channels": "rgb",
    }
    helper.set_model_props(
        model, {"labels": '["a", "b", "c", "d"]', "preprocess": json.dumps(said)}
    )
    onnx.save(model, graph)
    opened = open_file(graph, Stated())
    assert opened.labels == ("a", "b", "c", "d")
    assert {key: opened.network.preprocess[key] for key in said} == {
        **said,
        "mean": opened.network.preprocess["mean"],
        "std": opened.network.preprocess["std"],
    }
    assert tuple(opened.network.preprocess["mean"]) == (0.1, 0.1, 0.1)
    other = open_file(graph, Stated(crop=1.0, mean=(0.5,), std=(0.5,)))
    assert (other.network.preprocess["crop"], tuple(other.network.preprocess["mean"])) == (
        1.0,
        (0.5, 0.5, 0.5),
    )


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (Stated(), "does not say how pixels are normalized: state --mean and --std"),
        (Stated(mean=MEAN), "does not say how pixels are normalized"),
        (Stated(mean=(0.5, 0.5), std=STD), "--mean has 2 values, and images 3 channels"),
        (Stated(mean=MEAN, std=STD, size=9), "--size 9: it takes images of 8 pixels"),
        (Stated(mean=MEAN, std=STD, labels="gone.txt"), "--labels: gone.txt is no file"),
        (
            Stated(mean=MEAN, std=STD, labels="imagenet-1k"),
            "gives 4 logits, and there are 1000 labels",
        ),
    ],
)
def test_what_a_graph_does_not_say_has_to_be_stated(
    graph: Path, stated: Stated, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        open_file(graph, stated)


def test_an_open_size_has_to_be_stated(graph: Path) -> None:
    model = onnx.load(graph)
    value = helper.make_tensor_value_info("image", 1, ["n", 3, "h", "w"])
    model.graph.input[0].CopyFrom(value)
    onnx.save(model, graph)
    with pytest.raises(InputError, match="size of its images is left open: state it with --siz"):
        open_file(graph, FULL)
    stated = Stated(mean=MEAN, std=STD, size=8)
    assert open_file(graph, stated).network.input_shape == (3, 8, 8)


def test_images_that_are_not_square_are_refused(graph: Path) -> None:
    model = onnx.load(graph)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", 1, ["n", 3, 8, 9]))
    onnx.save(model, graph)
    with pytest.raises(InputError, match="images of 8 x 9 pixels, and only squares are made"):
        open_file(graph, FULL)


@pytest.mark.parametrize("name", ["gone.onnx", "gone.mlpackage", "notes.txt"])
def test_what_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(InputError, match=r"name an ONNX graph \(\.onnx\) or a \.mlpackage"):
        open_file(tmp_path / name, FULL)


@pytest.mark.parametrize("name", ["empty.onnx", "empty.mlpackage"])
def test_what_is_damaged_is_refused(tmp_path: Path, name: str) -> None:
    if name.endswith("onnx"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(PipelineError, match="empty"):
        open_file(tmp_path / name, FULL)


def test_a_graph_that_does_not_run_is_an_error(graph: Path) -> None:
    model = onnx.load(graph)
    shape = next(t for t in model.graph.initializer if t.name == "shape")
    shape.CopyFrom(helper.make_tensor("shape", 7, [2], [2, 16]))
    onnx.save(model, graph)
    with pytest.raises(ArtifactError, match=r"small\.onnx does not run: "):
        open_file(graph, FULL)


def test_files_are_known_by_their_endings() -> None:
    assert is_model_file("a/b.ONNX")
    assert is_model_file(Path("b.mlpackage"))
    assert not is_model_file("ort/fp32")


# ------------------------------------------------------------------ Core ML


def test_a_package_of_images_normalizes_them_itself(
    foreign_package: Callable[..., Path], graph: Path, photo: Path
) -> None:
    package = foreign_package(image=True)
    with open_file(package, Stated(crop=1.0)) as model, open_file(graph, FULL) as right:
        found, expected = model.predict(photo), right.predict(photo)
    assert model.labels == ("ant", "bee", "cat", "dog")
    assert (model.state, model.why) == (
        State.EMULATED,
        "the ML Program executor answers for Core ML",
    )
    difference = np.abs(found.logits - expected.logits).max()
    assert difference < 1e-4 * np.abs(expected.logits).max()
    with pytest.raises(NormalizesItselfError, match="leave out --mean and --std"):
        open_file(package, FULL)


def test_a_package_of_arrays_gets_normalized_images(
    foreign_package: Callable[..., Path], graph: Path, photo: Path
) -> None:
    package = foreign_package(image=False)
    with open_file(package, FULL) as model, open_file(graph, FULL) as right:
        found, expected = model.predict(photo), right.predict(photo)
    assert model.labels == ("0", "1", "2", "3")
    difference: Any = np.abs(found.logits - expected.logits).max()
    assert difference < 1e-4 * np.abs(expected.logits).max()
