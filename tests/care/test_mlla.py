from __future__ import annotations

import math

import pytest
import timm
import torch

from care.mlla import Mlla, RotaryLinearAttention, RotaryPosition, inference_form
from pipeline.core.errors import ModelError


def small(**kwargs: object) -> Mlla:
    model = timm.create_model(
        "mlla_t", embed_dim=16, depths=(1, 1), heads=(2, 4), img_size=64, num_classes=5, **kwargs
    )
    assert isinstance(model, Mlla)
    return model


def test_rotation_turns_channel_pairs_by_row_and_column() -> None:
    rope = RotaryPosition((2, 3), 4)
    turned = rope(torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 2, 3, 4))
    # The first pair turns with the row, the second with the column, one radian a step.
    row, column = 1, 2
    expected = [math.cos(row), math.sin(row), math.cos(column), math.sin(column)]
    torch.testing.assert_close(turned[0, row, column], torch.tensor(expected))


def test_rotation_keeps_the_length() -> None:
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(RotaryPosition((4, 4), 8)(x).norm(dim=-1), x.norm(dim=-1))


def test_gradients_reach_every_parameter() -> None:
    model = small(drop_path_rate=0.1).train()
    torch.manual_seed(1)
    model(torch.randn(8, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_image_size_is_that_of_the_rotations() -> None:
    assert small().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(ModelError, match=r"image size 96x96 .* built for 64x64"):
        small()(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ModelError, match="multiples of 32"):
        timm.create_model("mlla_t", img_size=100)


def test_timm_conventions() -> None:
    model = small().eval()
    features = model.forward_features(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (1, 32)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    with pytest.raises(ModelError, match="global_pool"):
        model.reset_classifier(3, "max")
    assert isinstance(model.get_classifier(), torch.nn.Identity)


def large_attention(scale: float) -> Mlla:
    """A network in which queries and keys of every block are larger by a factor."""
    torch.manual_seed(2)
    model = small().eval()
    for module in model.modules():
        if isinstance(module, RotaryLinearAttention):
            torch.nn.init.normal_(module.qk.weight, std=scale)
    return model


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_the_inference_form_is_exact(scale: float) -> None:
    model, images = large_attention(scale), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), inference_form(model)(images)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    assert sum(1 for m in model.modules() if type(m) is RotaryLinearAttention) == 2  # not changed


def test_the_inference_form_stays_in_the_range_of_float16() -> None:
    model, images = large_attention(2000.0), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert not model.half()(images.half()).isfinite().all()
        found = inference_form(large_attention(2000.0)).half()(images.half()).float()
    assert found.isfinite().all()
    assert (found - expected).norm() < 0.05 * expected.norm()
