from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from care import checkpoint, factory
from care.factory import check_input, create_model
from care.pretrained import Pretrained
from pipeline.core.errors import ModelError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"unknown model 'resnet81'; did you mean resnet\d+\?"),
        ("hf-hub:timm/resnet18", "unknown model 'hf-hub:timm/resnet18'"),
        ("resnet18.nope", "model resnet18 has no weights 'nope'; did you mean resnet18"),
        ("x" * 300, r"unknown model 'x{65}…x{15}'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "test_resnet",
            {"drop_rat": 0.1},
            "does not take the argument 'drop_rat'; did you mean drop_rate",
        ),
        ("care_tiny", {"feature_dim": 1}, "the argument 'feature_dim'; did you mean feature_dims"),
        ("test_vit", {"embed_dim": 7}, "cannot be made with these arguments: dim should be divis"),
        ("test_vit", {"depth": 10**6}, "depth is at most 1000"),
        ("test_resnet", {"layers": [1, 10**6]}, "layers is at most 1000"),
        ("test_resnet", {"num_classes": 10**11}, "num_classes is at most 1048576"),
        ("test_resnet", {"features_only": True}, "features_only cannot be an argument"),
        ("test_resnet", {"layers": {"a": 1}}, "test_resnet"),
        ("care_tiny", {"depths": 1.5}, "care_tiny"),
        ("test_vit", {"patch_size": 0}, "test_vit"),
    ],
)
def test_arguments_that_make_no_network(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        create_model(name, **arguments)
    assert "\n" not in str(caught.value)


def test_a_network_larger_than_the_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "memory", lambda: 1e9)
    assert create_model("test_vit", embed_dim=128).num_classes == 1000
    made: list[str] = []
    create = timm.create_model

    def noted(name: str, **arguments: Any) -> nn.Module:
        made.append(torch.empty(0).device.type)
        model: nn.Module = create(name, **arguments)
        return model

    monkeypatch.setattr(timm, "create_model", noted)
    with pytest.raises(ModelError, match=r"test_vit .* takes 4\.\d+ GB, this process may use 1 GB"):
        create_model("test_vit", embed_dim=2**12)
    assert made == ["meta"]


def test_images_that_a_network_does_not_take() -> None:
    gray = create_model("test_resnet", num_classes=4, in_chans=1).eval()
    check_input(gray, (1, 32, 32), 4)
    with pytest.raises(ModelError, match="does not take images of 3 x 32 x 32") as caught:
        check_input(gray, (3, 32, 32), 4)
    assert "\n" not in str(caught.value)
    fixed = create_model("vit_tiny_patch16_224", num_classes=4, depth=1).eval()
    with pytest.raises(ModelError, match=r"does not take images of 3 x 32 x 32 .*224"):
        check_input(fixed, (3, 32, 32), 4)


def test_what_is_no_classifier() -> None:
    model = create_model("test_resnet", num_classes=4).eval()
    with pytest.raises(ModelError, match="gives 1x4 for an image, not 5 logits"):
        check_input(model, (3, 32, 32), 5)
    with pytest.raises(ModelError, match=r"gives a tuple of 2 .*wrap it in a module that returns"):
        check_input(nn.Sequential(Twice()), (3, 32, 32), 5)


def test_what_takes_other_than_images() -> None:
    with pytest.raises(ModelError, match=r"takes images, mask, not one .*'mask'.*wrap it"):
        check_input(Masked(), (3, 32, 32), 5)


class Masked(nn.Module):
    def forward(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return images * mask


class Twice(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def test_weights_of_the_cache_are_taken_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    published = timm.create_model("test_resnet")
    checkpoint.save(tmp_path / "model.safetensors", published.state_dict())
    asked: list[str] = []

    def fetch(name: str) -> Pretrained:
        asked.append(name)
        return Pretrained(name, tmp_path / "model.safetensors", "")

    monkeypatch.setattr(factory, "fetch", fetch)
    made = factory.create_pretrained("test_resnet.r160_in1k")
    assert asked == ["test_resnet.r160_in1k"]
    assert all(torch.equal(made.state_dict()[n], v) for n, v in published.state_dict().items())


def test_weights_that_cannot_be_had_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, file: str, **more: Any) -> str:
        if not more.get("local_files_only"):
            asked.append(file)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelError, match=r"cannot be had: .*no connection; run where there is"):
        factory.create_pretrained("test_resnet")
    assert asked == ["model.safetensors"]
