"""`repair`, as a user gives it: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto, helper, numpy_helper
from PIL import Image

from pipeline.cli import main
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.graphs import float16
from pipeline.steps.artifact import Artifact
from pipeline.steps.facts.graphs import FormFacts
from pipeline.targets.ort import quantize
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.target import TrtTarget

Make = Callable[..., ModelProto]


def network(make_model: Make, gain: float = 4096.0, classes: int = 4) -> ModelProto:
    """A convolution, two products that take values up and down again, and a head."""
    rng = np.random.default_rng(5)
    constants = {
        "w": (rng.standard_normal((3, 3, 1, 1)) / 2).astype(np.float32),
        "up": np.float32(gain),
        "down": np.float32(1 / gain),
        "wh": rng.standard_normal((3, classes)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["x"], "/stem/Conv"),
        helper.make_node("Mul", ["x", "up"], ["x1"], "/loud/Mul"),
        helper.make_node("Mul", ["x1", "up"], ["x2"], "/loud/Mul2"),
        helper.make_node("Mul", ["x2", "down"], ["x3"], "/loud/Mul3"),
        helper.make_node("Mul", ["x3", "down"], ["x4"], "/loud/Mul4"),
        helper.make_node("GlobalAveragePool", ["x4"], ["x5"], "/head/Pool"),
        helper.make_node("Flatten", ["x5"], ["x6"], "/head/Flatten"),
        helper.make_node("MatMul", ["x6", "wh"], ["logits"], "/head/fc/MatMul"),
    ]
    return make_model(nodes, constants, ["batch", 3, 8, 8], ["batch", classes])


@pytest.fixture
def folder(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a graph that float16 breaks."""
    onnx.save(network(make_model), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    stated = ["repair", "model.onnx", "--output", "made.onnx", *arguments]
    return CliRunner().invoke(main, stated)


def refused(result: Result, code: int, told: str) -> None:
    """One line on the error stream, and nothing written."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert not Path("made.onnx").exists()


def test_noise_is_enough_to_mend_a_graph(folder: Path) -> None:
    result = call("--noise", "4")
    assert result.exit_code == 0, result.stderr
    *_, last = result.stdout.splitlines()
    told = json.loads(last)
    assert [part["part"] for part in told["repair"]["raised"]] == ["loud"]
    assert told["verified"]["images"] == told["repair"]["images"] == 4
    assert told["verified"]["headroom"] > 4
    for words in (
        "model.onnx in fp16; images: seeded noise",
        "the network itself leaves the range of float16",
        "before: no finite answer, least headroom 0.00",
        "1 of 4 parts raised above float16 (1 in float32; 0.00% of the products)",
        "verified on 4 other images: error ",
        "wrote made.onnx",
    ):
        assert words in result.stdout
    images = np.random.default_rng(9).standard_normal((5, 3, 8, 8)).astype(np.float32)
    exact = OnnxExecutor(folder / "model.onnx").run(images)
    mended = OnnxExecutor(folder / "made.onnx").run(images)
    assert np.linalg.norm(mended - exact) < 5e-3 * np.linalg.norm(exact)


def test_json_alone_and_float32_alone(folder: Path) -> None:
    result = call("--noise", "2", "--no-bfloat16", "--json")
    told = json.loads(result.stdout)
    assert [part["type"] for part in told["repair"]["raised"]] == ["float32"]
    assert result.stdout.count("\n") == 1


@pytest.fixture
def wide(folder: Path, make_model: Make) -> None:
    """A sound graph in its place."""
    # fp8 takes layers of 16 channels and more alone.
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 3, 1, 1)).astype(np.float32),
        "v": (rng.standard_normal((16, 16, 1, 1)) / 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["x"], "/stem/Conv"),
        helper.make_node("Conv", ["x", "v"], ["y"], "/body/Conv"),
        helper.make_node("GlobalAveragePool", ["y"], ["z"], "/head/Pool"),
        helper.make_node("Flatten", ["z"], ["logits"], "/head/Flatten"),
    ]
    onnx.save(make_model(nodes, weights, ["batch", 3, 8, 8], ["batch", 16]), folder / "model.onnx")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_other_precisions(folder: Path, precision: str) -> None:
    result = call("--noise", "8", "--precision", precision, "--max-top1-drop", "0.5")
    assert result.exit_code == 0, result.stderr
    above = "bfloat16" if precision == "bf16" else "float16"
    assert f"nothing had to be raised above {above}" in result.stdout
    kinds = {node.op_type for node in onnx.load(folder / "made.onnx").graph.node}
    assert ("QuantizeLinear" in kinds) == (precision in ("int8", "fp8"))


@pytest.mark.usefixtures("wide")
def test_eight_bits_of_onnx_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(quantize, "MARGIN", 1.0)
    options = ("--noise", "8", "--precision", "int8", "--target", "ort")
    result = call(*options, "--max-top1-drop", "1")
    assert result.exit_code == 0, result.stderr
    assert "nothing had to be raised above int8" in result.stdout
    assert "now: error 0.0" in result.stdout
    # Unsigned activations: ONNX Runtime's, not TensorRT's.
    types = {t.data_type for t in onnx.load("made.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in types


def test_a_folder_of_images_is_prepared_as_the_graph_states(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "photos" / "cats").mkdir(parents=True)
    for i in range(6):
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / "cats" / f"{i}.png")
    result = call("--images", "photos", "--limit", "5")
    assert result.exit_code == 0, result.stderr
    assert "with ImageNet's mean and spread, since the graph states nothing" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["verified"]["images"] == 2
    model = onnx.load(folder / "model.onnx")
    spec = {
        "size": 8,
        "crop": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [1.0] * 3,
    }
    helper.set_model_props(model, {"preprocess": json.dumps({**spec, "channels": "rgb"})})
    onnx.save(model, folder / "model.onnx")
    (folder / "made.onnx").unlink()
    result = call("--images", "photos")
    assert "images: as the graph states" in result.stdout
    # The graph takes others than it says.
    spec["size"] = 16
    helper.set_model_props(model, {"preprocess": json.dumps({**spec, "channels": "rgb"})})
    onnx.save(model, folder / "model.onnx")
    (folder / "made.onnx").unlink()
    refused(
        call("--images", "photos"), 2, "states images of 16 pixels and 3 channels, and takes 3 x 8"
    )


def test_the_smallest_part_that_fails_is_written_in_place_of_a_mended_graph(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrtTarget, "refusal", lambda *_: None)
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.standard_normal((3, 3, 8, 8)).astype(np.float32))
    result = call("--reduce", "--images", "images.npy")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("wrote made.onnx\nwrote made.npz\n")
    assert [node.output[0] for node in onnx.load("made.onnx").graph.node] == ["x2"]


@pytest.mark.parametrize(
    "arguments", [("--headroom", "5"), ("--noise", "2"), ("--no-bfloat16",), ("--json",)]
)
def test_options_that_mend_are_refused_where_nothing_is_mended(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    result = call("--reduce", *arguments)
    assert result.exit_code == 2
    assert f"--reduce mends nothing, and takes no {arguments[0]}" in result.stderr
    assert not Path("made.onnx").exists()


def test_an_array_of_images(folder: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    np.save("images.npy", images)
    result = call("--images", "images.npy")
    assert result.exit_code == 0, result.stderr
    assert "images: as in the array" in result.stdout
    # A single image chooses and verifies.
    np.save("images.npy", images[:1])
    Path("made.onnx").unlink()
    assert call("--images", "images.npy").exit_code == 0


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((2, 3, 9, 9), np.float32), "holds float32 (2, 3, 9, 9), and the graph takes"),
        (np.zeros((2, 3, 8, 8)), "holds float64 (2, 3, 8, 8), and the graph takes float32"),
        (np.zeros((0, 3, 8, 8), np.float32), "holds float32 (0, 3, 8, 8)"),
        (np.full((2, 3, 8, 8), np.nan, np.float32), "holds values that are not finite"),
    ],
)
def test_images_of_another_size_are_refused(folder: Path, array: np.ndarray, told: str) -> None:
    np.save("images.npy", array)
    refused(call("--images", "images.npy"), 2, told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give images with --images, or their number with --noise: one of the two"),
        (("--noise", "2", "--images", "x"), "one of the two"),
        (("--images", "nowhere"), "nowhere is no folder with images, and no .npy file"),
        (("--images", "broken.npy"), "broken.npy is no array that can be read"),
        (("--noise", "2", "--size", "9"), "--size 9: the graph takes images of 8 x 8 pixels"),
        (("--noise", "2", "--headroom", "0"), "headroom lies between 1 and"),
        (("--noise", "2", "--max-share", "2"), "max_share lies between 0 and 1, not at 2"),
        (("--noise", "2", "--precision", "int8", "--max-error", "1"), "judged by accuracy: use"),
        (("--noise", "2", "--precision", "fp8", "--no-bfloat16"), "is for fp16 and int8, not"),
        (("--noise", "2", "--precision", "fp4"), "'fp4' is not one of"),
        (("--noise", "2", "--target", "ort"), "compute in float32 and int8; give --precision int8"),
        (("--noise", "2", "--target", "coreml"), "no repaired form of an ONNX graph; give trt or"),
        (("--noise", "2", "--reference", "gone.onnx"), "cannot read the graph gone.onnx"),
    ],
)
def test_options_that_make_no_sense(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    Path("broken.npy").write_bytes(b"no array")
    refused(call(*arguments), 2, told)


def test_what_is_there_stays(folder: Path) -> None:
    Path("made.onnx").write_text("precious")
    result = call("--noise", "2")
    assert result.exit_code == 2
    assert "--output: made.onnx is there already: name a new file" in result.stderr
    assert Path("made.onnx").read_text() == "precious"
    result = CliRunner().invoke(
        main, ["repair", "model.onnx", "--output", "no/made.onnx", "--noise", "2"]
    )
    assert "there is no folder no: make it first" in result.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("text", "cannot read the graph model.onnx"),
        ("gone", "cannot read the graph model.onnx"),
        ("nan", "model.onnx: the weight 'w' holds 3 values that are not a number"),
        ("quantized", "model.onnx: the graph is quantized already"),
        ("half", "model.onnx: the graph is not float32"),
        ("flat", "has 2 axes: repair takes images"),
        ("open", "leaves the size of its images open: state it with --size"),
        ("two", "the graph has 2 inputs and 1 outputs"),
        ("infinite", "gives no finite answer in float32, first at stem: Initializer w"),
    ],
)
def test_graphs_that_are_none_to_repair(
    folder: Path, make_model: Make, change: str, told: str
) -> None:
    model = network(make_model)
    sides = model.graph.input[0].type.tensor_type.shape.dim
    if change == "quantized":
        model.graph.node[0].op_type = "QuantizeLinear"
    elif change == "half":
        model, _ = float16.to_half(model, float16.FLOAT16)
    elif change == "flat":
        del sides[2:]
    elif change == "open":
        sides[2].dim_param, sides[3].dim_param = "height", "width"
    elif change == "two":
        model.graph.input.append(model.graph.input[0])
        model.graph.input[1].name = "other"
    elif change in ("nan", "infinite"):
        weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
        weight[0] = np.nan if change == "nan" else np.inf
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    Path("model.onnx").write_bytes(model.SerializeToString())
    if change == "text":
        Path("model.onnx").write_text("no graph")
    if change == "gone":
        Path("model.onnx").unlink()
    refused(call("--noise", "2"), 2, told)


def test_a_size_that_the_graph_leaves_open_can_be_stated(folder: Path, make_model: Make) -> None:
    model = network(make_model)
    sides = model.graph.input[0].type.tensor_type.shape.dim
    sides[2].dim_param, sides[3].dim_param = "height", "width"
    onnx.save(model, folder / "model.onnx")
    assert call("--noise", "2", "--size", "12").exit_code == 0


def test_a_reference_of_another_network_is_refused(folder: Path, make_model: Make) -> None:
    onnx.save(network(make_model, gain=2048.0), "same.onnx")
    assert call("--noise", "2", "--reference", "same.onnx").exit_code == 0
    Path("made.onnx").unlink()
    other = network(make_model)
    weight = numpy_helper.to_array(other.graph.initializer[0])[::-1]
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.copy(), "w"))
    onnx.save(other, "other.onnx")
    refused(
        call("--noise", "2", "--reference", "other.onnx"),
        2,
        "--reference: other.onnx is another network: in float32 its logits differ by",
    )
    onnx.save(network(make_model, classes=7), "other.onnx")
    refused(
        call("--noise", "2", "--reference", "other.onnx"),
        2,
        "it has 7 classes, and the graph has 4",
    )


def test_where_nothing_holds_it_says_how_near_it_came(folder: Path) -> None:
    result = call("--noise", "4", "--max-error", "1e-9")
    refused(result, 1, "cannot repair model.onnx in float16: the network itself leaves the range")
    assert "no choice of parts holds the budget (headroom 4, error 1e-09" in result.stderr
    assert "of the products, error " in result.stderr


def test_a_repair_that_does_not_hold_on_other_images_is_not_written(
    folder: Path, make_model: Make
) -> None:
    onnx.save(network(make_model, gain=64.0), folder / "model.onnx")
    images = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    images[1::2] *= 100
    np.save("images.npy", images)
    result = call("--images", "images.npy")
    refused(result, 1, "the repair holds on the 4 images that chose it, but not on 4 others: ")
    assert "least headroom 0." in result.stderr


NETS = """
import torch
from torch import nn


class Loud(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = scale

    def forward(self, x):
        y = torch.relu(self.conv(x) * self.scale) * self.scale
        return x + y / self.scale / self.scale


def make():
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 10)
    blocks = nn.Sequential(Loud(1.0), Loud(4096.0), Loud(1.0), Loud(1.0))
    return nn.Sequential(stem, nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""
RUN = """
name: trial
model: {module: "my_loud:make", checkpoint: own}
data: {validation: fashion-mnist, calibration: fashion-mnist}
preprocess: {size: 32, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
calibration: {images: 16}
targets:
  trt: {precisions: [fp16], repair: true, compute_capabilities: ["8.9"]}
validation: {images: 20}
bench: {samples: 3, warmup: 1, max_seconds: 2}
"""


@pytest.mark.slow
@pytest.mark.skipif(api.installed(api.RTX) is None, reason="needs TensorRT-RTX")
def test_a_run_builds_what_it_repaired_and_reports_it(own_modules: Path) -> None:
    (own_modules / "my_loud.py").write_text(NETS)
    (own_modules / "pipeline.yaml").write_text(RUN)
    result = CliRunner().invoke(main, ["run"])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "trt/fp16 was repaired: " in told
    assert "parts raised above float16 (" in told
    form = Artifact.read(own_modules / "engines/trial/precision/float16-repaired")
    facts = FormFacts.from_facts(form.facts, "the form")
    assert facts.repair is not None
    assert {part.part.rpartition(".")[0] or part.part for part in facts.repair.raised} <= {
        "2.1",
        "2",
    }
    assert "trt/fp16 was repaired" in (own_modules / "engines/trial/report.html").read_text()
    assert "trt/fp16 was repaired" in (own_modules / "engines/trial/report.md").read_text()
    again = CliRunner().invoke(main, ["run", "--dry-run"])
    assert "build trt/fp16 up to date" in " ".join(again.output.split())
    (own_modules / "pipeline.yaml").write_text(RUN.replace("true", "false"))
    plain = " ".join(CliRunner().invoke(main, ["run", "--dry-run"]).output.split())
    assert "precision precision/float16 not built yet" in plain
    assert "float16-repaired" not in plain
    assert "build trt/fp16 may run: made from precision/float16, which runs" in plain
