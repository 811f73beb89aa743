"""Networks of the Hub's, out of a cache that the test lays: there is no network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from care import checkpoint, finetune
from care.factory import create_hub, create_model
from care.pretrained import fetch_hub
from care.train import main
from pipeline.core.errors import ModelError
from tests.care.hub import ARCHITECTURE, CARD, COMMIT, CONFIG, LABELS, lay, offline


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    offline(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


def changed(**inner: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["pretrained_cfg"].update(inner)
    return config


def test_a_repository_says_network_labels_and_licence(cache: Path) -> None:
    lay(cache)
    found = fetch_hub("mine/little")
    assert (found.architecture, found.classes, found.labels) == (ARCHITECTURE, 3, tuple(LABELS))
    assert found.weights.licence == "cc-by-nc-4.0"
    assert found.weights.name == f"mine/little of the Hub, commit {COMMIT[:12]}"
    assert found.weights.path.name == "model.safetensors"
    assert "custom_load" not in found.stated


def test_it_is_the_network_that_timm_loads(cache: Path) -> None:
    lay(cache)
    theirs = timm.create_model("hf-hub:mine/little", pretrained=True).eval()
    found = fetch_hub("mine/little")
    ours = create_hub(found).eval()
    checkpoint.load(found.weights.path, ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes"):
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key]  # type: ignore[index]


def test_what_is_asked_for_comes_before_what_was_saved(cache: Path) -> None:
    lay(cache, config={**CONFIG, "model_args": {"num_classes": 3, "in_chans": 3}})
    found = fetch_hub("mine/little")
    assert found.arguments == {"num_classes": 3, "in_chans": 3}
    assert create_hub(found).num_classes == 3
    assert create_hub(found, num_classes=5).num_classes == 5


def test_a_revision_is_another_snapshot(cache: Path) -> None:
    lay(cache)
    refs = cache / "models--mine--little/refs"
    (refs / "v1").write_text(COMMIT)
    assert fetch_hub("mine/little@v1").repository == "mine/little@v1"
    with pytest.raises(ModelError, match=r"little@v2 of the Hub: config\.json is not in the"):
        fetch_hub("mine/little@v2")


@pytest.mark.parametrize(
    ("card", "inner", "licence"),
    [
        (CARD, {"license": "apache-2.0"}, "apache-2.0"),
        (CARD.replace("cc-by-nc-4.0", "'mit'"), {}, "mit"),
        (CARD.replace("license:", "license_name: dinov3-license\nlicense:"), {}, "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: dinov3\n---\n", {}, "dinov3"),
        ("# no head\nlicense: mit\n", {}, ""),
        (None, {}, ""),
    ],
)
def test_the_licence_is_the_configurations_or_the_cards(
    cache: Path, card: str | None, inner: dict[str, Any], licence: str
) -> None:
    lay(cache, config=changed(**inner), card=card)
    assert fetch_hub("mine/little").weights.licence == licence


@pytest.mark.parametrize("labels", [None, ["a", "b"], ["a", "a", "b"], "abc", [1, 2, 3]])
def test_labels_that_are_none_are_left_out(cache: Path, labels: Any) -> None:
    lay(cache, config={**CONFIG, "label_names": labels})
    assert fetch_hub("mine/little").labels is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "is no network of timm's: its config.json names no architecture"),
        ([1], "is no network of timm's"),
        ({**CONFIG, "pretrained_cfg": 3}, "pretrained_cfg or model_args is no mapping"),
        ({**CONFIG, "model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path cannot be"),
        ({**CONFIG, "model_args": {"odd": 1}}, "'odd' is not among the arguments"),
        ({**CONFIG, "architecture": "test_resnot"}, "unknown model 'test_resnot'.*test_resnet"),
    ],
)
def test_what_anybody_may_have_written_is_refused(cache: Path, config: Any, message: str) -> None:
    lay(cache, config=config)
    with pytest.raises(ModelError, match=message):
        create_hub(fetch_hub("mine/little"))


def test_without_a_network_it_is_said_what_to_do(cache: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"^nobody/nothing of the Hub: config\.json is not in the Hub's cache, and cannot be "
        r"had: .*run where there is a network, copy the cache, or name a file",
    ):
        fetch_hub("nobody/nothing")
    with pytest.raises(ModelError, match="names no repository"):
        fetch_hub("no--body/nothing")


# ------------------------------------------------------------------ fine-tuning


def begin(init: str, name: str, classes: int) -> tuple[torch.nn.Module, finetune.Start]:
    def create(count: int) -> torch.nn.Module:
        return create_model(name, num_classes=count)

    model = create(classes)
    return model, finetune.begin(init, name, model, create, lambda: create(1000))


def test_training_starts_from_it(cache: Path) -> None:
    donor = lay(cache)
    model, start = begin("hub:mine/little", ARCHITECTURE, 5)
    assert start.remade == ("fc.weight", "fc.bias")
    assert start.origin == f"mine/little of the Hub, commit {COMMIT[:12]} (cc-by-nc-4.0)"
    assert torch.equal(model.state_dict()["conv1.0.weight"], donor.state_dict()["conv1.0.weight"])
    same, start = begin("hub:mine/little", f"{ARCHITECTURE}.r160_in1k", 3)
    assert start.remade == ()
    assert torch.equal(same.state_dict()["fc.weight"], donor.state_dict()["fc.weight"])


def test_training_refuses_another_network(cache: Path) -> None:
    lay(cache)
    with pytest.raises(ModelError, match="--init hub:mine/little: it holds a test_resnet, and a"):
        begin("hub:mine/little", "test_vit", 3)


def test_the_command_takes_it(cache: Path, tmp_path: Path) -> None:
    lay(cache)
    rng = np.random.default_rng(0)
    for name in LABELS:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    export = tmp_path / "tuned.safetensors"
    arguments = ["--model", ARCHITECTURE, "--init", "hub:mine/little", "--image-size", "32"]
    arguments += ["--data", f"folder:{tmp_path / 'photos'}", "--epochs", "1", "--batch-size", "4"]
    arguments += ["--workers", "0", "--output", str(tmp_path / "run"), "--export", str(export)]
    arguments += [
        "--drop-path",
        "0",
        "--warmup-epochs",
        "0",
        "--hold-out",
        "0.25",
        "--distillation",
        "none",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "starting from mine/little of the Hub" in " ".join(result.output.split())
    assert export.is_file()


@pytest.mark.parametrize("init", ["hub:", "hub:little", "hub:a/b/c", "hub:../x"])
def test_the_command_refuses_what_is_no_repository(init: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--init", init, "--data", f"folder:{tmp_path}"])
    assert result.exit_code == 2
    assert "write hub:organization/repository" in " ".join(result.output.split())
