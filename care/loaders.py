"""Batches for training and validation.

Workers decode, crop and augment, and hand over 8-bit pixels; what concerns a whole batch (mixing,
normalizing, erasing) is done on the device. Nothing random depends on which worker does what, see
`care.sampling`, so that workers live as long as the run and their number does not matter.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms import Compose, Grayscale

from care import sampling, warps
from care.data import Dataset, Subset
from care.decoding import DecodeAndCrop
from care.distributed import World
from care.sampling import Place, Plan
from care.settings import TrainSettings
from pipeline.core import signals
from pipeline.core.errors import ConfigError, DataError, PipelineError, UnavailableError
from pipeline.core.preprocess import Preprocess

_LATER = 15
"""Seconds from SIGTERM to the end of a worker."""

_MOST_ATTEMPTS = 100
"""Images tried in place of one that cannot be read."""


class Transform:
    """The evaluation transform of a `Preprocess`, as a float32 tensor (depth, size, size)."""

    def __init__(self, spec: Preprocess) -> None:
        self.spec = spec

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare an RGB image."""
        return torch.from_numpy(self.spec(image))


class Sample(NamedTuple):
    """An augmented training image.

    Attributes:
        pixels: uint8 of shape (depth, size, size).
        label: Class number.
        unreadable: What was wrong with the image that this one stands in for; "" for none.
    """

    pixels: Tensor
    label: int
    unreadable: str = ""


class Batch(NamedTuple):
    """A part of a step.

    Attributes:
        pixels: uint8 of shape (images, depth, size, size).
        targets: int64 of shape (images,).
        unreadable: What was wrong with each image that was replaced by another.
    """

    pixels: Tensor
    targets: Tensor
    unreadable: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """Copied into page-locked memory; the DataLoader calls it."""
        return Batch(self.pixels.pin_memory(), self.targets.pin_memory(), self.unreadable)


class Augmented:
    """Training images as the workers see them: addressed by their place in an epoch.

    Args:
        dataset: The images.
        transform: Makes an image uint8 (depth, size, size), with global random numbers.
        settings: Give the seed, and say what to do with images that cannot be read.
        crop: Decodes an image and takes a part of it, before `transform`; None where that one
            takes whole images.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Any], Tensor],
        settings: TrainSettings,
        crop: DecodeAndCrop | None = None,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.crop = crop
        self.seed, self.skips = settings.seed, settings.corrupt == "skip"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Sample:
        unreadable = ""
        index = place.image
        for attempt in itertools.count(1):
            sampling.seed_sample(self.seed, place)
            try:
                pixels = self.transform(self._image(index))
                return Sample(pixels, self.dataset.label(index), unreadable)
            except DataError as error:
                if not self.skips or attempt == _MOST_ATTEMPTS:
                    raise
                # Those tried in its place are told of at their own places.
                unreadable = unreadable or str(error)
            # The next one in the dataset: as good as any, and the same in every run.
            index = (index + 1) % len(self.dataset)
        raise AssertionError("a loop without an end ended")

    def _image(self, index: int) -> Image.Image:
        """An image, or the part of it that was chosen."""
        if self.crop is None:
            return self.dataset.image(index)
        encoded = self.dataset.encoded(index)
        if encoded is None:
            raise ConfigError(
                "--decoder torchvision reads image files, and this dataset has none: take pillow"
            )
        return self.crop(*encoded)


class TrainLoader:
    """Augmented, shuffled batches of this process's share of the images.

    Args:
        settings: Sampling, augmentation, batch size and workers.
        dataset: Training images.
        spec: Size, mean, std and channels of the network's input.
        world: This process among its siblings.

    Attributes:
        plan: Which images a step takes.
        steps: Optimizer steps in an epoch; images that do not fill one are left out.
        images_per_step: Images of a step, of all processes together.
        images_per_epoch: Images of an epoch, of all processes together.

    Raises:
        DataError: There are fewer images than one step of all processes takes.
    """

    def __init__(
        self, settings: TrainSettings, dataset: Dataset, spec: Preprocess, world: World
    ) -> None:
        self.dataset = dataset
        self.device = world.device
        self.workers = settings.workers
        crop, transform = augmentation(settings, spec)
        self.augmented = Augmented(dataset, transform, settings, crop)
        self.plan = Plan(
            images=len(dataset),
            batch=settings.batch_size,
            parts=settings.accumulate,
            rank=world.rank,
            size=world.size,
            seed=settings.seed,
            repeats=settings.repeated_augmentation,
        )
        self.steps, self.images_per_step = self.plan.steps, self.plan.total
        self.images_per_epoch = self.steps * self.images_per_step
        if not self.steps:
            raise DataError(
                f"the {len(dataset)} training images do not fill a step of {self.images_per_step}: "
                "lower batch_size"
            )

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The parts of the steps from `first` to before `last`, counted from the run's start."""
        if first >= last:
            return iter(())
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.augmented),  # map-style by its methods, not by inheritance
            batch_sampler=sampling.Batches(self.plan, first, last),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            prefetch_factor=4 if self.workers else None,
            generator=torch.Generator(),
        )
        return readable(loader)

    def names(self, step: int, rank: int) -> list[str]:
        """Names of the images that a step takes in a process."""
        order = self.plan.order(step // self.steps)
        parts = range(self.plan.parts)
        places = itertools.chain.from_iterable(self.plan.positions(step, p, rank) for p in parts)
        return [self.dataset.name(int(order[place])) for place in places]


class Validation:
    """This process's share of the validation images, prepared as in deployment.

    Args:
        dataset: All of them; none is left out or taken twice.
        spec: How they are prepared.
        batch_size: Images of a batch.
        workers: Processes that prepare them.
        world: This process among its siblings.
    """

    def __init__(
        self, dataset: Dataset, spec: Preprocess, batch_size: int, workers: int, world: World
    ) -> None:
        share = Subset(dataset, np.arange(world.rank, len(dataset), world.size))
        share.transform = Transform(spec)
        self.loader: DataLoader[Any] = DataLoader(
            cast(Any, share),
            batch_size,
            num_workers=workers,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return readable(self.loader)


class Finish:
    """What is done with a whole batch, on the device: mix, normalize, erase; in this order.

    Args:
        settings: Say how much is mixed and erased.
        spec: Mean and standard deviation.
        num_classes: Of the targets that are mixed.
        device: Where it is done.

    Attributes:
        mix: Mixup and CutMix, or None where both are off.
    """

    def __init__(
        self, settings: TrainSettings, spec: Preprocess, num_classes: int, device: torch.device
    ) -> None:
        self.device = device
        self.mix = mixer(settings, num_classes)
        self.mean, self.std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1) * 255
            for values in (spec.mean, spec.std)
        )
        self.erase = None
        if settings.random_erasing:
            self.erase = RandomErasing(settings.random_erasing, mode="pixel", device=device)

    def __call__(self, batch: Batch, *, mixing: bool = True) -> tuple[Tensor, Tensor]:
        """Images float32 (images, depth, size, size), and targets as the loss takes them.

        Args:
            batch: Of the workers.
            mixing: Mix the images, where the settings do; the targets are smoothed either way.
        """
        images = batch.pixels.to(self.device, non_blocking=True).float()
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.mix is not None:
            self.mix.mixup_enabled = mixing
            images, targets = self.mix(images, targets)
            images = images.round_()  # the published code mixes 8-bit pixels
        images = images.sub_(self.mean).div_(self.std)
        return (self.erase(images) if self.erase is not None else images), targets


def readable(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; mistakes of its workers become errors of one line."""
    iterator = iter(loader)
    try:
        yield from iterator
    except PipelineError as error:
        # A worker's error arrives with its traceback as message; the last line is the error.
        message = str(error).strip().splitlines()[-1]
        raise type(error)(message.removeprefix(f"{_full_name(error)}: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UnavailableError(
            f"a process that decodes images ended unexpectedly ({str(error).splitlines()[0]}): "
            "memory may have run out, lower --workers; then go on with --resume"
        ) from error
    finally:
        # Workers end when nobody knows the iterator any more; tracebacks would know it for long.
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


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


def augmentation(
    settings: TrainSettings, spec: Preprocess
) -> tuple[DecodeAndCrop | None, Callable[[Any], Tensor]]:
    """What is done with each image by itself: to uint8 (depth, size, size).

    Returns:
        What decodes and crops, if not Pillow does; and what is done after that.
    """
    interpolation = settings.train_interpolation
    transform = create_transform(
        (spec.depth, spec.size, spec.size),
        is_training=True,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        vflip=settings.vflip,
        color_jitter=settings.color_jitter or None,
        auto_augment=settings.auto_augment,
        # By "random" timm draws bilinear or bicubic for each image, in RandAugment too.
        interpolation=spec.interpolation if interpolation == "model" else interpolation,
        mean=spec.mean,
        std=spec.std,
        use_prefetcher=True,  # ends with 8-bit pixels
    )
    mend(transform)
    steps = transform.transforms[:-1]  # the last would make a tensor in its own way
    gray = [Grayscale()] if spec.channels == "gray" else []
    if settings.decoder == "pillow":
        return None, Compose([*gray, *steps, _as_tensor])
    kinds = {"model": (spec.interpolation,), "random": ("bilinear", "bicubic")}
    crop = DecodeAndCrop(
        spec.size,
        settings.scale,
        settings.ratio,
        kinds.get(interpolation, (interpolation,)),
        settings.exif,
    )
    warps.hasten(transform)
    return crop, Compose([*gray, *steps[1:], _as_tensor])


def mend(transform: Compose) -> Compose:
    """Let the policies of timm's transforms take every strength with Pillow 13; in place."""
    for operation in warps.operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _as_tensor(image: Image.Image) -> Tensor:
    """uint8 of shape (depth, size, size), of which the channels of a pixel lie side by side."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep some bits of every pixel; none, which strong policies ask for, leaves black.

    Timm's own fails there: Pillow 13 refuses 0 bits, which earlier releases took.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _collate(samples: list[Sample]) -> Batch:
    # Stacked as they lie in memory; the device turns them, if the network wants them so.
    pixels = torch.stack([sample.pixels.permute(1, 2, 0) for sample in samples])
    pixels = pixels.permute(0, 3, 1, 2)
    targets = torch.tensor([sample.label for sample in samples])
    return Batch(pixels, targets, tuple(s.unreadable for s in samples if s.unreadable))


def _start_worker(number: int) -> None:
    """Let a worker end with its process, and not before the run was saved.

    Schedulers and terminals send their signals to the workers, too. A worker that outlives its
    process would keep the lock of the run's folder.
    """
    del number
    signal.set_wakeup_fd(-1)
    signals.die_with_parent()
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(signum: int, frame: object) -> None:
    """End a worker when its process had the time to save; that one may have sent the signal."""
    del signum, frame
    signal.alarm(_LATER)


def _full_name(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"
