from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from care import sampling, warps
from care.data import Dataset, open_dataset
from care.distributed import World
from care.loaders import Finish, TrainLoader, Transform, Validation, augmentation, mixer
from care.settings import TrainSettings
from pipeline.core.errors import DataError, UnavailableError
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
    """Which of the images a batch of 8-bit pixels holds."""
    return [round(value.item() / 10) for value in batch.float().mean((1, 2, 3))]


def epoch(loader: TrainLoader, number: int) -> list[list[int]]:
    """Which images the steps of an epoch take."""
    batches = loader.batches(number * loader.steps, (number + 1) * loader.steps)
    return [grays(batch.pixels) for batch in batches]


def test_a_step_takes_the_same_images_in_any_number_of_processes(images: Dataset) -> None:
    one = TrainLoader(settings(**STILL), images, SPEC, World(0, 1, CPU))
    alone = epoch(one, 3)
    halves = []
    for rank in range(2):
        loader = TrainLoader(settings(**STILL, batch_size=2), images, SPEC, World(rank, 2, CPU))
        assert (loader.steps, loader.images_per_step) == (one.steps, one.images_per_step)
        halves.append(epoch(loader, 3))
    together = [sorted(a + b) for a, b in zip(*halves, strict=True)]
    assert together == [sorted(batch) for batch in alone]


def test_every_epoch_has_its_own_order_and_every_image_once(images: Dataset) -> None:
    loader = TrainLoader(settings(**STILL), images, SPEC, World(0, 1, CPU))
    first, second = ([gray for batch in epoch(loader, n) for gray in batch] for n in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def finished(loader: TrainLoader, finish: Finish, first: int, last: int) -> list[torch.Tensor]:
    """What the network sees and learns in some steps of a run."""
    seen = []
    for step, batch in enumerate(loader.batches(first, last), start=first):
        sampling.seed_step(42, step, 0, 0)
        seen += list(finish(batch))
    return seen


def test_pixels_do_not_depend_on_the_workers_or_on_where_a_run_goes_on(images: Dataset) -> None:
    """0, 1 and 2 workers used to give three results."""
    finish = Finish(settings(), SPEC, 2, CPU)
    whole = []
    for workers in (0, 1, 2):
        loader = TrainLoader(settings(workers=workers), images, SPEC, World(0, 1, CPU))
        whole.append(finished(loader, finish, 0, 2 * loader.steps))
    for other in whole[1:]:
        assert all(torch.equal(a, b) for a, b in zip(whole[0], other, strict=True))
    rest = finished(loader, finish, 3, 2 * loader.steps)
    assert all(torch.equal(a, b) for a, b in zip(whole[0][6:], rest, strict=True))
    assert not torch.equal(whole[0][0], whole[0][2 * loader.steps])  # another epoch


def test_erasing_comes_after_mixing(images: Dataset) -> None:
    """As in the published code: what is erased in an image is noise in it alone."""
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    pixels[:2] = 255
    loader = TrainLoader(settings(), images, SPEC, World(0, 1, CPU))
    batch = next(loader.batches(0, 1))
    finish = Finish(settings(cutmix=0, random_erasing=1), SPEC, 2, CPU)
    sampling.seed_step(0, 0, 0, 0)
    mixed, _ = finish(batch._replace(pixels=pixels))
    plain = [torch.mode(image.flatten()).values for image in mixed]
    noisy = [(image != value).any(0) for image, value in zip(mixed, plain, strict=True)]
    assert all(mask.any() for mask in noisy)
    assert not any(torch.equal(noisy[i], noisy[3 - i]) for i in range(2))


def test_mixed_pixels_are_whole_numbers_as_in_the_published_code(images: Dataset) -> None:
    batch = next(TrainLoader(settings(), images, SPEC, World(0, 1, CPU)).batches(0, 1))
    finish = Finish(settings(cutmix=0, random_erasing=0), SPEC, 2, CPU)
    mixed, targets = finish(batch)
    values = (mixed * 0.25 + 0.5) * 255
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-3)
    assert targets.shape == (4, 2)
    still, sharp = finish(batch, mixing=False)
    torch.testing.assert_close((still * 0.25 + 0.5) * 255, batch.pixels.float(), rtol=0, atol=1e-3)
    assert torch.equal(sharp.argmax(1), batch.targets)


def test_unreadable_images_are_replaced_and_told_where_that_is_asked_for(
    images: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "low/03.png").write_bytes(b"no image")
    for workers in (0, 1):
        loader = TrainLoader(
            settings(**STILL, workers=workers, corrupt="skip"), images, SPEC, World(0, 1, CPU)
        )
        batches = list(loader.batches(0, loader.steps))
        told = [problem for batch in batches for problem in batch.unreadable]
        assert len(told) == 1
        assert "low/03.png is not an image" in told[0]
        taken = sorted(gray for batch in batches for gray in grays(batch.pixels))
        assert taken == [0, 1, 2, 4, 4, *range(5, 20)]
        loader = TrainLoader(settings(**STILL, workers=workers), images, SPEC, World(0, 1, CPU))
        with pytest.raises(DataError, match=r"^[^\n]*low/03\.png is not an image"):
            list(loader.batches(0, loader.steps))


def test_the_names_of_a_step_are_those_of_its_images(images: Dataset) -> None:
    loaders = [
        TrainLoader(settings(**STILL, batch_size=2), images, SPEC, World(rank, 2, CPU))
        for rank in range(2)
    ]
    for rank, loader in enumerate(loaders):
        for step, batch in enumerate(loader.batches(0, 7)):
            expected = [f"{number:02}.png" for number in grays(batch.pixels)]
            assert [name[-6:] for name in loaders[0].names(step, rank)] == expected


def test_a_worker_that_was_killed_is_one_line(images: Dataset) -> None:
    class Deadly:
        def __call__(self, image: Image.Image) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    loader = TrainLoader(settings(workers=1), images, SPEC, World(0, 1, CPU))
    loader.augmented.transform = Deadly()
    with pytest.raises(UnavailableError, match=r"^[^\n]*--workers[^\n]*$"):
        list(loader.batches(0, 1))


def test_repeated_augmentation_shows_an_image_several_times(images: Dataset) -> None:
    loader = TrainLoader(settings(**STILL, repeated_augmentation=2), images, SPEC, World(0, 1, CPU))
    seen = [gray for batch in epoch(loader, 0) for gray in batch]
    assert len(seen) == 20
    assert len(set(seen)) == 10


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "original", "augmix-m5"]
)
def test_every_policy_survives_every_strength(images: Dataset, policy: str) -> None:
    loader = TrainLoader(settings(auto_augment=policy), images, SPEC, World(0, 1, CPU))
    assert sum(1 for _ in loader.batches(0, 15 * loader.steps)) == 15 * loader.steps


def test_too_few_images_for_a_step_are_an_error(images: Dataset) -> None:
    with pytest.raises(DataError, match="20 training images do not fill a step of 24"):
        TrainLoader(settings(accumulate=3), images, SPEC, World(0, 2, CPU))


def test_validation_shares_all_images_and_prepares_them_as_deployed(images: Dataset) -> None:
    seen = []
    for rank in range(3):
        for batch, targets in Validation(images, SPEC, 4, 0, World(rank, 3, CPU)):
            for image, target in zip(batch, targets, strict=True):
                seen.append(grays((image[None] * 0.25 + 0.5) * 255)[0])
                assert target == (seen[-1] >= 10)
    assert sorted(seen) == list(range(20))
    image = images.image(7)
    np.testing.assert_array_equal(Transform(SPEC)(image).numpy(), SPEC(image))


def test_pixels_stay_as_they_lie_in_memory(images: Dataset) -> None:
    for decoder in ("pillow", "torchvision"):
        loader = TrainLoader(settings(decoder=decoder), images, SPEC, World(0, 1, CPU))
        pixels = next(loader.batches(0, 1)).pixels
        assert pixels.shape[1:] == (3, SPEC.size, SPEC.size)
        assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_only_the_recipes_that_allow_a_level_take_faster_operations() -> None:
    shears = {}
    for decoder in ("pillow", "torchvision"):
        _, transform = augmentation(settings(decoder=decoder, auto_augment="rand-m9"), SPEC)
        shears[decoder] = {one.name: one.aug_fn for one in warps.operations(transform)}["ShearX"]
    assert shears["pillow"] is auto_augment.shear_x
    assert shears["torchvision"] is not auto_augment.shear_x


def test_gray_networks_get_one_channel(images: Dataset) -> None:
    gray = Preprocess(32, 1.0, "bicubic", (0.5,), (0.25,), "gray")
    loader = TrainLoader(settings(**PLAIN), images, gray, World(0, 1, CPU))
    batch = next(loader.batches(0, 1))
    assert batch.pixels.shape == (4, 1, 32, 32)
    assert Finish(settings(**PLAIN), gray, 2, CPU)(batch)[0].shape == (4, 1, 32, 32)


def test_nothing_is_mixed_where_mixing_is_off() -> None:
    assert mixer(settings(mixup=0, cutmix=0), 3) is None
