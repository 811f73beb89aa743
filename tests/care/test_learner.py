from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from care.distributed import World
from care.factory import create_model
from care.learner import Learner
from care.losses import DistillationLoss
from care.settings import TrainSettings, read

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(scope="module")
def published(data: Path) -> dict[str, Any]:
    """Numbers of the published training program, see the file."""
    found: dict[str, Any] = json.loads((data / "recipe/published.json").read_text())
    return found


def learner(settings: TrainSettings, model: nn.Module, size: int = 1) -> Learner:
    loss = DistillationLoss(nn.CrossEntropyLoss())
    return Learner(settings, model, loss, STEPS, World(0, size, CPU))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))


def take(found: Learner, images: torch.Tensor, targets: torch.Tensor) -> None:
    found.model.train()
    found.learn(images, targets, step=True)


IMAGES = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
PLAIN: dict[str, Any] = {"lr": 0.1, "warmup_epochs": 0, "opt": "momentum", "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["care_s0", "care_s1", "care_s2"])
def test_learning_rate_and_groups_are_the_published_ones(
    name: str, published: dict[str, Any]
) -> None:
    settings = read(CONFIGS / f"train_{name}.yaml", {})
    model = create_model(name, drop_path_rate=settings.drop_path)
    parameters = dict(model.named_parameters())
    found = learner(settings, model)  # one process: the published rate does not follow the batch
    rates = []
    for epoch in range(settings.all_epochs):
        for step in (0, STEPS - 1):  # constant within an epoch
            found.go_to(epoch * STEPS + step)
            rates.append([group["lr"] for group in found.optimizer.param_groups])
    expected = np.repeat(published["learning_rates"], 2)
    assert len(expected) == 2 * 310
    for group in zip(*rates, strict=True):
        np.testing.assert_allclose(group, expected, rtol=1e-12)

    names = {id(parameter): key for key, parameter in parameters.items()}
    decayed = {
        group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
        for group in found.optimizer.param_groups
    }
    assert decayed.keys() == {0.0, 0.05}
    assert decayed[0.05] == published["decayed"][name]
    assert len(decayed[0.0]) + len(decayed[0.05]) == len(parameters)
    optimizer = found.optimizer
    assert type(optimizer) is torch.optim.AdamW
    stated = {key: optimizer.param_groups[0][key] for key in ("betas", "eps")}
    assert stated == {**published["optimizer"], "betas": tuple(published["optimizer"]["betas"])}


def test_the_published_recipe_augments_and_ends_as_published() -> None:
    """What the published program's arguments say; see docs/training.md."""
    for name in ("care_s0", "care_s1", "care_s2"):
        found = read(CONFIGS / f"train_{name}.yaml", {})
        assert (found.model, found.all_epochs, found.lr) == (name, 310, 2.5e-3)
        assert found.learning_rate(96) == 2.5e-3
        assert (found.train_interpolation, found.exif, found.decoder) == (
            "random", "ignore", "pillow",
        )  # fmt: skip
        assert found.validation == found.data  # its own split; no training image is held out
        assert (found.precision, found.channels_last, found.compile) == ("fp32", False, False)
        assert found.ema_decay is None
        assert found.cudnn_benchmark
        assert (found.mixup, found.cutmix, found.mix_probability, found.mix_switch) == (
            0.8, 1.0, 1.0, 0.5,
        )  # fmt: skip
        assert (found.auto_augment, found.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)


def test_a_step_without_a_finite_gradient_changes_nothing() -> None:
    found = learner(TrainSettings(**PLAIN), linear())
    take(found, IMAGES, TARGETS)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    broken = IMAGES.clone()
    broken[0, 0, 0, 0] = float("nan")
    take(found, broken, TARGETS)
    after = found.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (found.steps, found.skipped, found.skipped_in_row) == (2, 1, 1)
    take(found, IMAGES, TARGETS)
    assert (found.skipped, found.skipped_in_row) == (1, 0)
    assert not torch.equal(found.model.state_dict()["1.weight"], before["1.weight"])


def test_gradients_are_clipped_by_their_norm() -> None:
    moved = []
    for clip in (None, 1e-3):
        found = learner(TrainSettings(**PLAIN, momentum=0.0, clip_grad=clip), linear())
        before = found.model[1].weight.detach().clone()
        take(found, IMAGES, TARGETS)
        moved.append(float((found.model[1].weight - before).detach().norm()))
        assert found.gradient_norm > 0.1
    assert moved[1] <= 0.1 * 1e-3 * 1.001 < moved[0]


def test_what_is_restored_follows_the_settings_that_were_amended() -> None:
    first = learner(TrainSettings(**{**PLAIN, "weight_decay": 0.1}), linear())
    take(first, IMAGES, TARGETS)
    amended = TrainSettings(**{**PLAIN, "weight_decay": 0.2, "lr": 0.05})
    second = learner(amended, linear())
    second.restore(first.state())
    assert second.steps == 1
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.0, 0.2}
    fresh = learner(amended, linear())
    fresh.go_to(1)
    assert second.learning_rate == fresh.learning_rate < 0.05
    saved, restored = first.state()["optimizer"]["state"], second.state()["optimizer"]["state"]
    for number, state in saved.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(restored[number][key]))
