"""CPU time of a training image, from the file to the pixels that the device gets.

    python benchmarks/dataloader.py
    python benchmarks/dataloader.py --images 200 --rounds 5 --data folder:/data/imagenet

Compared, in turns and in one process, on photographs-like JPEGs of 500 x 375 (or those of --data):

    plain           torchvision's ImageFolder and Pillow, timm's transforms, float32 and normalized
    decode + crop   Pillow's decoder, timm's random crop, nothing else
    exact           ours as the published recipes take it
    fast            ours with `decoder: torchvision`

Prints milliseconds of CPU time an image, ratios to plain and to decode + crop (the median over the
rounds, and its quarters), and a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.datasets import ImageFolder

from care import sampling
from care.data import Dataset, open_dataset
from care.loaders import Augmented, augmentation, mend
from care.sampling import Place
from care.settings import TrainSettings
from pipeline.core.preprocess import Preprocess

SPEC = Preprocess(224, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_images(folder: Path, count: int) -> None:
    """JPEGs with the detail of photographs: noise at every scale."""
    generator = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for number in range(count):
        image = np.zeros((375, 500, 3))
        for side in (4, 12, 40, 125):
            small = generator.uniform(0, 255, (side * 3 // 4, side, 3)).astype(np.uint8)
            image += np.asarray(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC))
        Image.fromarray((image / 4).astype(np.uint8)).save(
            folder / "class" / f"{number:04}.JPEG", quality=96
        )


def ways(folder: Path, dataset: Dataset) -> dict[str, Callable[[int], object]]:
    """For each way what it does with an image."""
    settings = TrainSettings(train_interpolation="random", exif="ignore")
    fast_settings = settings.model_copy(update={"decoder": "torchvision"})
    transform = create_transform(
        224,
        is_training=True,
        auto_augment=settings.auto_augment,
        interpolation="random",
        re_prob=settings.random_erasing,
        re_mode="pixel",
    )
    plain = ImageFolder(str(folder), mend(transform))
    crop = RandomResizedCropAndInterpolation(224, interpolation="random")
    exact, fast = (
        Augmented(dataset, transform, chosen, crop_)
        for chosen in (settings, fast_settings)
        for crop_, transform in [augmentation(chosen, SPEC)]
    )
    positions = itertools.count()

    def seeded(augmented: Augmented) -> Callable[[int], object]:
        return lambda index: augmented[Place(0, next(positions), index)]

    return {
        "plain": plain.__getitem__,
        "decode + crop": lambda index: crop(dataset.image(index)),
        "exact": seeded(exact),
        "fast": seeded(fast),
    }


def milliseconds(way: Callable[[int], object], images: int) -> float:
    """CPU time an image."""
    start = time.process_time()
    for index in range(images):
        way(index)
    return 1000 * (time.process_time() - start) / images


def _ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """The median over the rounds of a ratio, and its quarters."""
    ratios = [one / other for one, other in zip(values, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


@click.command()
@click.option("--images", default=100, show_default=True, help="Images of a round.")
@click.option(
    "--rounds",
    default=7,
    show_default=True,
    type=click.IntRange(2),
    help="Turns that each way gets.",
)
@click.option("--data", help="folder:PATH of images instead of made ones.")
def main(images: int, rounds: int, data: str | None) -> None:
    """Print the CPU time of a training image, by way of loading it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dataloader-") as name:
        folder = Path(data.removeprefix("folder:")) if data else Path(name)
        if not data:
            make_images(folder, images)
        dataset = open_dataset(f"folder:{folder}", "train")
        dataset.exif = "ignore"
        named = ways(folder, dataset)
        for way in named.values():
            milliseconds(way, min(10, images))
        found: dict[str, list[float]] = {name: [] for name in named}
        for _ in range(rounds):
            for name, way in named.items():
                found[name].append(milliseconds(way, images))
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        click.echo(
            f"{name:14} {medians[name]:6.2f} ms   {_ratio(values, found['plain'])} of plain   "
            f"{_ratio(values, found['decode + crop'])} of decode + crop"
        )
    place = Place(0, 0, 0)
    start = time.process_time()
    for _ in range(1000):
        sampling.seed_sample(0, place)
    medians["seeding"] = time.process_time() - start
    click.echo(f"{'seeding':14} {medians['seeding']:6.2f} ms")
    click.echo(json.dumps({name: round(value, 4) for name, value in medians.items()}))


if __name__ == "__main__":
    main()
