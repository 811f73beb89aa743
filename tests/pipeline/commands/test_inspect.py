"""`inspect`, and `predict` and `diff` on models' files, as a user gives them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from PIL import Image

from care.data import open_dataset
from pipeline.cli import main
from pipeline.steps import artifact
from tests.pipeline.conftest import NETWORK

SmallGraph = Callable[..., onnx.ModelProto]

NORMALIZED = ("--mean", "0.5,0.4,0.3", "--std", "0.25,0.5,1", "--crop", "1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_graph: SmallGraph) -> Path:
    """A graph, and photographs; the working directory."""
    onnx.save(small_graph(), tmp_path / "small.onnx")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scale(factor: float, name: str = "other.onnx") -> None:
    """A graph with larger weights in the stem."""
    model = onnx.load("small.onnx")
    weight = model.graph.initializer[0]
    larger = (numpy_helper.to_array(weight) * factor).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(larger, weight.name))
    onnx.save(model, name)


# ------------------------------------------------------------------ inspect


def test_a_graph_is_laid_open(folder: Path) -> None:
    found = told("inspect", "small.onnx", "--images", "photos", *NORMALIZED)
    assert found["inputs"] == ["image: float32 (batch, 3, 8, 8)"]
    assert found["outputs"] == ["logits: float32 (batch, 4)"]
    assert found["operations"]["Conv"] == 3
    assert found["opset"] == "ai.onnx 20"
    assert found["parameters"] == 16 * 27 + 16 + 16 * 9 + 16 * 16 + 4 * 16 + 4
    assert found["images"] == "6 images of photos"
    stem = next(row for row in found["ranges"] if row["tensor"] == "x0")
    assert stem["operation"] == "Conv"
    assert stem["headroom"] == pytest.approx(65504 / stem["largest"])


def test_people_get_tables_and_a_verdict(folder: Path) -> None:
    result = run("inspect", "small.onnx")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "float16 holds every value: least headroom" in said
    assert "on 8 images of seeded noise; give real ones with --images" in said


def test_values_that_leave_float16_are_named(folder: Path) -> None:
    scale(1e6)
    result = run("inspect", "other.onnx", "--images", "photos", *NORMALIZED)
    said = " ".join(result.output.split())
    assert "values leave the range of float16, first at x0 (Conv); on 6 images of photos" in said
    assert "leaves it" in said


def test_a_graph_that_is_no_classifier_of_images_is_still_laid_open(folder: Path) -> None:
    model = onnx.load("small.onnx")
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", 1, ["batch"]))
    onnx.save(model, "two.onnx")
    result = run("inspect", "two.onnx")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "takes mask: float32 (batch)" in said
    assert "no ranges: the graph has 2 inputs (image, mask)" in said


def test_an_operator_that_is_not_known_costs_the_ranges_alone(folder: Path) -> None:
    model = onnx.load("small.onnx")
    model.graph.node.append(onnx.helper.make_node("Bernoulli", ["x6"], ["more"], "random"))
    onnx.save(model, "random.onnx")
    result = run("inspect", "random.onnx")
    assert result.exit_code == 0, result.output
    assert "no ranges: node 'random': operator Bernoulli" in " ".join(result.output.split())


def test_a_package_is_laid_open(folder: Path, foreign_package: Callable[..., Path]) -> None:
    found = told("inspect", foreign_package(image=True), "--images", "photos", "--crop", 1)
    assert found["inputs"] == ["picture: rgb image (3, 8, 8)"]
    assert found["classes"] == 4
    assert found["operations"]["conv"] == 3
    assert any(row["operation"] == "conv" and row["headroom"] > 1 for row in found["ranges"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gone.onnx",), "gone.onnx does not exist: name an ONNX graph (.onnx) or a .mlpackage"),
        (("photos",), "photos is no model's file"),
        (("small.onnx", "--images", "photos"), "state --mean and --std"),
        (("small.onnx", "--images", "none", *NORMALIZED), "none is no folder with images"),
        (("small.onnx", "--mean", "a,b"), "'a,b' are no numbers: write them as 0.485,0.456"),
        (("small.onnx", "--mean", "nan"), "'nan' holds what is not finite"),
        (("text.onnx",), "text.onnx is no ONNX graph"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    Path("text.onnx").write_text("no graph")
    result = run("inspect", *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


# ------------------------------------------------------------------ predict


@pytest.mark.parametrize("first", [True, False])
def test_a_models_file_is_asked(folder: Path, first: bool) -> None:
    Path("labels.txt").write_text("ant\nbee\ncat\ndog\n")
    given = ("small.onnx", "photos") if first else ("photos", "--artifact", "small.onnx")
    result = run("predict", *given, *NORMALIZED, "--labels", "labels.txt", "--json")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.output.splitlines()]
    assert len(answers) == 6
    assert {score["label"] for score in answers[0]["scores"]} == {"ant", "bee", "cat", "dog"}
    assert (answers[0]["artifact"], answers[0]["state"]) == ("small.onnx", "measured")


def test_what_is_stated_is_for_models_files_alone(folder: Path) -> None:
    result = run("predict", "photos", "--artifact", "ort", "--size", 8)
    assert result.exit_code == 2
    assert "a built artifact says itself how images are prepared" in " ".join(result.output.split())


def test_a_models_file_without_images_is_refused(folder: Path) -> None:
    result = run("predict", "small.onnx", *NORMALIZED)
    assert (result.exit_code, "no images" in result.output) == (2, True)


# ------------------------------------------------------------------ diff


def test_a_package_is_compared_with_the_graph(
    folder: Path, foreign_package: Callable[..., Path]
) -> None:
    package = foreign_package(image=True)
    found = told(
        "diff",
        package,
        "--reference",
        "small.onnx",
        "--photos",
        "photos",
        "--images",
        6,
        *NORMALIZED,
    )
    assert (found["images"], found["same_class"], found["finite"]) == (6, 6, True)
    assert found["relative_error"] < 1e-4
    assert (found["layers"], found["jump"]) == ([], None)


def test_two_graphs_are_compared_layer_by_layer(folder: Path) -> None:
    model = onnx.load("small.onnx")
    weight = next(t for t in model.graph.initializer if t.name.startswith("stages.0.blocks.1"))
    spoiled = numpy_helper.to_array(weight).copy()
    spoiled[0] += 3
    weight.CopyFrom(numpy_helper.from_array(spoiled, weight.name))
    onnx.save(model, "other.onnx")
    found = told("diff", "other.onnx", "--reference", "small.onnx", *NORMALIZED)
    assert found["jump"]["module"] == "stages.0.blocks.1.conv"
    assert found["relative_error"] > 0.01
    result = run("diff", "other.onnx", "--reference", "small.onnx", *NORMALIZED)
    assert "the error jumps at stages.0.blocks.1.conv" in result.output
    assert "of 8 have the same class" in result.output
    assert "give real ones with --photos" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("small.onnx",), "give a model's file and, with --reference, what is right"),
        (("--reference", "small.onnx"), "give a model's file and, with --reference, what is right"),
        (("small.onnx", "--reference", "gone.onnx", *NORMALIZED), "gone.onnx does not exist"),
        (
            ("small.onnx", "--reference", "small.onnx", *NORMALIZED, "--photos", "gone"),
            "--photos: gone is no folder with images",
        ),
        (
            ("small.onnx", "--reference", "wide.onnx", *NORMALIZED),
            "takes images of (3, 8, 8) (channels, height, width), wide.onnx of (3, 9, 9)",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    model = onnx.load("small.onnx")
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("image", 1, ["n", 3, 9, 9]))
    onnx.save(model, "wide.onnx")
    result = run("diff", *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


# ------------------------------------------------------------------ engines


def an_engine(folder: Path) -> Path:
    """An artifact as the TensorRT target leaves it, with a file of some bytes."""
    port = {"dtype": "FLOAT", "shape": [-1, 3, 8, 8]}
    facts = {
        "target": "trt",
        "precision": "fp16",
        "network": NETWORK.to_dict(),
        "library": "tensorrt_rtx",
        "library_version": "1.7.1.116",
        "cuda_major": "13",
        "compute_capabilities": ["8.6", "8.9"],
        "batches": {"min": 1, "opt": 8, "max": 64},
        "layers": {"layers": 3, "by_kind": {"CONVOLUTION": 2}},
        "input": {"name": "image", **port},
        "output": {"name": "logits", "dtype": "FLOAT", "shape": [-1, 4]},
    }

    def build(place: Path) -> dict[str, Any]:
        (place / "model.engine").write_bytes(b"vtrt" + bytes(60))
        return facts

    artifact.make(
        folder, kind="build", name="trt/fp16", key="k", made_from={}, tools={}, build=build
    )
    return folder / "model.engine"


def test_an_engine_tells_what_was_written_down(tmp_path: Path) -> None:
    path = an_engine(tmp_path / "trt/fp16")
    plain = told("inspect", path)
    assert (plain["kind"], plain["bytes"]) == ("an engine of TensorRT-RTX", 64)
    assert (plain["precision"], plain["labels"]) == ("fp16", 4)
    assert plain["compute_capabilities"] == ["8.6", "8.9"]
    text = run("inspect", path).output
    assert "takes image: FLOAT (any, 3, 8, 8)" in text
    assert "compute capabilities: 8.6, 8.9" in text
    assert "batches: min 1, opt 8, max 64" in text
    assert "by kind" not in text.partition("layers:")[0]


def test_an_engine_that_nobody_described_is_refused(tmp_path: Path) -> None:
    path = an_engine(tmp_path / "trt/fp16")
    alone = tmp_path / "alone.engine"
    alone.write_bytes(path.read_bytes())
    result = run("inspect", alone)
    assert result.exit_code == 2
    assert "is an engine of TensorRT-RTX, and says nothing of itself" in result.output
    path.write_bytes(b"vtrt" + bytes(59) + b"x")
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "is not the engine that" in result.output
    assert run("inspect", tmp_path / "none.engine").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "alone.engine", "photo.png"),
        ("predict", "photo.png", "--artifact", "alone.engine"),
        ("diff", "alone.engine", "--reference", "small.onnx"),
    ],
)
def test_an_engine_that_nobody_described_answers_nothing(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    shutil.copyfile(an_engine(folder / "trt/fp16"), "alone.engine")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "says nothing of itself" in result.output
    assert "Take the ONNX graph that it was built from" in " ".join(result.output.split())


def test_an_engine_answers_by_its_artifacts_folder(
    begin: Callable[[Path], Path], tmp_path: Path
) -> None:
    """By TensorRT where there is a GPU, else by the executor that stands for it."""
    results = begin(tmp_path / "trial")
    path, photo = results / "trt/fp16/model.engine", tmp_path / "boot.png"
    open_dataset("fashion-mnist", "validation").image(0).save(photo)
    for arguments in ((path, photo), (photo, "--artifact", path)):
        found = json.loads(run("predict", *arguments, "--top", 1, "--json").output)
        assert found["artifact"] == "trt/fp16"
        assert found["scores"][0]["label"] == "Ankle boot"
    found = told("diff", path, "--reference", results / "onnx/model.onnx")
    assert (found["same_class"], found["images"]) == (8, 8)
    assert 0 < found["relative_error"] < 0.01
    refused = run("predict", path, photo, "--mean", "0.5")
    assert refused.exit_code == 2
    assert "says itself how images are prepared" in " ".join(refused.output.split())
