"""Judge a trained network: `python -m care.evaluate`.

    python -m care.evaluate        # the embedded care_tiny on Fashion-MNIST's test split
    python -m care.evaluate CARETrans_S0.pth.tar --model care_s0 --data folder:/data/imagenet
    python -m care.evaluate runs/care_tiny/best.safetensors --json
    python -m care.evaluate CARETrans_S0.pth.tar --model care_s0 --data folder:/data/imagenet-r
    python -m care.evaluate CARETrans_S0.pth.tar --model care_s0 --data imagenet:/data --real

A checkpoint of care.train says which network it is of and how images are prepared; for others say
it with --model. Prints top-1 and top-5 with their 95 % Wilson intervals.

Images of some of the network's classes, such as ImageNet-A and ImageNet-R with 200 of the 1000, are
judged among these classes alone, as these sets' authors do. Folders 0 to 999, as ImageNet-V2's,
are taken by their numbers. `--real` also judges by the corrected labels of ImageNet's validation
images (ReaL, Beyer et al., 2020), which timm carries.
"""

from __future__ import annotations

from pipeline.core import signals

if __name__ == "__main__":
    signals.leave_while_loading()

import json
import pkgutil
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track
from timm.data import ImageNetInfo
from torch import Tensor, nn

from care import checkpoint, distributed
from care.data import Dataset, check_classes, hold_out, open_dataset
from care.distributed import World
from care.factory import create_model, stated_arguments
from care.loaders import Validation
from care.precision import PRECISIONS, autocast
from pipeline.core.commandline import Command
from pipeline.core.described import HoldOut, describe
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.figures import wilson
from pipeline.core.plain import parse_json
from pipeline.core.preprocess import Preprocess
from pipeline.core.screen import Screen
from pipeline.core.words import shown

_IMAGENET_CLASSES = 1000
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")


@dataclass(frozen=True)
class Score:
    """How many images a network got right.

    Attributes:
        images: Number of images.
        first: Images whose class was the network's first guess.
        fifth: Images whose class was among its first five guesses.
        loss: Mean cross-entropy.
    """

    images: int
    first: int
    fifth: int
    loss: float

    @property
    def top1(self) -> float:
        """Share of the images whose class was the first guess."""
        return self.first / self.images

    @property
    def top5(self) -> float:
        """Share of the images whose class was among the first five guesses."""
        return self.fifth / self.images


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    precision: str = "fp32",
    observe: Callable[[Tensor], None] | None = None,
) -> Score:
    """Judge `model` on the batches of all processes together; its training mode is kept.

    Args:
        model: Images (batch, channels, height, width) to logits (batch, classes).
        batches: This process's share of images and class numbers, not empty in all processes.
        world: This process among its siblings.
        precision: "fp32", "bf16" or "fp16".
        observe: Is shown the logits of each batch.
    """
    was_training = model.training
    model.eval()
    # float64: counts stay exact, and losses do not depend on how images are shared out.
    totals = torch.zeros(4, dtype=torch.float64)
    for images, targets in batches:
        images, targets = images.to(world.device), targets.to(world.device)
        with autocast(world.device, precision):
            logits = model(images)
        if observe is not None:
            observe(logits)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        counts = [len(images), hits[:, 0].sum(), hits.sum(), losses.double().sum()]
        totals += torch.tensor([float(c) for c in counts], dtype=torch.float64)
    model.train(was_training)
    images_, first, fifth, loss = world.sum(totals.to(world.device)).tolist()
    return Score(int(images_), int(first), int(fifth), loss / images_)


@click.command(cls=Command)
@click.argument("path", metavar="[CHECKPOINT]", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Network, by its timm name; by default what the checkpoint says.")
@click.option("--num-classes", type=click.IntRange(1), help="By default what the checkpoint says.")
@click.option("--data", help="folder:PATH, tar:PATH, wds:PATTERN or fashion-mnist.")
@click.option("--split", default="validation", show_default=True, help="Split of the images.")
@click.option("--real", is_flag=True, help="Also judge by the corrected labels of ImageNet.")
@click.option("--ema", is_flag=True, help="Take the moving average of the weights.")
@click.option("--image-size", type=click.IntRange(32), help="Input height and width.")
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Decoders.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(list(PRECISIONS)))
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def main(
    path: Path | None,
    model: str | None,
    num_classes: int | None,
    data: str | None,
    split: str,
    real: bool,
    ema: bool,
    image_size: int | None,
    batch_size: int,
    workers: int,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Print top-1 and top-5 of a trained network, with their 95 % Wilson intervals.

    Without a CHECKPOINT the embedded one is judged, care_tiny's, on the embedded test images of
    Fashion-MNIST.
    """
    trained = read_trained(path, model, num_classes, image_size, ema)
    uri = data or _default_data(path)
    dataset = open_dataset(uri, split)
    dataset.exif = trained.preprocess.exif
    part = _part_of_classes(dataset, trained)
    if part is None:
        check_classes(dataset, trained.num_classes)
        _check_labels(dataset, trained.labels)
    whole = len(dataset)
    if split != "train":
        dataset = _held_out(dataset, trained.hold_out)
    with distributed.world(device) as world:
        corrected = _Corrected(dataset, trained, world) if real else None
        network = trained.network.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        judged = network if part is None else _Restricted(network, part)
        batches = Validation(dataset, trained.preprocess, batch_size, workers, world)
        console = Screen(quiet=not world.is_main, soft_wrap=True)
        shown = track(
            batches, "evaluating", console=console, transient=True, disable=not console.is_terminal
        )
        started = time.perf_counter()
        observe = corrected.see if corrected is not None else None
        result = score(judged, shown, world, precision, observe)
        seconds = time.perf_counter() - started
    if part is not None:
        console.print(f"only the {len(part)} classes of the images count, of {trained.num_classes}")
    if len(dataset) < whole:
        console.print(f"only the {len(dataset)} images count that training held out, of {whole}")
    console.print(f"{trained.name} ({trained.path}) on {uri}, {split} split")
    for line in _lines(result, corrected):
        console.print(line)
    console.print(f"{result.images:,} images in {seconds:.1f} s, {precision} on {world.device}")
    if as_json and world.is_main:
        summary = _summary(trained, result, precision)
        if corrected is not None:
            summary["real_top1"] = corrected.top1
        click.echo(json.dumps(summary))


def _lines(result: Score, corrected: _Corrected | None) -> Iterator[str]:
    """What came out, for people."""
    for name, hits in (("top-1", result.first), ("top-5", result.fifth)):
        low, high = wilson(hits, result.images)
        share = hits / result.images
        yield f"{name}  {share:.2%}  (95 % interval {low:.2%} to {high:.2%})"
    if corrected is not None:
        yield f"ReaL top-1  {corrected.top1:.2%}  of the {corrected.images:,} with labels"


class _Restricted(nn.Module):
    """A network that knows only some of its classes.

    Args:
        network: Images to logits.
        classes: Numbers of the classes that are left, in the order of the new logits.
    """

    def __init__(self, network: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes that are left)."""
        return self.network(images)[:, self.classes]  # type: ignore[no-any-return]


class _Corrected:
    """Accuracy by several labels an image, or none, as timm keeps them.

    Args:
        dataset: ImageNet's validation images, by their published names.
        trained: The network, of all 1000 classes.
        world: One process alone: labels go by the order of the images.

    Attributes:
        images: Images with at least one label.
        right: Those of them whose first guess is one of their labels.
    """

    def __init__(self, dataset: Dataset, trained: Trained, world: World) -> None:
        if world.size > 1:
            raise ConfigError("--real judges in one process: start it without torchrun")
        names = [Path(dataset.name(index)).name for index in range(len(dataset))]
        wrong = next((name for name in names if not _VALIDATION_IMAGE.fullmatch(name)), None)
        if wrong or trained.num_classes != _IMAGENET_CLASSES:
            raise DataError(
                "--real knows ImageNet's validation images (ILSVRC2012_val_00000001.JPEG) and "
                f"their 1000 classes, not {wrong or trained.name}"
            )
        content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        all_labels = parse_json(content or b"[]", "timm's list of ReaL labels")
        self._labels = iter([all_labels[int(name[15:23]) - 1] for name in names])
        self.images = self.right = 0

    def see(self, logits: Tensor) -> None:
        """Take the logits of the next images."""
        for guess in logits.argmax(dim=1).tolist():
            labels = next(self._labels)
            self.images += bool(labels)
            self.right += guess in labels

    @property
    def top1(self) -> float:
        """Share of the images with labels whose first guess is among these."""
        return self.right / max(self.images, 1)


def _held_out(dataset: Dataset, stated: HoldOut | None) -> Dataset:
    """What training held out of the dataset, if it learned from the others."""
    if stated is None or dataset.identity() != stated.identity:
        return dataset
    return hold_out(dataset, stated.share, stated.seed)[1]


def _part_of_classes(dataset: Dataset, trained: Trained) -> list[int] | None:
    """Numbers of the dataset's classes, where the network knows these and more by name."""
    known = trained.labels
    if not known and trained.num_classes == _IMAGENET_CLASSES:
        known = tuple(ImageNetInfo().label_names())
    if len(dataset.classes) >= trained.num_classes or not set(dataset.classes) <= set(known):
        return None
    return [known.index(name) for name in dataset.classes]


@dataclass(frozen=True)
class Trained:
    """A trained network and what its checkpoint says about it.

    Attributes:
        name: The network's timm name.
        path: Its checkpoint.
        network: In evaluation mode.
        preprocess: How its images are prepared.
        num_classes: Number of classes.
        labels: Class names, where the checkpoint knows them.
        hold_out: Which images training held out, where the checkpoint says so.
    """

    name: str
    path: Path
    network: nn.Module
    preprocess: Preprocess
    num_classes: int
    labels: tuple[str, ...]
    hold_out: HoldOut | None = None


def read_trained(
    path: Path | None = None,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    ema: bool = False,
) -> Trained:
    """Read a trained network.

    Args:
        path: Checkpoint; by default the embedded one of `model`.
        model: Timm name; by default what the checkpoint says, or care_tiny without a checkpoint.
        num_classes: By default what the checkpoint says, or what the network is published with.
        image_size: By default what the checkpoint or the network says.
        ema: Take the moving average of the weights.

    Raises:
        PipelineError: There is no such checkpoint, it does not fit the model, or nothing says which
            model it is of.
    """
    if path is None:
        name = model or "care_tiny"
        path = checkpoint.embedded(name)
        if path is None:
            raise ConfigError(f"no weights of {name} are embedded: give a CHECKPOINT of it")
    stated = checkpoint.read_metadata(path)
    arguments = stated_arguments(stated, path)
    _check_kinds(stated, path)
    name = model or stated.get("model", "")
    if not name:
        raise CheckpointError(f"{path} does not say which network it is of: give --model")
    if model and stated.get("model", model) != model:
        raise CheckpointError(f"{path} is a checkpoint of {shown(stated['model'])}, not of {model}")
    classes: int | None = num_classes or stated.get("num_classes")
    if classes:
        arguments["num_classes"] = classes
    network = create_model(name, **arguments)
    checkpoint.load(path, network, ema=ema)
    spec = (
        Preprocess.from_dict(stated["preprocess"])
        if "preprocess" in stated
        else Preprocess.from_model(network)
    )
    if image_size is not None:
        spec = replace(spec, size=image_size)
    count: int = classes or network.num_classes  # type: ignore[assignment]
    labels = tuple(stated.get("labels", ()))
    return Trained(name, path, network.eval(), spec, count, labels, describe(path).hold_out)


def _check_kinds(stated: Mapping[str, Any], path: Path) -> None:
    """Refuse metadata of another type than ours has."""
    labels = stated.get("labels", [])
    fitting = {
        "model": isinstance(stated.get("model", ""), str),
        "num_classes": type(stated.get("num_classes", 1)) is int,
        "labels": isinstance(labels, list) and all(isinstance(label, str) for label in labels),
    }
    for key, fits in fitting.items():
        if not fits:
            raise CheckpointError(
                f"{path} was refused: in its metadata, {key} is {shown(repr(stated[key]))}"
            )


def _default_data(path: Path | None) -> str:
    if path is not None:
        raise ConfigError("no images: give --data, such as --data folder:/data/imagenet")
    return "fashion-mnist"


def _check_labels(dataset: Dataset, labels: tuple[str, ...]) -> None:
    """Refuse images whose classes have other names: in another order every score is wrong."""
    if not labels or not dataset.names_known:
        return
    for number, (known, found) in enumerate(zip(labels, dataset.classes, strict=True)):
        if known != found:
            raise DataError(
                f"class {number} is {known!r} for the checkpoint but {found!r} in the images: "
                "evaluate on images with the classes that it was trained on"
            )


def _summary(trained: Trained, result: Score, precision: str) -> dict[str, Any]:
    return {
        "model": trained.name,
        "checkpoint": str(trained.path),
        "images": result.images,
        "top1": result.top1,
        "top1_interval": wilson(result.first, result.images),
        "top5": result.top5,
        "top5_interval": wilson(result.fifth, result.images),
        "loss": result.loss,
        "precision": precision,
    }


if __name__ == "__main__":
    main()
