from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from care import checkpoint
from care.data import open_dataset
from pipeline import config
from pipeline.cli import main
from tests.care.hub import CONFIG as HUB_CONFIG
from tests.care.hub import lay, offline

CLASSES = ("beech", "fir", "oak")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images of three classes, and a checkpoint of a network for them."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in CLASSES:
            images = tmp_path / "trees" / split / label
            images.mkdir(parents=True)
            for name in "abc":
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / f"{name}.png")
    network = timm.create_model("resnet10t", num_classes=3)
    stated = {
        "model": "resnet10t",
        "num_classes": 3,
        "labels": list(CLASSES),
        "preprocess": {
            "size": 64,
            "crop": 0.9,
            "interpolation": "bicubic",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.2, 0.2],
            "channels": "rgb",
        },
    }
    checkpoint.save(tmp_path / "trees.safetensors", network.state_dict(), stated)
    return tmp_path


def init(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


def test_a_checkpoint_and_a_folder_are_enough(folder: Path) -> None:
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees")
    assert result.exit_code == 0, result.output
    assert "network resnet10t, 3 classes" in result.output
    assert "not built yet" in result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.name == "resnet10t"
    assert loaded.preprocess is not None
    assert (loaded.preprocess.size, loaded.preprocess.mean) == (64, (0.4, 0.5, 0.6))
    assert loaded.precisions("ort") == ("fp32", "int8")
    assert {path.name for path in folder.iterdir()} >= {"pipeline.yaml", "trees"}


def test_int8_is_asked_for_only_with_training_images(folder: Path) -> None:
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val")
    assert "no training images were found" in result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.precisions("ort") == ("fp32",)
    (folder / "pipeline.yaml").unlink()
    told = ("--calibration", "folder:trees/train", "--target", "ort", "--name", "mine")
    init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val", *told)
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.precisions("ort") == ("fp32", "int8")
    assert loaded.precisions("trt") == ()
    assert (loaded.name, loaded.data.calibration) == ("mine", "folder:trees/train")


def test_names_and_paths_stay_what_they_are(folder: Path) -> None:
    odd = "folder:trees/a: b # c"
    (folder / "trees" / "a: b # c").symlink_to(folder / "trees" / "val")
    (folder / "12").write_bytes((folder / "trees.safetensors").read_bytes())
    result = init("--checkpoint", "12", "--data", odd)
    assert result.exit_code == 0, result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert (loaded.model.checkpoint, loaded.data.validation) == ("12", odd)


def test_what_was_there_stays(folder: Path) -> None:
    (folder / "pipeline.yaml").write_text("name: mine\n")
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees")
    assert result.exit_code == 2
    assert "is there already" in result.output
    assert (folder / "pipeline.yaml").read_text() == "name: mine\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "none.pt", "--data", "folder:trees"), "none.pt is no file"),
        (("--checkpoint", "random", "--data", "folder:trees"), "does not say which network"),
        (("--checkpoint", "trees.safetensors", "--data", "folder:leaves"), "no folder at leaves"),
        (("--checkpoint", "trees.safetensors", "--data", "trees"), "write folder:trees"),
        (
            ("--checkpoint", "trees.safetensors", "--data", "fashion-mnist", "--target", "rot"),
            "ort",
        ),
        (
            ("--model", "care_s9", "--checkpoint", "random", "--data", "folder:trees"),
            "--model: unknown model 'care_s9'; did you mean care_s2?",
        ),
        (
            ("--model", "timm/resnet18.no", "--checkpoint", "pretrained", "--data", "folder:trees"),
            "--model: model resnet18 has no weights 'no'",
        ),
        (
            ("--model", "no.nets:make", "--checkpoint", "own", "--data", "folder:trees"),
            "pipeline.yaml was not written: model.module: there is no module no",
        ),
        (
            ("--checkpoint", "trees.safetensors", "--data", "folder:trees", "--labels", "no.txt"),
            "pipeline.yaml was not written: data.labels: no.txt is no file",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = init(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (folder / "pipeline.yaml").exists()


def test_other_classes_than_the_checkpoints_are_refused(folder: Path) -> None:
    (folder / "trees" / "val" / "oak").rename(folder / "trees" / "val" / "ash")
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val")
    assert result.exit_code == 2
    assert "beech, fir, oak" in result.output
    assert "folders ash, …" in result.output
    (folder / "trees" / "val" / "elm").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "trees/val/elm/a.png")
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val")
    assert result.exit_code == 2
    assert not (folder / "pipeline.yaml").exists()


def of_training(folder: Path, data: str) -> None:
    """Let the checkpoint say that training held out images of these."""
    path = folder / "trees.safetensors"
    stated = checkpoint.read_metadata(path)
    stated["hold_out"] = {"share": 0.4, "seed": 1, "identity": open_dataset(data).identity()}
    checkpoint.save(path, checkpoint.read(path), stated)


def test_images_that_training_held_out_are_found(folder: Path) -> None:
    data = "folder:trees/train"
    of_training(folder, data)
    result = init("--checkpoint", "trees.safetensors", "--data", data)
    assert result.exit_code == 0, result.output
    assert "3 of 9 images judge, those that training held out; the 6 that it" in result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.data.calibration == "auto"
    assert loaded.precisions("ort") == ("fp32", "int8")


def test_images_of_another_list_are_none_of_these(folder: Path) -> None:
    of_training(folder, "folder:trees/train")
    (folder / "trees/val/oak/a.png").unlink()
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val")
    assert result.exit_code == 0, result.output
    assert "held out" not in result.output
    assert config.load(folder / "pipeline.yaml").precisions("ort") == ("fp32",)


def test_images_may_show_fewer_classes_than_the_checkpoint_names(folder: Path) -> None:
    for path in (folder / "trees/val/fir").iterdir():
        path.unlink()
    (folder / "trees/val/fir").rmdir()
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees/val")
    assert result.exit_code == 0, result.output
    assert "network resnet10t, 3 classes" in result.output


def test_a_head_of_another_size_is_refused_before_anything_is_written(folder: Path) -> None:
    """Of a checkpoint of somebody else, which says nothing but its weights."""
    network = timm.create_model("resnet10t", num_classes=5)
    torch.save(network.state_dict(), folder / "other.pth")
    more = ("--checkpoint", "other.pth", "--model", "timm/resnet10t", "--data", "folder:trees")
    result = init(*more)
    assert result.exit_code == 2
    assert "other.pth has 5 classes, and folder:trees has 3" in result.output
    assert "python -m care.train --init" in result.output
    assert not (folder / "pipeline.yaml").exists()
    (folder / "five.txt").write_text("ash\nbeech\nelm\nfir\noak\n")
    assert init(*more, "--labels", "five.txt").exit_code == 0


def test_a_target_may_be_one_precision_of_it(folder: Path) -> None:
    told = ("--target", "ort/fp32", "--target", "coreml", "--target", "ort/int8")
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees", *told)
    assert result.exit_code == 0, result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.precisions("ort") == ("fp32", "int8")
    assert loaded.precisions("coreml") == ("fp16", "int8")
    assert loaded.precisions("trt") == ()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("ort/fp3", "ort has no precision 'fp3'; did you mean fp32?"),
        ("or/fp32", "'or' is no target"),
    ],
)
def test_what_no_target_has_is_refused(folder: Path, target: str, words: str) -> None:
    result = init("--checkpoint", "trees.safetensors", "--data", "folder:trees", "--target", target)
    assert result.exit_code == 2
    assert words in result.output
    assert not (folder / "pipeline.yaml").exists()


def graph(path: Path, classes: int, **metadata: str) -> None:
    """A graph of means of channels, for images of 32 pixels."""
    weights = numpy_helper.from_array(np.ones((3, classes), np.float32), "w")
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
    made = helper.make_graph(nodes, "means", [taken], [given], [weights])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


def test_a_graph_holds_its_weights(folder: Path) -> None:
    graph(folder / "means.onnx", 3)
    told = ("--mean", "0.5", "--std", "0.25", "--target", "ort/fp32")
    result = init("--model", "means.onnx", "--data", "folder:trees", *told)
    assert result.exit_code == 0, result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert (loaded.name, loaded.model.onnx, loaded.model.checkpoint) == (
        "means",
        "means.onnx",
        "own",
    )
    assert loaded.preprocess is not None
    assert (loaded.preprocess.size, loaded.preprocess.std) == (32, (0.25,) * 3)


def test_a_graph_that_says_how_images_become_its_input_needs_nothing_else(folder: Path) -> None:
    spec = {"size": 32, "crop": 0.9, "interpolation": "bilinear"}
    spec |= {"mean": [0.1] * 3, "std": [0.2] * 3, "channels": "rgb"}
    graph(folder / "means.onnx", 3, preprocess=json.dumps(spec), labels=json.dumps(CLASSES))
    result = init("--model", "means.onnx", "--data", "folder:trees")
    assert result.exit_code == 0, result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.preprocess is not None
    assert (loaded.preprocess.crop, loaded.preprocess.interpolation) == (0.9, "bilinear")


def test_a_repository_of_the_hub_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, folder / "hub")
    lay(folder / "hub", config={**HUB_CONFIG, "label_names": list(CLASSES)})
    result = init("--model", "hub:mine/little", "--data", "folder:trees", "--target", "ort/fp32")
    assert result.exit_code == 0, result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert (loaded.name, loaded.model.hub, loaded.model.checkpoint) == (
        "little",
        "mine/little",
        "hub",
    )
    assert loaded.preprocess is None


MODULE = ("--model", "nets.mine:make", "--checkpoint", "own", "--target", "ort/fp32")


def own_network(folder: Path) -> None:
    (folder / "nets").mkdir()
    (folder / "nets" / "mine.py").write_text(
        "from torch import nn\n\n"
        "def make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))\n"
    )


def test_images_of_a_network_of_ones_own_are_stated(folder: Path) -> None:
    own_network(folder)
    told = ("--size", "48", "--crop", "0.9", "--mean", "0.5", "--std", "0.25")
    result = init(*MODULE, "--data", "folder:trees", *told)
    assert result.exit_code == 0, result.output
    assert "left to the network itself" not in result.output
    loaded = config.load(folder / "pipeline.yaml")
    assert loaded.model.module == "nets.mine:make"
    assert loaded.preprocess is not None
    assert (loaded.preprocess.size, loaded.preprocess.crop) == (48, 0.9)
    assert (loaded.preprocess.mean, loaded.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)


def test_what_nobody_says_of_its_images_is_told(folder: Path) -> None:
    own_network(folder)
    result = init(*MODULE, "--data", "folder:trees")
    assert result.exit_code == 0, result.output
    assert "state it here with --size, --mean and --std" in " ".join(result.output.split())
    assert config.load(folder / "pipeline.yaml").preprocess is None
    (folder / "pipeline.yaml").unlink()
    half = init(*MODULE, "--data", "folder:trees", "--size", "48")
    assert half.exit_code == 2
    assert "state --mean and --std" in " ".join(half.output.split())
    assert not (folder / "pipeline.yaml").exists()


def test_weights_that_timm_publishes_are_known_by_their_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, folder / "hub")
    told = ("--model", "timm/test_resnet", "--checkpoint", "pretrained", "--target", "ort/fp32")
    result = init(*told, "--data", "folder:trees")
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert "pretrained has 1000 classes, and folder:trees has 3" in words
    assert not (folder / "pipeline.yaml").exists()
    result = init(*told, "--data", "folder:trees", "--labels", "imagenet-1k")
    assert "the Hub's cache" in " ".join(result.output.split())  # as far as there is no network
    assert config.load(folder / "pipeline.yaml").model.checkpoint == "pretrained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "means.onnx"), "does not say how pixels are normalized: state --mean"),
        (("--model", "means.onnx", "--checkpoint", "random"), "leave out --checkpoint"),
        (("--model", "means.onnx", "--size", "64"), "it takes images of 32 pixels"),
        (("--model", "many.onnx", "--mean", "0", "--std", "1"), "has 7 classes, and folder:trees"),
        (("--model", "missing.onnx"), "--model: missing.onnx is no file"),
        (("--model", "notes.onnx"), "--model: "),
        (("--model", "timm/resnet18"), "--checkpoint is missing"),
        (("--model", "timm/resnet18", "--checkpoint", "random", "--size", "8"), "callable alone"),
        (("--model", "hub:little"), "names no repository"),
        (("--model", "hub:no/thing"), "not in the Hub's cache"),
    ],
)
def test_what_holds_no_weights_is_told(
    arguments: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, folder / "hub")
    graph(folder / "means.onnx", 3)
    graph(folder / "many.onnx", 7)
    (folder / "notes.onnx").write_text("no graph")
    result = init(*arguments, "--data", "folder:trees")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (folder / "pipeline.yaml").exists()
