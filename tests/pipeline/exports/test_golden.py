"""What is wrong on a device is found by the golden kit, without this project."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import pipeline
from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.preprocess import Preprocess
from pipeline.exports import golden, triton
from pipeline.steps.artifact import Artifact
from pipeline.steps.library import Library

STUBS = Path(__file__).parents[2] / "data" / "tensorrt"
Values = npt.NDArray[Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    begin(folder / "trial")
    settings = {
        "name": "trial",
        "output": folder,
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {
            "ort": {"precisions": ("fp32",)},
            "trt": {"precisions": ("fp16",), "compute_capabilities": ("8.9",)},
        },
        "validation": {"images": 40},
    }
    pipeline.run(settings, only=("export", "simplify", "precision", "build", "validate"))
    return folder / "trial"


def artifact(results: Path, name: str) -> Artifact:
    return Library(results).artifact(name)


@pytest.fixture(scope="module")
def kit(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.export(artifact(results, "ort/fp32"), tmp_path_factory.mktemp("kit") / "golden")


def check(kit: Path, *arguments: str | Path, program: str = "check.py") -> tuple[int, str]:
    """Exit code and words of a program of the kit, which sees nothing of this project."""
    done = subprocess.run(
        [sys.executable, "-P", kit / program, *arguments],
        capture_output=True,
        text=True,
        cwd=kit,
        env={"PYTHONPATH": str(kit), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def stated(kit: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((kit / "kit.json").read_text())
    return values


def test_the_kit_is_of_all_classes_and_names_its_input(kit: Path) -> None:
    values = stated(kit)
    counts = np.bincount(values["labels"], minlength=10)
    assert values["images"] == 16
    assert counts.min() >= 1
    assert counts.max() <= 2
    assert values["artifact"] == "ort/fp32"
    assert values["logits"] == "measured"
    assert 1e-4 <= values["tolerance"] < 1e-3
    own = np.fromfile(kit / "logits.f32", "<f4").reshape(16, 10)
    exact = np.fromfile(kit / "pytorch.f32", "<f4").reshape(16, 10)
    np.testing.assert_allclose(own, exact, atol=1e-3)
    assert (own.argmax(1) == values["labels"]).mean() > 0.7


def test_the_licence_of_the_weights_goes_along(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = golden.kit_of(artifact(results, "ort/fp32"))
    assert isinstance(found, golden.Kit)
    assert "licence" not in golden.described(found)
    told = {"weights": "timm's resnet18", "license": "cc-by-nc-4.0"}
    network = dataclasses.replace(found.network, description={**told, "model": "timm/resnet18"})
    monkeypatch.setattr(golden.Kit, "network", network)
    assert golden.described(found)["licence"] == told


def test_what_was_built_holds(kit: Path, results: Path) -> None:
    code, words = check(kit, results / "ort/fp32/model.onnx")
    assert (code, "holds: the same class for 16 of 16" in words) == (0, True), words


def test_a_flipped_weight_is_caught(kit: Path, results: Path, tmp_path: Path) -> None:
    model = onnx.load(results / "ort/fp32/model.onnx")
    weights = [each for each in model.graph.initializer if len(each.dims) == 4]
    values = numpy_helper.to_array(weights[0]).copy()
    values.flat[np.abs(values).argmax()] *= -1
    weights[0].CopyFrom(numpy_helper.from_array(values, weights[0].name))
    onnx.save(model, tmp_path / "flipped.onnx")
    code, words = check(kit, tmp_path / "flipped.onnx")
    assert (code, "FAILS" in words) == (1, True), words


def test_swapped_channels_are_caught(kit: Path, tmp_path: Path) -> None:
    """Gray photographs hide them; the card does not."""
    card = np.fromfile(kit / "card.u8", "u1").reshape(stated(kit)["card_shape"])
    card[..., ::-1].tofile(tmp_path / "bgr.u8")
    code, words = check(kit, "--card", tmp_path / "bgr.u8")
    assert code == 1
    assert "opposite order" in words
    inputs = np.fromfile(kit / "inputs.f32", "<f4")
    inputs.tofile(tmp_path / "mine.f32")
    code, words = check(kit, "--inputs", tmp_path / "mine.f32")
    assert code == 0
    assert "the images are gray, so that swapped channels do not show here" in words


def test_swapped_channels_of_photographs_with_colours_are_caught(kit: Path, tmp_path: Path) -> None:
    coloured = tmp_path / "kit"
    shutil.copytree(kit, coloured)
    values = stated(kit)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, values["pixels_shape"], dtype=np.uint8)
    mean, std = (np.array(values["preprocess"][key], np.float32) for key in ("mean", "std"))

    def inputs(shown: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        made = (shown.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(made.transpose(0, 3, 1, 2), "<f4")

    pixels.tofile(coloured / "pixels.u8")
    inputs(pixels).tofile(coloured / "inputs.f32")
    values["input_sha256"] = hashlib.sha256(inputs(pixels).tobytes()).hexdigest()
    (coloured / "kit.json").write_text(json.dumps(values))
    inputs(pixels).tofile(tmp_path / "right.f32")
    inputs(pixels[..., ::-1]).tofile(tmp_path / "swapped.f32")
    code, words = check(coloured, "--inputs", tmp_path / "right.f32")
    assert (code, "gray" in words) == (0, False), words
    code, words = check(coloured, "--inputs", tmp_path / "swapped.f32")
    assert (code, "FAILS" in words) == (1, True), words


@pytest.mark.parametrize("change", ["bilinear", "nearest", "no crop", "shifted", "mirrored"])
def test_a_wrong_resize_is_caught(change: str, kit: Path, tmp_path: Path) -> None:
    values = stated(kit)
    right = Preprocess.from_dict(values["preprocess"])
    card = Image.open(kit / "card.png")
    if change == "no crop":
        mine = np.asarray(card.resize((right.size, right.size), Image.Resampling.BICUBIC))
    elif change == "nearest":
        size = (card.width * right.resized // card.height, right.resized)
        left, top = (size[0] - right.size) // 2, (size[1] - right.size) // 2
        near = card.resize(size, Image.Resampling.NEAREST)
        mine = np.asarray(near.crop((left, top, left + right.size, top + right.size)))
    elif change == "bilinear":
        mine = Preprocess.from_dict({**values["preprocess"], "interpolation": "bilinear"}).pixels(
            card
        )
    else:
        mine = right.pixels(card)
        mine = np.roll(mine, 1, axis=1) if change == "shifted" else mine[:, ::-1]
    np.ascontiguousarray(mine).tofile(tmp_path / "mine.u8")
    code, words = check(kit, "--card", tmp_path / "mine.u8")
    assert (code, "FAILS" in words) == (1, True), words
    right.pixels(card).tofile(tmp_path / "right.u8")
    assert check(kit, "--card", tmp_path / "right.u8")[0] == 0


def test_a_wrong_mean_is_caught(kit: Path, tmp_path: Path) -> None:
    right = np.fromfile(kit / "inputs.f32", "<f4").reshape(stated(kit)["input_shape"])
    np.save(tmp_path / "right.npy", right)
    np.save(tmp_path / "wrong.npy", right + np.float32(0.02))
    assert check(kit, "--inputs", tmp_path / "right.npy")[0] == 0
    assert check(kit, "--inputs", tmp_path / "wrong.npy")[0] == 1


def test_logits_that_are_not_finite_fail(kit: Path, tmp_path: Path) -> None:
    logits = np.fromfile(kit / "logits.f32", "<f4")
    logits.tofile(tmp_path / "mine.f32")
    assert check(kit, "--logits", tmp_path / "mine.f32")[0] == 0
    logits[3] = np.nan
    logits.tofile(tmp_path / "mine.f32")
    assert check(kit, "--logits", tmp_path / "mine.f32")[0] == 1


def test_one_image_among_many_is_enough_to_fail(kit: Path, tmp_path: Path) -> None:
    logits = np.fromfile(kit / "logits.f32", "<f4").reshape(16, 10)
    logits[15] *= np.float32(1 + 1.5 * stated(kit)["tolerance"])
    logits.tofile(tmp_path / "one.f32")
    code, words = check(kit, "--logits", tmp_path / "one.f32")
    assert (code, "image 15" in words) == (1, True), words


def test_what_cannot_be_checked_is_told(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "short.f32").write_bytes(bytes(8))
    code, words = check(kit, "--logits", tmp_path / "short.f32")
    assert code == 2
    assert "holds 2 values" in words
    damaged = shutil.copytree(kit, tmp_path / "damaged")
    inputs = np.fromfile(damaged / "inputs.f32", "<f4")
    inputs[0] += 1
    inputs.tofile(damaged / "inputs.f32")
    code, words = check(damaged, "--logits", damaged / "logits.f32")
    assert code == 2
    assert "not the input that was exported" in words


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_source_for_tensorrt(results: Path, tmp_path: Path) -> None:
    """Compiled with a stub, whose engines are files of logits."""
    kit = golden.export(artifact(results, "trt/fp16"), tmp_path / "golden")
    assert stated(kit)["logits"] in ("emulated", "measured")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{STUBS}"]
    command += ["-DSTUB_CLASSES=10", "check_tensorrt.cpp", "-o", "check_tensorrt"]
    compiled = subprocess.run(command, cwd=kit, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr

    def run(engine: Path) -> tuple[int, str]:
        done = subprocess.run([kit / "check_tensorrt", engine, kit], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, words = run(kit / "logits.f32")
    assert (code, "holds: the same class for 16 of 16" in words) == (0, True), words
    logits = np.fromfile(kit / "logits.f32", "<f4").reshape(16, 10)
    logits[:, ::-1].tofile(tmp_path / "other.engine")
    assert run(tmp_path / "other.engine")[0] == 1
    # One image that is off by more than it may be, among fifteen that are right.
    one = logits.copy()
    one[15] *= np.float32(1 + 1.5 * stated(kit)["tolerance"])
    one.tofile(tmp_path / "one.engine")
    assert run(tmp_path / "one.engine")[0] == 1
    one[15] = np.nan
    one.tofile(tmp_path / "one.engine")
    assert run(tmp_path / "one.engine")[0] == 1
    assert run(tmp_path / "none.engine")[0] == 2


class Served(http.server.BaseHTTPRequestHandler):
    """Answers as Triton does."""

    logits: Values
    inputs: Values
    paths: list[str]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        size = int(self.headers["Inference-Header-Content-Length"])
        header = json.loads(content[:size])
        shape = header["inputs"][0]["shape"]
        images = np.frombuffer(content[size:], "<f4").reshape(shape)
        places = [
            int(np.abs(self.inputs - image).reshape(16, -1).sum(1).argmin()) for image in images
        ]
        self.paths.append(self.path)
        answer = b"{}"
        self.send_response(200)
        self.send_header("Inference-Header-Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer + self.logits[places].astype("<f4").tobytes())

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    serving = http.server.HTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_triton_is_asked(results: Path, server: str, tmp_path: Path) -> None:
    built = artifact(results, "ort/fp32")
    folder = triton.export(built, built.network(), tmp_path / "repository")
    kit = folder / "golden"
    Served.logits = np.fromfile(kit / "logits.f32", "<f4").reshape(16, 10)
    Served.inputs = np.fromfile(kit / "inputs.f32", "<f4").reshape(stated(kit)["input_shape"])
    Served.paths = []
    code, words = check(kit, server, program="triton_client.py")
    assert (code, "holds" in words) == (0, True), words
    assert Served.paths == ["/v2/models/trial/infer"] * 16
    Served.logits = Served.logits[:, ::-1]
    assert check(kit, server, program="triton_client.py")[0] == 1
    assert check(kit, "http://127.0.0.1:9", program="triton_client.py")[0] == 2
    # Again, and over a file of somebody's.
    (kit / "kit.json").write_text("{}")
    said: list[str] = []
    triton.export(built, built.network(), tmp_path / "repository", say=said.append)
    assert "was changed since: set aside" in said[0]
    assert check(kit, "--logits", kit / "logits.f32")[0] == 0


def test_without_a_validation_there_is_no_kit(results: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(results, tmp_path / "trial")
    shutil.rmtree(copied / "validate" / "ort-fp32")
    built = artifact(copied, "ort/fp32")
    with pytest.raises(InputError, match="was not validated"):
        golden.export(built, tmp_path / "golden")
    said: list[str] = []
    folder = triton.export(built, built.network(), tmp_path / "repository", say=said.append)
    assert "without a golden kit" in said[0]
    assert not (folder / "golden").exists()


def test_a_damaged_kit_does_not_leave(results: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(results, tmp_path / "trial")
    file = copied / "validate" / "golden" / "pixels.u8"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ArtifactError, match=r"pixels\.u8 has changed"):
        golden.export(artifact(copied, "ort/fp32"), tmp_path / "golden")
    assert not (tmp_path / "golden").exists()


def test_nothing_is_overwritten(results: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("letter")
    with pytest.raises(InputError, match="not empty"):
        golden.export(artifact(results, "ort/fp32"), tmp_path)
