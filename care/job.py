"""The parts of a training run, built from its settings: data, network, teacher, loss, optimizer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from care import checkpoint, finetune, quantization, sampling
from care.data import Dataset, check_classes, hold_out, open_dataset
from care.distributed import World
from care.factory import create_model, create_pretrained
from care.finetune import Start
from care.learner import Learner
from care.loaders import Finish, TrainLoader, Validation
from care.losses import DistillationLoss, Teacher
from care.quantization import QuantizedNetwork, calibration_images
from care.settings import TrainSettings
from care.teacher_cache import CachedTeacher, Store, digest_of
from pipeline.core.checkpoints import HUB
from pipeline.core.described import HOLD_OUT, QUANTIZED, HoldOut
from pipeline.core.errors import ConfigError, ModelError, about
from pipeline.core.preprocess import Preprocess


@dataclass(frozen=True)
class Job:
    """The parts of a training run.

    Attributes:
        settings: What the user asked for.
        world: This process among its siblings.
        learner: The network and everything else that changes in training.
        loader: Training batches.
        finish: What is done with them on the device.
        validating: Validation batches.
        facts: What was found, not set, and must be the same for a run to be resumed.
        described: What a checkpoint of the run says about itself.
        start: Where the weights come from, unless they are random.
        cached: The teacher, if its answers are kept.
    """

    settings: TrainSettings
    world: World
    learner: Learner
    loader: TrainLoader
    finish: Finish
    validating: Validation
    facts: dict[str, Any]
    described: dict[str, Any]
    start: Start | None = None
    cached: CachedTeacher | None = None


def prepare(settings: TrainSettings, world: World) -> Job:
    """Open the data and build the network, as the settings say; writes nothing.

    Raises:
        PipelineError: They cannot be used, or processes found different ones.
    """
    sampling.seed_start(settings.seed)  # the same initial weights in every process
    training, validating, held_out = _open_data(settings)
    classes = training.classes
    with _one_downloads(settings, world):
        model, start = _build_model(settings, len(classes))
    spec = replace(Preprocess.from_model(model, settings.image_size), exif=settings.exif)
    quantized = {}
    if settings.quantize is not None:
        images = calibration_images(training, spec, settings.quantize_images, settings.seed)
        form = quantization.begin(settings.quantize, model, images)
        model, quantized = QuantizedNetwork(model, form), {QUANTIZED: form.quantized.to_dict()}
    loader = TrainLoader(settings, training, spec, world)
    finish = Finish(settings, spec, len(classes), world.device)
    facts = {
        "training images": len(training),
        "validation images": len(validating),
        "classes": list(classes),
        "total batch": loader.images_per_step,
        "list of training images": training.identity(),
    }
    world.require_same({**settings.identity(), **facts})
    with world.one_on_each_machine_first():
        loss = _build_loss(settings, spec, len(classes), soft=finish.mix is not None)
    cached = _keep_answers(settings, loss, loader, facts, spec, world)
    return Job(
        settings=settings,
        world=world,
        learner=Learner(settings, model, loss, loader.steps, world),
        loader=loader,
        finish=finish,
        validating=Validation(validating, spec, settings.batch_size, settings.workers, world),
        facts=facts,
        start=start,
        cached=cached,
        described={
            "model": settings.model,
            "model_kwargs": settings.model_kwargs,
            "num_classes": len(classes),
            "labels": list(classes),
            "preprocess": spec.to_dict(),
            "recipe": settings.digest(),
            **held_out,
            **quantized,
        },
    )


def _open_data(settings: TrainSettings) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """Training and validation images, and what the checkpoint says of how they were parted."""
    if not settings.data:
        raise ConfigError("no training images: give --data, such as --data folder:/data/imagenet")
    training = open_dataset(settings.data, "train")
    training.exif = settings.exif
    if not settings.validation:
        split = HoldOut(settings.hold_out, settings.seed, training.identity())
        return *hold_out(training, split.share, split.seed), {HOLD_OUT: split.to_dict()}
    validating = open_dataset(settings.validation, "validation")
    validating.exif = settings.exif
    check_classes(validating, len(training.classes))
    return training, validating, {}


def _one_downloads(
    settings: TrainSettings, world: World
) -> contextlib.AbstractContextManager[None]:
    """Let one process of a machine fetch published weights, where they are asked for."""
    init = settings.init or ""
    if init == finetune.PRETRAINED or init.startswith(HUB):
        return world.one_on_each_machine_first()
    return contextlib.nullcontext()


def _build_model(settings: TrainSettings, classes: int) -> tuple[nn.Module, Start | None]:
    """The network, and where its weights come from unless they are random."""

    def create(count: int) -> nn.Module:
        kwargs: dict[str, Any] = {"num_classes": count}
        if settings.drop_path:  # not every network knows it
            kwargs["drop_path_rate"] = settings.drop_path
        return create_model(settings.model, **{**kwargs, **settings.model_kwargs})

    model = create(classes)
    start = None
    if settings.init is not None:
        published = partial(create_pretrained, settings.model, **settings.model_kwargs)
        start = finetune.begin(settings.init, settings.model, model, create, published)
    if settings.freeze:
        finetune.freeze_body(model)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model, start


def _build_loss(
    settings: TrainSettings, spec: Preprocess, classes: int, *, soft: bool
) -> DistillationLoss:
    """The loss; `soft` targets are distributions and have been smoothed while they were mixed."""
    base = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(settings.smoothing)
    teacher = None
    if settings.distillation != "none":
        teacher = _build_teacher(settings, spec, classes)
    return DistillationLoss(
        base, settings.distillation, teacher, settings.distillation_weight, settings.temperature
    )


def _build_teacher(settings: TrainSettings, spec: Preprocess, classes: int) -> Teacher:
    if settings.teacher_checkpoint is not None:
        network = create_model(settings.teacher, num_classes=classes)
        checkpoint.load(settings.teacher_checkpoint, network)
    else:
        network = _download(settings.teacher)
    known = getattr(network, "num_classes", classes)
    if known != classes:
        raise ModelError(
            f"teacher {settings.teacher} knows {known} classes, the images have {classes}: give "
            "--teacher and --teacher-checkpoint of a network for these, or --distillation none"
        )
    own = Preprocess.from_model(network)
    return Teacher(
        network, own.mean, own.std, spec.mean, spec.std, precision=settings.teacher_precision
    )


def _keep_answers(
    settings: TrainSettings,
    loss: DistillationLoss,
    loader: TrainLoader,
    facts: dict[str, Any],
    spec: Preprocess,
    world: World,
) -> CachedTeacher | None:
    """Put a cache before the teacher, where one is asked for; in place."""
    if settings.teacher_cache is None or loss.teacher is None:
        return None
    hard = settings.distillation == "hard"
    key = {
        "format": 1,
        **settings.shown_to_a_teacher(),
        "images": facts["list of training images"],
        "preprocess": spec.to_dict(),
        "weights": digest_of(loss.teacher),
        "device": world.device.type,  # devices round in their own ways
        "process": [world.rank, world.size],
    }
    store = Store(
        settings.teacher_cache,
        key,
        records=loader.steps * settings.accumulate,
        answers=4 * settings.batch_size * (1 if hard else len(facts["classes"])),
        most=1e9 * settings.teacher_cache_gb,
    )
    loss.teacher = CachedTeacher(loss.teacher, store, parts=settings.accumulate, hard=hard)
    return loss.teacher


def _download(name: str) -> nn.Module:
    try:
        with about(f"teacher {name} (or name --teacher-checkpoint, or --distillation none)"):
            return create_pretrained(name)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the weights of teacher {name} cannot be downloaded ({reason}): give "
            "--teacher-checkpoint FILE, or --distillation none"
        ) from error
