from __future__ import annotations

import http.server
import json
import math
import os
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from care import checkpoint, evaluate
from care.distributed import World
from care.evaluate import Score, score
from care.factory import create_model
from pipeline.core.errors import ModelError
from pipeline.core.preprocess import Preprocess

ROOT = Path(__file__).parents[2]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Lookup(nn.Module):
    """Gives the logits that are stored in the images."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0]


def test_scores_count_first_and_five_guesses() -> None:
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # class 0: first
            [9.0, 8, 7, 6, 5, 4, 3],  # class 4: among five
            [9.0, 8, 7, 6, 5, 4, 3],  # class 6: neither
        ]
    )
    images, targets = logits[:, :, None, None], torch.tensor([0, 4, 6])
    model = Lookup().train()
    found = score(model, [(images[:2], targets[:2]), (images[2:], targets[2:])], ALONE)
    assert (found.images, found.first, found.fifth) == (3, 1, 2)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert (found.top1, found.top5) == (1 / 3, 2 / 3)
    assert model.training


def test_few_classes_have_fewer_guesses() -> None:
    found = score(Lookup(), [(torch.eye(3)[:, :, None, None], torch.tensor([0, 1, 0]))], ALONE)
    assert found == Score(3, 2, 3, found.loss)
    assert math.isfinite(found.loss)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, three each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            level = 40 * number + 20
            Image.new("RGB", (32, 32), (level,) * 3).save(tmp_path / f"images/{name}/{number}.png")
    return tmp_path / "images"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint as care.train writes it."""
    torch.manual_seed(0)
    model = create_model("care_tiny", num_classes=2)
    path = tmp_path / "trained.safetensors"
    preprocess = {"size": 32, "crop": 1.0, "interpolation": "bicubic", "channels": "rgb"}
    preprocess |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    stated = {"model": "care_tiny", "num_classes": 2, "labels": ["cat", "dog"]}
    checkpoint.save(path, model.state_dict(), {**stated, "preprocess": preprocess})
    return path


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(evaluate.main, [str(a) for a in arguments])


def assert_mistake(result: click.testing.Result, *words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_a_checkpoint_says_how_it_is_judged(trained: Path, folder: Path) -> None:
    result = run(trained, "--data", f"folder:{folder}", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["model"], summary["images"]) == ("care_tiny", 6)
    assert f"top-1  {summary['top1']:.2%}" in result.stdout
    low, high = summary["top1_interval"]
    assert low <= summary["top1"] <= high
    assert evaluate.read_trained(trained).preprocess.size == 32


def test_the_result_depends_on_neither_batches_nor_workers(trained: Path, folder: Path) -> None:
    summaries = []
    for more in (["--batch-size", "6"], ["--batch-size", "4", "--workers", "1"]):
        result = run(trained, "--data", f"folder:{folder}", "--json", *more)
        assert result.exit_code == 0, (result.output, result.exception)
        summaries.append(json.loads(result.stdout.splitlines()[-1]))
    assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], rel=1e-5)
    assert summaries[0]["top1"] == summaries[1]["top1"]


def test_a_checkpoint_of_another_program_needs_the_model(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "published.pth.tar"
    torch.save({"state_dict": create_model("care_tiny", num_classes=2).state_dict()}, path)
    assert_mistake(run(path, "--data", f"folder:{folder}"), "published.pth.tar", "--model")
    named = ["--model", "care_tiny", "--data", f"folder:{folder}", "--image-size", 32]
    assert_mistake(run(path, *named), "published.pth.tar", "2 classes")
    assert run(path, *named, "--num-classes", 2).exit_code == 0


def test_mistakes_are_one_line(trained: Path, folder: Path, tmp_path: Path) -> None:
    data = ["--data", f"folder:{folder}"]
    assert_mistake(run(tmp_path / "absent.pt", *data), "absent.pt")
    assert_mistake(run(trained), "give --data")
    assert_mistake(run(trained, "--model", "care_s0", *data), "of care_tiny, not of care_s0")
    assert_mistake(run(trained, "--ema", *data), "moving average")
    assert_mistake(run("--model", "care_s0", *data), "no weights of care_s0", "CHECKPOINT")
    assert_mistake(run(trained, *data, "--split", "tset"), "tset")
    assert_mistake(run(trained, *data, "--precision", "fp8"), "fp8")
    assert_mistake(run(trained, *data, "--device", "cuda:77"), "cuda:77")
    (folder / "dog").rename(folder / "cow")
    assert_mistake(run(trained, *data), "class 1 is 'dog'", "'cow'")
    (folder / "cow").rename(folder / "dog")
    (folder / "dog/0.png").write_bytes(b"")
    assert_mistake(run(trained, *data), "dog/0.png", "empty")
    (folder / "bird").mkdir()
    assert_mistake(run(trained, *data), "bird", "no images")
    Image.new("RGB", (32, 32)).save(folder / "bird/0.png")
    assert_mistake(run(trained, *data), "3 classes")


@pytest.mark.soak
def test_the_embedded_model_reaches_its_accuracy() -> None:
    """`python -m care.evaluate` without arguments: the whole test split of Fashion-MNIST."""
    result = subprocess.run(
        [sys.executable, "-m", "care.evaluate", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["images"] == 10_000
    assert summary["top1"] >= 0.925
    assert summary["top5"] >= 0.995


class Payload:
    """Unpickled by an unrestricted reader, it leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def stating(path: Path, model: str, arguments: object) -> Path:
    """A safetensors file that states arguments for its network."""
    network = create_model(model, num_classes=2)
    stated = {"model": model, "num_classes": 2, "model_kwargs": arguments}
    checkpoint.save(path, network.state_dict(), stated)
    return path


def test_a_checkpoint_cannot_name_a_file_that_runs_code(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    torch.save(Payload(canary), tmp_path / "evil.pth")
    # The oldest timm that setup.cfg allows reads it like this; newer ones restrict it.
    original = torch.load

    def unrestricted(*arguments: Any, **more: Any) -> Any:
        return original(*arguments, **{**more, "weights_only": False})

    monkeypatch.setattr(torch, "load", unrestricted)
    path = stating(
        tmp_path / "a.safetensors", "care_tiny", {"checkpoint_path": str(tmp_path / "evil.pth")}
    )
    result = run(path, "--data", f"folder:{folder}")
    assert not canary.exists()
    assert_mistake(result, "a.safetensors was refused", "checkpoint_path", "weights come from")


def test_a_checkpoint_cannot_make_us_fetch_an_address(tmp_path: Path, folder: Path) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        arguments = {"pretrained": True, "pretrained_cfg": {"url": url, "num_classes": 2}}
        path = stating(tmp_path / "a.safetensors", "resnet10t", arguments)
        result = run(path, "--data", f"folder:{folder}")
        server.shutdown()
    assert asked == []
    assert_mistake(result, "a.safetensors was refused", "pretrained cannot be an argument")


@pytest.mark.parametrize(
    ("stated", "word"),
    [
        ({"model_kwargs": {"features_only": True}}, "features_only"),
        ({"model_kwargs": {"init_value": "0.1"}}, "init_value must be a number"),
        ({"model_kwargs": [1]}, "model_kwargs are no mapping"),
        ({"model": ["care_tiny"]}, "model is ['care_tiny']"),
        ({"num_classes": "2"}, "num_classes is '2'"),
        ({"labels": {"a": 1}}, "labels is"),
        ({"model": "hf-hub:timm/resnet18"}, "unknown model"),
        ({"model": "local-dir:/tmp"}, "unknown model"),
        ({"model_kwargs": {"depths": [0, 0]}}, "care_tiny"),
    ],
)
def test_metadata_of_another_kind_is_one_line(
    tmp_path: Path, folder: Path, stated: dict[str, object], word: str
) -> None:
    state = create_model("care_tiny", num_classes=2).state_dict()
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, state, {"model": "care_tiny", "num_classes": 2, **stated})
    assert_mistake(run(path, "--data", f"folder:{folder}"), word)


@pytest.mark.parametrize("name", ["pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_no_network_is_created_with_what_timm_takes_itself(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} cannot be an argument of the network"):
        create_model("care_tiny", **{name: None})


def summary(result: click.testing.Result) -> dict[str, Any]:
    """The line of JSON at the end."""
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def imagenet_folder(folder: Path, classes: list[str], names: list[str]) -> Path:
    """An image a class, each of another gray."""
    for number, (class_, name) in enumerate(zip(classes, names, strict=True)):
        (folder / class_).mkdir(parents=True)
        Image.new("RGB", (32, 32), (40 * number,) * 3).save(folder / class_ / name)
    return folder


@pytest.fixture
def thousand(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Let the network say, of an image of gray 40 n, the class that is stated for n."""
    said: dict[int, int] = {}

    class Stated(nn.Module):
        num_classes = 1000

        def forward(self, images: Tensor) -> Tensor:
            numbers = (((images[:, 0, 0, 0] + 2) / 4) * 255 / 40).round().int().tolist()
            logits = images.new_zeros(len(images), 1000)
            for row, number in enumerate(numbers):
                logits[row, said[number]] = 2
                logits[row, 999] = 3 if said[number] < 500 else 0  # what a part does not know
            return logits

    spec = Preprocess(32, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    network = evaluate.Trained("care_s0", Path("x"), Stated(), spec, 1000, ())
    monkeypatch.setattr(evaluate, "read_trained", lambda *_: network)
    return said


def test_a_part_of_imagenets_classes_is_judged_by_itself(
    tmp_path: Path, thousand: dict[int, int]
) -> None:
    """As ImageNet-A and -R; class 999, of which there are no images, would win otherwise."""
    names = ImageNetInfo().label_names()
    chosen = [names[number] for number in (3, 17, 250)]
    folder = imagenet_folder(tmp_path / "r", chosen, ["0.png", "1.png", "2.png"])
    thousand |= {0: 3, 1: 17, 2: 17}
    result = run("x", "--data", f"folder:{folder}", "--json")
    assert "only the 3 classes of the images count, of 1000" in result.output
    assert summary(result)["top1"] == pytest.approx(2 / 3)


def test_other_names_than_the_networks_are_still_refused(
    tmp_path: Path, thousand: dict[int, int]
) -> None:
    folder = imagenet_folder(tmp_path / "r", ["cat", "n01440764"], ["0.png", "1.png"])
    result = run("x", "--data", f"folder:{folder}")
    assert result.exit_code == 2
    assert "the dataset has 2 classes" in result.stderr


def test_the_corrected_labels_count_any_of_several(
    tmp_path: Path, thousand: dict[int, int]
) -> None:
    content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    labels = json.loads(content or b"")
    several = next(n for n, found in enumerate(labels) if len(found) > 1 and min(found) >= 500)
    one = next(n for n, found in enumerate(labels) if len(found) == 1 and min(found) >= 500)
    none = labels.index([])
    numbers = [several, one, none]
    folder = tmp_path / "val"
    for number in range(1000):
        (folder / f"{number}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / f"{number}/ILSVRC2012_val_{one + 1:08}.JPEG")
    for place, number in enumerate(numbers):
        target = folder / f"{place}/ILSVRC2012_val_{number + 1:08}.JPEG"
        next((folder / f"{place}").iterdir()).unlink()
        Image.new("RGB", (32, 32), (40 * (place + 1),) * 3).save(target)
    thousand |= {0: 0, 1: max(labels[several]), 2: 998, 3: 0}
    result = run("x", "--data", f"folder:{folder}", "--real", "--json")
    assert result.exit_code == 0, result.output
    # Of the first image one of its labels was guessed; none of the others, and one has no label.
    assert f"of the {999:,} with labels" in result.output
    assert summary(result)["real_top1"] == pytest.approx(1 / 999)
