from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from care.data import Dataset, open_dataset
from care.distributed import World
from care.loaders import TrainLoader, Transform, mixer, seed_epoch, validation_loader
from care.settings import TrainSettings
from pipeline.core.errors import DataError
from pipeline.core.preprocess import Preprocess

CPU = torch.device("cpu")
SPEC = Preprocess(32, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PLAIN: dict[str, Any] = {
    "mixup": 0,
    "cutmix": 0,
    "auto_augment": None,
    "random_erasing": 0,
    "color_jitter": 0,
}
STILL = {**PLAIN, "hflip": 0, "scale": (1, 1), "ratio": (1, 1)}


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    """Twenty images of one gray each: 0, 10, … 190."""
    for number in range(20):
        folder = tmp_path / ("low" if number < 10 else "top")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (10 * number,) * 3).save(folder / f"{number:02}.png")
    return open_dataset(f"folder:{tmp_path}", "train")


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"workers": 0, "batch_size": 4, **changes})


def grays(batch: torch.Tensor) -> list[int]:
    """Which of the images a batch holds."""
    return [round((value.item() * 0.25 + 0.5) * 25.5) for value in batch.mean((1, 2, 3))]


def test_a_step_takes_the_same_images_in_any_number_of_processes(images: Dataset) -> None:
    one = TrainLoader(settings(**STILL), images, SPEC, World(0, 1, CPU))
    alone = [grays(batch) for batch, _ in one.epoch(3)]
    halves = []
    for rank in range(2):
        loader = TrainLoader(settings(**STILL, batch_size=2), images, SPEC, World(rank, 2, CPU))
        assert (loader.steps, loader.images_per_step) == (one.steps, one.images_per_step)
        halves.append([grays(batch) for batch, _ in loader.epoch(3)])
    together = [sorted(a + b) for a, b in zip(*halves, strict=True)]
    assert together == [sorted(batch) for batch in alone]


def test_every_epoch_has_its_own_order_and_every_image_once(images: Dataset) -> None:
    loader = TrainLoader(settings(**STILL), images, SPEC, World(0, 1, CPU))
    first, second = ([g for batch, _ in loader.epoch(n) for g in grays(batch)] for n in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_depends_on_seed_and_epoch_alone(images: Dataset, workers: int) -> None:
    loader = TrainLoader(settings(workers=workers), images, SPEC, World(0, 1, CPU))
    mix = mixer(settings(), 2)
    assert mix is not None

    def epoch(number: int) -> torch.Tensor:
        seed_epoch(42, number, 0)
        return torch.cat([mix(*batch)[0] for batch in loader.epoch(number)])

    again, other = epoch(5), epoch(6)
    assert torch.equal(epoch(5), again)
    assert not torch.equal(other, again)


def test_repeated_augmentation_shows_an_image_several_times(images: Dataset) -> None:
    loader = TrainLoader(settings(**STILL, repeated_augmentation=2), images, SPEC, World(0, 1, CPU))
    seen = [g for batch, _ in loader.epoch(0) for g in grays(batch)]
    assert len(seen) == 20
    assert len(set(seen)) == 10


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original", "augmix-m5"]
)
def test_every_policy_survives_every_strength(images: Dataset, policy: str) -> None:
    loader = TrainLoader(settings(auto_augment=policy), images, SPEC, World(0, 1, CPU))
    seed_epoch(0, 0, 0)
    for number in range(15):
        for batch, _ in loader.epoch(number):
            assert batch.isfinite().all()


def test_too_few_images_for_a_step_are_an_error(images: Dataset) -> None:
    with pytest.raises(DataError, match="20 training images do not fill a step of 24"):
        TrainLoader(settings(accumulate=3), images, SPEC, World(0, 2, CPU))


def test_validation_shares_all_images_and_prepares_them_as_deployed(images: Dataset) -> None:
    seen = []
    for rank in range(3):
        for batch, targets in validation_loader(images, SPEC, 4, 0, World(rank, 3, CPU)):
            for image, target in zip(batch, targets, strict=True):
                seen.append(grays(image[None])[0])
                assert target == (seen[-1] >= 10)
    assert sorted(seen) == list(range(20))
    image = images.image(7)
    np.testing.assert_array_equal(Transform(SPEC)(image).numpy(), SPEC(image))


def test_gray_networks_get_one_channel(images: Dataset) -> None:
    gray = Preprocess(32, 1.0, "bicubic", (0.5,), (0.25,), "gray")
    loader = TrainLoader(settings(**PLAIN), images, gray, World(0, 1, CPU))
    batch, _ = next(loader.epoch(0))
    assert batch.shape == (4, 1, 32, 32)


def test_nothing_is_mixed_where_mixing_is_off() -> None:
    assert mixer(settings(mixup=0, cutmix=0), 3) is None
