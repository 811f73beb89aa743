from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from torch import nn

import care.networks  # noqa: F401  registers our networks with timm
from care.model import AttentionMixer, Care
from pipeline.core.errors import ModelError

Images = Callable[[int, int], npt.NDArray[np.float32]]
Maker = Callable[[str], nn.Module]

PUBLISHED = ("care_s0", "care_s1", "care_s2", "mlla_t")
PARAMETERS = {
    "care_s0": 7_340_000,
    "care_s1": 9_602_424,
    "care_s2": 19_481_288,
    "mlla_t": 24_392_200,
}


def vectors(data: Path, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Outputs of the published implementation."""
    with np.load(data / f"parity/{name}.npz") as archive:
        return dict(archive)


def tiny(**kwargs: object) -> Care:
    model = timm.create_model("care_tiny", **kwargs)
    assert isinstance(model, Care)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_the_published_names_and_shapes(name: str, data: Path) -> None:
    published = json.loads((data / "parity/state_dict_shapes.json").read_text())[name]
    state = timm.create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str) -> None:
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("resolution", [224, 256])
@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_those_of_the_published_implementation(
    name: str, resolution: int, parity_model: Maker, images: Images, data: Path
) -> None:
    expected = vectors(data, name)
    if f"logits_{resolution}" not in expected:
        pytest.skip("MLLA's rotary positions fix its image size")
    with torch.no_grad():
        logits = parity_model(name)(torch.from_numpy(images(2, resolution)))
    assert np.abs(logits.numpy() - expected[f"logits_{resolution}"]).max() <= 2e-5


@pytest.mark.parametrize("name", ["care_s0", "care_s1", "care_s2"])
def test_stages_are_those_of_the_published_implementation(
    name: str, parity_model: Maker, images: Images, data: Path
) -> None:
    expected = vectors(data, name)
    model = parity_model(name)
    assert isinstance(model, Care)
    with torch.no_grad():
        x = model.stem(torch.from_numpy(images(2, 224)))
        np.testing.assert_allclose(x.mean((2, 3)), expected["stem_mean_224"], 1e-5, 2e-5)
        for i, stage in enumerate(model.stages):
            x = stage(x)
            np.testing.assert_allclose(x.mean((2, 3)), expected[f"stage{i}_mean_224"], 1e-5, 2e-5)


def test_training_gives_both_heads_and_gradients_reach_every_parameter(images: Images) -> None:
    model = tiny(init_value=0.1).train()
    logits, distilled = model(torch.from_numpy(images(2, 64)))
    assert logits.shape == distilled.shape == (2, 10)
    (logits.square().sum() + distilled.square().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_evaluation_gives_the_mean_of_both_heads(parity_model: Maker, images: Images) -> None:
    model = parity_model("care_tiny")
    assert isinstance(model, Care)
    x = torch.from_numpy(images(2, 64))
    with torch.no_grad():
        pooled = model.forward_features(x).mean((2, 3))
        expected = (model.head(pooled) + model.dist_head(pooled)) / 2
        assert torch.equal(model(x), expected)


def test_mixed_precision_keeps_the_attention_in_float32(images: Images) -> None:
    torch.manual_seed(0)
    model = tiny().eval()
    # Queries and keys so large that the published form overflows in float16.
    for module in model.modules():
        if isinstance(module, AttentionMixer):
            assert module.qk.bias is not None
            module.qk.bias.data.fill_(300.0)
    x = torch.from_numpy(images(2, 64))
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
    assert mixed.isfinite().all()
    assert (mixed.float() - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("size", [(224, 256), (32, 32), (96, 64)])
def test_multiples_of_32_work(size: tuple[int, int]) -> None:
    features = tiny().eval().forward_features(torch.zeros(1, 3, *size))
    assert features.shape[2:] == (size[0] // 32, size[1] // 32)


def test_other_sizes_are_refused_with_the_nearest_that_fits() -> None:
    with pytest.raises(ModelError, match=r"image size 60x100 .* multiples of 32, such as 64x96"):
        tiny()(torch.zeros(1, 3, 60, 100))


def test_timm_conventions() -> None:
    model = tiny(num_classes=7, in_chans=1, drop_path_rate=0.1)
    assert model(torch.zeros(2, 1, 64, 64))[0].shape == (2, 7)
    model.eval()
    features = model.forward_features(torch.zeros(2, 1, 64, 64))
    assert features.shape[1] == model.num_features == 384
    pre_logits = model.forward_head(features, pre_logits=True)
    assert isinstance(pre_logits, torch.Tensor)
    assert pre_logits.shape == (2, 384)
    model.reset_classifier(3)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 3)
    assert [layer.out_features for layer in model.get_classifier()] == [3, 3]
    model.reset_classifier(0)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 384)
    with pytest.raises(ModelError, match="global_pool 'max'"):
        model.reset_classifier(3, "max")
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if "gamma" in n}


def test_default_cfg_is_the_published_evaluation() -> None:
    cfg = timm.create_model("care_s0").default_cfg
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["crop_pct"] == 0.875
    assert cfg["interpolation"] == "bicubic"
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)


def test_features_only() -> None:
    model = timm.create_model("care_tiny", features_only=True).eval()
    shapes = [tuple(x.shape[1:]) for x in model(torch.zeros(1, 3, 64, 64))]
    assert shapes == [(32, 16, 16), (64, 8, 8), (64, 4, 4), (384, 2, 2)]
    assert model.feature_info.channels() == [32, 64, 64, 384]


def test_gradient_checkpointing_changes_no_gradient(images: Images) -> None:
    x = torch.from_numpy(images(2, 64))

    def gradient(checkpointing: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = tiny(init_value=0.1).train()
        model.set_grad_checkpointing(checkpointing)
        model(x)[0].sum().backward()
        weight = model.stem[0].weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_layer_decay_sees_every_block() -> None:
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(tiny(), layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    # Stem, eight blocks (a step down counts with the block after it), and the heads.
    assert len(scales) == 10


def test_initialization() -> None:
    model = tiny()
    assert all((b == 0).all() for n, b in model.named_parameters() if n.endswith("fc.bias"))
    gammas = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 7
    assert all((gamma == 1e-6).all() for gamma in gammas)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_that_are_not_there_are_not_made_up(name: str) -> None:
    with pytest.raises(ModelError, match=r"care\.checkpoint\.load"):
        timm.create_model(name, pretrained=True)


def test_dimensions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="three times"):
        Care((1,), feature_dims=(20,), mem_dims=(8,), ratios=((2, 2),), head_dims=(None,))
    with pytest.raises(ModelError, match="no multiple of the attention head width"):
        Care((1,), feature_dims=(24,), mem_dims=(8,), ratios=((2, 2),), head_dims=(16,))
