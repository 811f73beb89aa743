"""Batches for training and validation, from timm's parts.

The order of the images depends on the seed and the epoch alone, and a step takes the same images
for any number of processes; randomness inside an epoch is seeded by `seed_epoch`. So an interrupted
run goes on exactly as it would have.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torchvision.transforms import Compose, Grayscale

from care.data import Dataset, Subset
from care.distributed import World
from care.settings import TrainSettings
from pipeline.core.errors import DataError, PipelineError
from pipeline.core.preprocess import Preprocess


class Transform:
    """The evaluation transform of a `Preprocess`, as a float32 tensor (depth, size, size)."""

    def __init__(self, spec: Preprocess) -> None:
        self.spec = spec

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare an RGB image."""
        return torch.from_numpy(self.spec(image))


class Batches:
    """Batches of a loader whose workers' mistakes stay readable.

    Args:
        loader: Gives (images, targets).
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self.loader
        except PipelineError as error:
            # A worker's error arrives with its traceback as message; the last line is the error.
            message = str(error).strip().splitlines()[-1]
            raise type(error)(message.removeprefix(f"{_full_name(error)}: ")) from error


class TrainLoader:
    """Augmented, shuffled batches of this process's share of the images.

    Args:
        settings: Sampling, augmentation, batch size and workers.
        dataset: Training images; its transform is set.
        spec: Size, mean, std and channels of the network's input.
        world: This process among its siblings.

    Attributes:
        steps: Optimizer steps in an epoch; images that do not fill one are left out.
        images_per_step: Images of a step, of all processes together.
        images_per_epoch: Images of an epoch, of all processes together.

    Raises:
        DataError: There are fewer images than one step of all processes takes.
    """

    def __init__(
        self, settings: TrainSettings, dataset: Dataset, spec: Preprocess, world: World
    ) -> None:
        on_gpu = world.device.type == "cuda"
        dataset.transform = _augmentation(settings, spec, on_gpu)
        self.seed = settings.seed
        group = settings.batch_size * settings.accumulate
        self.device = world.device
        self.sampler = _sampler(settings, dataset, world)
        self.steps = len(self.sampler) // group
        self.images_per_step = group * world.size
        self.images_per_epoch = self.steps * self.images_per_step
        if not self.steps:
            raise DataError(
                f"the {len(dataset)} training images do not fill a step of {self.images_per_step}: "
                "lower batch_size"
            )
        self.loader: DataLoader[Any] = DataLoader(
            cast(Any, dataset),  # map-style by its methods, not by inheritance
            batch_size=settings.batch_size,
            sampler=self.sampler,
            num_workers=settings.workers,
            collate_fn=fast_collate if on_gpu else None,
            pin_memory=on_gpu,
            drop_last=True,
            generator=torch.Generator(),
        )
        self.batches = Batches(self.loader)
        if on_gpu:
            # Normalization and random erasing on the GPU, beside the transfer of the next batch.
            prefetched = PrefetchLoader(
                self.loader,
                mean=spec.mean,
                std=spec.std,
                channels=spec.depth,
                device=world.device,
                re_prob=settings.random_erasing,
                re_mode="pixel",
            )
            self.batches = Batches(prefetched)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The (images, targets) of one epoch, on the device."""
        # Both samplers shuffle by this number alone (plain sampling adds its own seed, which is 0).
        self.sampler.set_epoch(self.seed + number)
        # Workers are seeded from this generator, so they are started anew for every epoch.
        self.loader.generator.manual_seed(torch.initial_seed())
        for images, targets in self.batches:
            yield images.to(self.device), targets.to(self.device)


def validation_loader(
    dataset: Dataset, spec: Preprocess, batch_size: int, workers: int, world: World
) -> Batches:
    """This process's share of `dataset`, prepared as in deployment; no image left out or twice."""
    share = Subset(dataset, np.arange(world.rank, len(dataset), world.size))
    share.transform = Transform(spec)
    pin = world.device.type == "cuda"
    return Batches(DataLoader(cast(Any, share), batch_size, num_workers=workers, pin_memory=pin))


def mixer(settings: TrainSettings, num_classes: int) -> Mixup | None:
    """Mixup, CutMix or both, with label smoothing; None where both are off."""
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.mix_switch,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed every random generator from these three numbers alone.

    Nothing random is carried from one epoch to the next, so none of it has to be saved.
    """
    value = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # timm's Mixup and RandAugment draw from numpy's global generator
    torch.manual_seed(value)


def _full_name(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _augmentation(settings: TrainSettings, spec: Preprocess, on_gpu: bool) -> Any:
    transform = create_transform(
        (spec.depth, spec.size, spec.size),
        is_training=True,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        vflip=settings.vflip,
        color_jitter=settings.color_jitter or None,
        auto_augment=settings.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=settings.random_erasing,
        re_mode="pixel",
        use_prefetcher=on_gpu,
    )
    for step in transform.transforms:
        for operation in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return Compose([Grayscale(), transform]) if spec.channels == "gray" else transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep some bits of every pixel; none, which strong policies ask for, leaves black.

    Timm's own fails there: Pillow 13 refuses 0 bits, which earlier releases took.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _sampler(settings: TrainSettings, dataset: Dataset, world: World) -> Any:
    places = {"num_replicas": world.size, "rank": world.rank}
    if settings.repeated_augmentation:
        repeats = settings.repeated_augmentation
        sampler: Sampler[int] = RepeatAugSampler(dataset, num_repeats=repeats, **places)
        return sampler
    return DistributedSampler(dataset, drop_last=True, **places)  # type: ignore[arg-type]
