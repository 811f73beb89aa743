"""The form that is deployed computes what the trained network does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from care import inference
from care.inference import inference_form

SHAPE = (3, 64, 64)


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(part, kind) for part in module.modules())


def logits(module: nn.Module) -> torch.Tensor:
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: torch.Tensor = module(images)
    return found


@pytest.mark.parametrize("name", ["mobileone_s0", "repvit_m0_9", "fastvit_t8", "repghostnet_050"])
def test_timms_networks_take_their_own_inference_form(name: str) -> None:
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=10).eval()
    before = count(module, nn.BatchNorm2d)
    form = inference_form(module, SHAPE)
    assert form.how.startswith("reparameterized by timm")
    assert count(form.module, nn.BatchNorm2d) < before / 2
    assert count(module, nn.BatchNorm2d) == before, "the trained network stays"
    expected = logits(module)
    assert float((logits(form.module) - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_a_network_without_one_is_copied() -> None:
    module = timm.create_model("resnet10t", num_classes=10).eval()
    form = inference_form(module, SHAPE)
    assert form.how == "as trained"
    assert form.module is not module
    assert torch.equal(logits(form.module), logits(module))


def test_a_form_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = timm.create_model("mobileone_s0", num_classes=10).eval()

    def wrong(model: nn.Module) -> nn.Module:
        other: nn.Module = timm.create_model("mobileone_s0", num_classes=10)
        return other

    monkeypatch.setattr("timm.utils.reparameterize_model", wrong)
    form = inference_form(module, SHAPE)
    assert form.how.startswith("as trained: timm's reparameterized form differs by")
    assert torch.equal(logits(form.module), logits(module))


def test_one_that_gives_nan_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_difference", lambda *_: float("nan"))
    module = timm.create_model("mobileone_s0", num_classes=10).eval()
    assert inference_form(module, SHAPE).how.startswith("as trained:")


class Asks(nn.Sequential):
    """Has a method of timm's name that is for something else."""

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first + second


class Switch(nn.Sequential):
    """Has a setting of timm's name."""

    fuse = True


@pytest.mark.parametrize("kind", [Asks, Switch])
def test_what_is_merely_called_so_is_left_alone(kind: type[nn.Sequential]) -> None:
    layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module = nn.Sequential(kind(*layers), nn.Linear(4, 10)).eval()
    form = inference_form(module, SHAPE)
    assert form.how.startswith("as trained: timm's reparameterized form fails: TypeError: ")
    assert torch.equal(logits(form.module), logits(module))


@pytest.mark.parametrize("name", ["care_s0", "mlla_t"])
def test_ours_take_their_exact_form(name: str, parity_model: Callable[[str], nn.Module]) -> None:
    form = inference_form(parity_model(name), (3, 224, 224))
    assert form.how == "exact inference form"
