"""`reduce`: a large graph that fails goes in, a small one comes out, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.cli import main
from pipeline.core.errors import UnavailableError
from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.graphs import float16
from pipeline.targets.tensorrt.target import TrtTarget

ROOT = Path(__file__).parents[3]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reduce", *map(str, arguments)], catch_exceptions=False)


def network(scale: float = 1.0) -> onnx.ModelProto:
    """A small classifier; with a scale of 3e4 its second layer overflows float16."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int, by: float = 1.0) -> TensorProto:
        values = by * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "stem.weight"], ["x0"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["x0"], ["x1"], "relu"),
        helper.make_node("Conv", ["x1", "wide.weight"], ["x2"], "wide"),
        helper.make_node("Conv", ["x2", "slim.weight"], ["x3"], "slim"),
        helper.make_node("GlobalAveragePool", ["x3"], ["x4"], "pool"),
        helper.make_node("Flatten", ["x4"], ["x5"], "flat"),
        helper.make_node("Gemm", ["x5", "head.weight"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [
            weight("stem.weight", 8, 3, 3, 3),
            weight("wide.weight", 8, 8, 1, 1, by=scale),
            weight("slim.weight", 8, 8, 1, 1, by=1 / scale),
            weight("head.weight", 4, 8),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.onnx"
    onnx.save(network(), path)
    return path


@pytest.fixture
def overflows(tmp_path: Path) -> Path:
    path = tmp_path / "overflows.onnx"
    onnx.save(network(3e4), path)
    return path


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Lets a builder die of graphs that hold a node of a name; of none for None."""

    def install(name: str | None) -> None:
        def refusal(self: TrtTarget, graph: Path, precision: str, log: object) -> str | None:
            model = onnx.load(graph)
            onnx.checker.check_model(model, full_check=True)
            if any(node.name == name for node in model.graph.node):
                return f"CHECK(0) failed in {graph}"
            return None

        monkeypatch.setattr(TrtTarget, "refusal", refusal)

    return install


def test_the_node_of_which_a_builder_dies(
    sound: Path, tmp_path: Path, refuses: Callable[[str | None], None]
) -> None:
    refuses("pool")
    output = tmp_path / "small.onnx"
    result = invoke(sound, "--output", output)
    assert result.exit_code == 0, result.output
    assert "CHECK(0) failed in small.onnx" in result.stdout
    assert "1 nodes fail" in result.stdout
    assert "try 1: 9 nodes with 1 inputs fail" in result.stderr
    model = onnx.load(output)
    assert [node.name for node in model.graph.node] == ["pool"]
    with np.load(output.with_suffix(".npz")) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {"x3": (1, 8, 8, 8)}
        GraphExecutor(model).evaluate(dict(arrays))


def test_a_builder_that_dies_of_a_dynamic_batch_alone(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(self: TrtTarget, graph: Path, precision: str, log: object) -> str | None:
        model = onnx.load(graph)
        onnx.checker.check_model(model, full_check=True)
        ports = [port.type.tensor_type.shape.dim[0].dim_param for port in model.graph.input]
        pools = any(node.name == "pool" for node in model.graph.node)
        return f"CHECK(0) failed in {graph}" if pools and ports == ["batch"] else None

    monkeypatch.setattr(TrtTarget, "refusal", refusal)
    output = tmp_path / "small.onnx"
    result = invoke(sound, "--output", output)
    assert result.exit_code == 0, result.output
    assert "with a dynamic batch: CHECK(0) failed in small.onnx" in result.stderr
    assert [node.name for node in onnx.load(output).graph.node] == ["pool"]
    with np.load(output.with_suffix(".npz")) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {"x3": (1, 8, 8, 8)}


def test_a_layer_that_jumps_is_reduced_where_the_builder_takes_it(
    overflows: Path, tmp_path: Path, refuses: Callable[[str | None], None]
) -> None:
    refuses(None)
    output = tmp_path / "small.onnx"
    result = invoke(overflows, "--output", output)
    assert result.exit_code == 0, result.output
    assert "wide (Conv x2) errs by nan itself" in result.stdout
    model = onnx.load(output)
    assert [node.name for node in model.graph.node] == ["wide"]
    with np.load(output.with_suffix(".npz")) as arrays:
        found = GraphExecutor(model).evaluate({"x1": arrays["x1"]})["x2"]
        assert np.isfinite(arrays["expected/x2"]).all()
        assert not np.isfinite(found).all()


def test_images_decide_where_a_layer_jumps(
    overflows: Path, tmp_path: Path, refuses: Callable[[str | None], None]
) -> None:
    refuses(None)
    np.save(tmp_path / "dark.npy", np.full((3, 3, 8, 8), 1e-3, np.float32))
    result = invoke(overflows, "--images", tmp_path / "dark.npy", "--output", tmp_path / "a.onnx")
    assert result.exit_code == 2
    assert "builds it with a batch of 1, and no layer jumps: there is nothing" in result.output
    assert not (tmp_path / "a.onnx").exists()


def test_a_folder_of_images_is_prepared_as_the_graph_states(
    overflows: Path, tmp_path: Path, refuses: Callable[[str | None], None]
) -> None:
    refuses(None)
    model = onnx.load(overflows)
    spec = {"size": 8, "crop": 1.0, "interpolation": "bilinear", "channels": "rgb"}
    helper.set_model_props(
        model, {"preprocess": json.dumps({**spec, "mean": [0.5] * 3, "std": [1e-3] * 3})}
    )
    onnx.save(model, overflows)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        Image.new("RGB", (12, 10), (128 + 50 * i, 10, 200)).save(photos / f"{i}.png")
    # Values of 0.5 divided by 0.001: the second layer overflows as it does not with ImageNet's.
    output = tmp_path / "small.onnx"
    result = invoke(overflows, "--images", photos, "--output", output)
    assert result.exit_code == 0, result.output
    assert "wide" in [node.name for node in onnx.load(output).graph.node]
    with np.load(output.with_suffix(".npz")) as arrays:
        assert np.abs(arrays["x1"]).max() > 100


def test_a_folder_that_cannot_be_used(sound: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "small.onnx"
    photos.mkdir()
    result = invoke(sound, "--images", photos, "--output", output)
    assert result.exit_code == 2
    assert "photos is no folder with images, and no .npy file" in result.output
    (photos / "broken.png").write_bytes(b"no picture")
    result = invoke(sound, "--images", photos, "--output", output)
    assert result.exit_code == 2
    assert "broken.png" in result.output
    model = onnx.load(sound)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, sound)
    result = invoke(sound, "--images", photos, "--output", output)
    assert result.exit_code == 2
    assert "leaves open what images it takes: prepare them, and give a .npy file" in result.output
    assert not output.exists()


def test_a_graph_that_is_in_half_precision_already(
    overflows: Path, tmp_path: Path, refuses: Callable[[str | None], None]
) -> None:
    refuses(None)
    half, output = tmp_path / "half.onnx", tmp_path / "small.onnx"
    onnx.save(float16.to_half(network(3e4), float16.FLOAT16)[0], half)
    result = invoke(half, "--output", output)
    assert result.exit_code == 2
    assert "no --reference tells where it jumps" in result.output
    result = invoke(half, "--reference", overflows, "--output", output)
    assert result.exit_code == 0, result.output
    assert [node.name for node in onnx.load(output).graph.node] == ["wide"]


def test_where_the_builder_is_missing_layers_are_looked_at(
    overflows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> str:
        raise UnavailableError("tensorrt_rtx is not installed")

    monkeypatch.setattr(TrtTarget, "refusal", missing)
    result = invoke(overflows, "--output", tmp_path / "small.onnx")
    assert result.exit_code == 0, result.output
    assert "not built: tensorrt_rtx is not installed" in result.stderr


def test_a_target_that_builds_no_parts(overflows: Path, tmp_path: Path) -> None:
    result = invoke(
        overflows, "--target", "ort", "--precision", "fp32", "--output", tmp_path / "small.onnx"
    )
    assert result.exit_code == 2, "float32 has room for all of it"
    assert "no layer jumps: there is nothing to reduce" in result.output


def test_nothing_is_overwritten(sound: Path, tmp_path: Path) -> None:
    for name in ("small.onnx", "small.npz"):
        place = tmp_path / name
        place.write_text("precious")
        result = invoke(sound, "--output", tmp_path / "small.onnx")
        assert result.exit_code == 2
        assert f"{name} is there already" in result.output
        assert place.read_text() == "precious"
        place.unlink()


def with_nan() -> bytes:
    model = network()
    value = numpy_helper.to_array(model.graph.initializer[1]).copy()
    value[0, 0] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(value, "wide.weight"))
    return bytes(model.SerializeToString())


def half_with_nan() -> bytes:
    model, _ = float16.to_half(onnx.load_from_string(with_nan()), float16.FLOAT16)
    return bytes(model.SerializeToString())


def with_two_inputs() -> bytes:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return bytes(model.SerializeToString())


def with_batches_of_four() -> bytes:
    model = network()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_nan(), "the constant wide.weight holds NaN"),
        (half_with_nan(), "the constant wide.weight_float16 holds NaN"),
        (with_two_inputs(), "needs a graph with one input and an output; inputs: image, mask"),
        (with_batches_of_four(), "takes batches of 4: give --batch 4"),
        (b"no graph at all", "is no ONNX model or is damaged"),
        (b"", "holds no graph"),
    ],
)
def test_graphs_that_cannot_be_used(content: bytes, said: str, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    result = invoke(model, "--output", tmp_path / "small.onnx")
    assert result.exit_code == 2
    assert said in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "int2"), "trt has no precision 'int2'; it has fp32, tf32, fp16"),
        (("--target", "coreml"), "builds fp16 from the network, not from an ONNX graph"),
        (("--output", "small.txt"), "small.txt is no name of an ONNX graph"),
        (("--reference", "sound.onnx"), "is in float32 itself: leave --reference out"),
        (("--images", "gone.npy"), "gone.npy does not exist"),
        (("--images", "sound.onnx"), "is no .npy file of images"),
        (("--images", "small.npy"), "do not fit the graph's input 'image'"),
        (("--images", "flat.npy"), "holds no images of shape (images, channels, height, width)"),
        (("--images", "bytes.npy"), "images must be finite float32"),
    ],
)
def test_what_does_not_fit(
    arguments: tuple[str, ...],
    said: str,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("small.npy", np.zeros((2, 3, 4, 4), np.float32))
    np.save("flat.npy", np.zeros((2, 48), np.float32))
    np.save("bytes.npy", np.zeros((2, 3, 8, 8), np.uint8))
    before = sorted(path.name for path in tmp_path.iterdir())
    result = invoke(sound, *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "does not exist: name an ONNX graph" in invoke(tmp_path / "gone.onnx").output
    assert "is a folder: name an ONNX graph" in invoke(tmp_path).output


def test_a_reference_of_another_network(tmp_path: Path) -> None:
    other = network()
    for node in other.graph.node:
        node.input[:] = [name.replace("x", "other") for name in node.input]
        node.output[:] = [name.replace("x", "other") for name in node.output]
    other.graph.output[0].name = other.graph.node[-1].output[0] = "answer"
    half = tmp_path / "half.onnx"
    onnx.save(other, tmp_path / "other.onnx")
    onnx.save(float16.to_half(network(), float16.FLOAT16)[0], half)
    arguments = (half, "--reference", tmp_path / "other.onnx", "--output", tmp_path / "a.onnx")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "it is of another network" in result.output
    assert not (tmp_path / "a.onnx").exists()


def test_a_real_command(overflows: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    command = [sys.executable, "-m", "pipeline", "reduce", overflows.name, "--output", "a.onnx"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("wrote a.onnx\nwrote a.npz\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.onnx", "overflows.onnx"]
