"""The settings of a training run: stated once, here; flags and YAML keys derive from them.

A YAML file changes the defaults, flags change both; configs/train_care_s0.yaml and its siblings
hold the published recipe of the CARE networks.

    settings = read(Path("configs/train_care_tiny.yaml"), {"epochs": 3})

Each setting carries its help text, the section it is listed in, and whether it may differ when a
run is resumed: freely, because it says where and how fast the run is done, not what (`free`), or
only by --amend, which is recorded (`amendable`).
"""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import click
import pydantic
from pydantic.fields import FieldInfo

from care.losses import Distillation
from care.quantization import problem_with_precision
from pipeline.core import yamlfile
from pipeline.core.arguments import first_excessive, first_unknown
from pipeline.core.bounds import MOST_BATCH, MOST_THREADS
from pipeline.core.checkpoints import HUB, HUB_NAMED
from pipeline.core.commandline import Command
from pipeline.core.errors import ConfigError
from pipeline.core.inputs import expanded, why_no_path
from pipeline.core.preprocess import Exif
from pipeline.core.words import nearest, shown

_AMENDABLE = ("Augmentation", "Optimization", "Distillation")
"""Sections of what a run that goes on may do otherwise from there on, if --amend says so."""

_ALSO = ("drop_path", "precision")

_FIXED = ("opt", "ema_decay", "distillation", "teacher", "body_lr_factor")
"""Settings of these sections that decide what a checkpoint holds or is compared with."""


def _setting(default: Any, section: str, text: str, *, free: bool = False, **limits: Any) -> Any:
    extra: dict[str, Any] = {"section": section, "free": free}
    extra["amendable"] = section in _AMENDABLE and not free
    return pydantic.Field(default, description=text, json_schema_extra=extra, **limits)


class TrainSettings(pydantic.BaseModel):
    """Everything that a training run can be told. See the field descriptions."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    name: str = _setting("", "Run", "Name of the run; by default the model's name.", free=True)
    output: Path = _setting(
        Path("runs"), "Run", "Folder of all runs; this one writes OUTPUT/NAME.", free=True
    )
    resume: bool = _setting(
        False, "Run", "Go on where the run of this name was interrupted.", free=True
    )
    overwrite: bool = _setting(
        False, "Run", "Discard an existing run of this name and start anew.", free=True
    )
    amend: dict[str, Any] = _setting(
        {}, "Run", "Go on with other settings, such as lr=0.001; they are recorded.", free=True
    )
    save_minutes: float = _setting(
        10.0, "Run", "Minutes between two checkpoints, beside those of each epoch.", free=True, ge=0
    )
    keep: int = _setting(3, "Run", "Checkpoints to go on from that are kept.", free=True, ge=1)
    unsaved: Literal["stop", "continue"] = _setting(
        "stop", "Run", "What to do when a checkpoint cannot be written.", free=True
    )
    export: Path | None = _setting(
        None, "Run", "Also write the best weights to this .safetensors file.", free=True
    )
    seed: int = _setting(42, "Run", "Seed of everything random.", ge=0, lt=2**32)
    log_every: int = _setting(50, "Run", "Steps between two logged losses.", free=True, ge=1)
    tensorboard: bool = _setting(True, "Run", "Write TensorBoard events.", free=True)
    wandb: bool = _setting(False, "Run", "Report to Weights & Biases.", free=True)
    mlflow: bool = _setting(False, "Run", "Report to MLflow.", free=True)
    progress: bool = _setting(True, "Run", "Show a progress bar on a terminal.", free=True)

    model: str = _setting("care_s0", "Model", "Network, by its timm name.")
    model_kwargs: dict[str, Any] = _setting(
        {}, "Model", "Further arguments of the network, such as init_value=0.1."
    )
    init: str | None = _setting(
        None,
        "Model",
        "Weights to start from (fine-tuning): a checkpoint file, embedded, or pretrained for "
        "timm's, or hub:organization/repository; a head of another size is made anew.",
    )
    quantize: str | None = _setting(
        None,
        "Model",
        "Fine-tune in the precision in which a target is built: ort/int8; ort/int7, with 7-bit "
        "weights for CPUs without VNNI; coreml/int8, palette4, palette6, pruned50 or pruned75. "
        "Needs init.",
    )
    quantize_images: int = _setting(
        512, "Model", "Training images that choose the ranges of QUANTIZE.", ge=8, le=100_000
    )
    freeze: bool = _setting(False, "Model", "Let the head alone learn; its body stays as it is.")
    image_size: int | None = _setting(
        None, "Model", "Input height and width; by default what the model states.", ge=32, le=4096
    )
    drop_path: float = _setting(0.1, "Model", "Stochastic depth of the last block.", ge=0, lt=1)
    grad_checkpointing: bool = _setting(
        False, "Model", "Recompute activations in the backward pass to save memory.", free=True
    )

    data: str = _setting(
        "",
        "Data",
        "Training images: folder:PATH, imagenet:PATH, tar:PATH, wds:PATTERN or fashion-mnist.",
    )
    validation: str = _setting(
        "", "Data", "Validation images; by default a part held out of the training images."
    )
    hold_out: float = _setting(
        0.05, "Data", "Share of the training images held out where VALIDATION is not given.",
        gt=0, lt=1,
    )  # fmt: skip
    workers: int = _setting(
        8, "Data", "Decoding processes of each training process.", free=True, ge=0, le=1024
    )
    batch_size: int = _setting(
        128, "Data", "Images per step of each training process.", free=True, ge=1, le=MOST_BATCH
    )
    corrupt: Literal["stop", "skip"] = _setting(
        "stop", "Data", "What to do with a training image that cannot be read.", free=True
    )
    exif: Exif = _setting("apply", "Data", "Orientation tags of images: apply or ignore.")
    decoder: Literal["pillow", "torchvision"] = _setting(
        "pillow", "Data", "Who decodes and crops training images; torchvision is faster."
    )

    scale: tuple[float, float] = _setting(
        (0.08, 1.0), "Augmentation", "Share of the image's area that a random crop keeps."
    )
    ratio: tuple[float, float] = _setting(
        (0.75, 4 / 3), "Augmentation", "Aspect ratios of a random crop."
    )
    train_interpolation: Literal["model", "random", "bilinear", "bicubic"] = _setting(
        "model", "Augmentation", "Resampling of training images: the model's, or any of the two."
    )
    hflip: float = _setting(0.5, "Augmentation", "Probability of a left-right flip.", ge=0, le=1)
    vflip: float = _setting(0.0, "Augmentation", "Probability of an upside-down flip.", ge=0, le=1)
    color_jitter: float = _setting(
        0.4, "Augmentation", "Colour jitter, where no automatic policy is set.", ge=0
    )
    auto_augment: str | None = _setting(
        "rand-m9-mstd0.5-inc1", "Augmentation", "timm's automatic augmentation policy, or none."
    )
    random_erasing: float = _setting(
        0.25, "Augmentation", "Probability of erasing a rectangle.", ge=0, le=1
    )
    repeated_augmentation: int = _setting(
        0, "Augmentation", "Versions of an image per epoch (0: plain sampling).", ge=0, le=1000
    )  # fmt: skip
    mixup: float = _setting(0.8, "Augmentation", "Mixup alpha; 0 turns it off.", ge=0)
    cutmix: float = _setting(1.0, "Augmentation", "CutMix alpha; 0 turns it off.", ge=0)
    mix_probability: float = _setting(
        1.0, "Augmentation", "Probability of mixing a batch at all.", ge=0, le=1
    )
    mix_switch: float = _setting(
        0.5, "Augmentation", "Probability of CutMix where both are on.", ge=0, le=1
    )
    mix_off_epoch: int = _setting(
        0, "Augmentation", "Epochs after which nothing is mixed (0: always mix).", ge=0
    )
    smoothing: float = _setting(0.1, "Augmentation", "Label smoothing.", ge=0, lt=1)

    epochs: int = _setting(
        300, "Optimization", "Epochs of the schedule, warm-up included.", ge=1, le=10**6
    )
    opt: str = _setting("adamw", "Optimization", "Optimizer, by its timm name.")
    lr: float | None = _setting(
        None, "Optimization", "Learning rate as it is; by default lr_base, scaled.", gt=0
    )
    lr_base: float = _setting(
        2.5e-3, "Optimization", "Learning rate per lr_base_batch images of the total batch.", gt=0
    )
    lr_base_batch: int = _setting(
        1536, "Optimization", "Total batch that lr_base is meant for; it scales.", ge=1
    )  # fmt: skip
    weight_decay: float = _setting(
        0.05, "Optimization", "Weight decay; norms, biases and layer scales have none.", ge=0
    )
    betas: tuple[float, float] | None = _setting(
        None, "Optimization", "Averaging rates of Adam-like optimizers."
    )
    momentum: float = _setting(0.9, "Optimization", "Momentum of SGD-like optimizers.", ge=0)
    layer_decay: float | None = _setting(
        None, "Optimization", "Learning rate of a layer relative to the next.", gt=0, le=1
    )  # fmt: skip
    body_lr_factor: float = _setting(
        1.0, "Optimization", "Learning rate of the body relative to the head's.", gt=0, le=1
    )
    sched: str = _setting("cosine", "Optimization", "Schedule, by its timm name.")
    schedule_per: Literal["step", "epoch"] = _setting(
        "step", "Optimization", "How often the learning rate changes."
    )
    cooldown_epochs: int = _setting(
        0, "Optimization", "Further epochs, at the last learning rate.", ge=0, le=10**6
    )
    warmup_epochs: int = _setting(20, "Optimization", "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = _setting(1e-6, "Optimization", "Learning rate before the warm-up.", ge=0)
    min_lr: float = _setting(1e-5, "Optimization", "Learning rate at the end.", ge=0)
    clip_grad: float | None = _setting(
        None, "Optimization", "Largest gradient norm (or value, see clip_mode).", gt=0
    )
    clip_mode: Literal["norm", "value", "agc"] = _setting(
        "norm", "Optimization", "How gradients are clipped."
    )
    accumulate: int = _setting(
        1, "Optimization", "Batches whose gradients make one step.", free=True, ge=1, le=MOST_BATCH
    )
    skip_limit: int = _setting(
        3, "Optimization", "Steps in a row without a finite gradient after which to stop.",
        free=True, ge=1,
    )  # fmt: skip
    ema_decay: float | None = _setting(
        None, "Optimization", "Keep a moving average of the weights with this decay.", gt=0, lt=1
    )

    distillation: Distillation = _setting(
        "hard", "Distillation", "What the distillation head learns from a teacher."
    )
    teacher: str = _setting("regnety_160.deit_in1k", "Distillation", "Teacher, by its timm name.")
    teacher_checkpoint: Path | None = _setting(
        None, "Distillation", "The teacher's weights; by default timm downloads them.", free=True
    )
    distillation_weight: float = _setting(
        0.5, "Distillation", "Share of the teacher's part of the loss.", ge=0, le=1
    )
    temperature: float = _setting(1.0, "Distillation", "Temperature of soft distillation.", gt=0)
    teacher_precision: Literal["fp32", "bf16", "fp16"] = _setting(
        "fp32", "Distillation", "Mixed precision of the teacher."
    )

    teacher_cache: Path | None = _setting(
        None,
        "Distillation",
        "Folder of the teacher's answers, for other runs on the same images and seed.",
        free=True,
    )
    teacher_cache_gb: float = _setting(
        50.0, "Distillation", "Largest size of TEACHER_CACHE.", free=True, gt=0
    )

    device: str = _setting(
        "auto", "Machine", "cpu, cuda, mps or auto; torchrun gives each process its GPU.", free=True
    )
    precision: Literal["fp32", "bf16", "fp16"] = _setting(
        "fp32", "Machine", "Mixed precision of the forward pass."
    )
    channels_last: bool = _setting(False, "Machine", "Channels-last memory format.", free=True)
    cudnn_benchmark: bool = _setting(
        True, "Machine", "Let cuDNN choose its kernels by measuring them.", free=True
    )
    timeout_minutes: float = _setting(
        10.0, "Machine", "How long processes wait for each other before they give up.", free=True,
        gt=0,
    )  # fmt: skip
    compile: bool = _setting(False, "Machine", "Compile the network with torch.compile.", free=True)
    sync_bn: bool = _setting(
        False, "Machine", "BatchNorm statistics over the batches of all processes."
    )
    threads: int | None = _setting(
        None,
        "Machine",
        "CPU threads of each process; by default torch's choice.",
        free=True,
        ge=1,
        le=MOST_THREADS,
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Let a flag switch an optional setting off: `--auto-augment none`."""
        field = cls.model_fields[str(info.field_name)]
        optional = type(None) in typing.get_args(field.annotation)
        return None if optional and value == "none" else value

    @pydantic.field_validator("model_kwargs")
    @classmethod
    def _readable(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Refuse what the trained checkpoint could not state, and so nobody could load."""
        if problem := first_unknown(kwargs) or first_excessive(kwargs):
            raise ValueError(problem)
        return kwargs

    @pydantic.field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name and (problem := why_no_path(name)):
            raise ValueError(f"this {problem}")
        return name

    @pydantic.field_validator("init")
    @classmethod
    def _names_weights(cls, init: str | None) -> str | None:
        """A path as other paths are; the two words are none of these."""
        if init in (None, "embedded", "pretrained"):
            return init
        if init is not None and init.startswith(HUB):
            if not re.match(HUB_NAMED, init.removeprefix(HUB)):
                raise ValueError("this names no repository: write hub:organization/repository")
            return init
        if problem := why_no_path(str(init)):
            raise ValueError(f"this {problem}")
        return str(Path(expanded(str(init))))

    @pydantic.field_validator("quantize")
    @classmethod
    def _names_a_precision(cls, quantize: str | None) -> str | None:
        if quantize is not None and (problem := problem_with_precision(quantize)):
            raise ValueError(problem)
        return quantize

    @pydantic.field_validator("output", "export", "teacher_checkpoint", "teacher_cache")
    @classmethod
    def _possible(cls, path: Path | None) -> Path | None:
        """Refuse what can be no path, and find the home folder."""
        if path is None:
            return None
        if problem := why_no_path(str(path)):
            raise ValueError(f"this {problem}")
        return Path(expanded(str(path)))

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and CutMix pair the images of a batch: batch_size {self.batch_size} must "
                "be even"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: choose one")
        if self.freeze and self.init is None:
            raise ValueError("freeze keeps the body as it was trained: give init, its weights")
        if self.freeze and self.body_lr_factor != 1:
            raise ValueError("freeze leaves the body nothing to learn: leave body_lr_factor out")
        if self.quantize is not None:
            self._check_quantize()
        if self.teacher_cache is not None and self.distillation == "none":
            raise ValueError("teacher_cache keeps what a teacher says: distillation is none")
        for key in ("scale", "ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(f"{key} must be two positive numbers, the smaller first")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leaves nothing of the {self.epochs} epochs"
            )
        return self

    def _check_quantize(self) -> None:
        """Refuse what has no meaning for a network that computes as it is deployed."""
        if self.init is None:
            raise ValueError("quantize fine-tunes what was trained in float32: give init")
        if self.precision != "fp32":
            raise ValueError(
                f"quantize computes in float32 between its 8 bits: not {self.precision}"
            )
        others = ("freeze", "sync_bn", "compile", "grad_checkpointing")
        for key in (key for key in others if getattr(self, key)):
            raise ValueError(f"quantize takes all weights and the deployed form: leave {key} out")
        if self.body_lr_factor != 1:
            raise ValueError("quantize takes all weights alike: leave body_lr_factor out")

    @property
    def all_epochs(self) -> int:
        """Epochs of the schedule and of the cool-down after it."""
        return self.epochs + self.cooldown_epochs

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.output / (self.name or self.model)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as plain values."""
        everything = self.model_dump(mode="json")
        return {
            k: v for k, v in everything.items() if not _extra(type(self).model_fields[k])["free"]
        }

    def amended(self, changes: Mapping[str, Any]) -> TrainSettings:
        """These settings with some changed.

        Raises:
            ConfigError: A setting is unknown, cannot be changed within a run, or makes no sense.
        """
        for key in changes:
            if key not in type(self).model_fields:
                raise ConfigError(
                    f"--amend: unknown setting {shown(key)!r}{nearest(key, amendable())}"
                )
            if key not in amendable():
                raise ConfigError(
                    f"--amend: {key} cannot change within a run: start another one with --name"
                )
        try:
            return type(self)(**{**self.model_dump(), **changes})
        except pydantic.ValidationError as error:
            raise ConfigError(f"--amend: {_explain(error, None, set())}") from error

    def shown_to_a_teacher(self) -> dict[str, Any]:
        """What decides the images that a teacher is shown, and who it is, as plain values."""
        sections = ("Data", "Augmentation")
        own = ("seed", "image_size", "distillation", "teacher", "teacher_precision")
        # Batches are mixed as they come, and so many images at once.
        also = (*own, "batch_size", "accumulate", "corrupt")
        ours = {
            key
            for key, field in type(self).model_fields.items()
            if key in also or (_extra(field)["section"] in sections and not _extra(field)["free"])
        }
        return self.model_dump(mode="json", include=ours)

    def digest(self) -> str:
        """SHA-256 of the identity: names a recipe."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def learning_rate(self, total_batch: int) -> float:
        """The peak learning rate for a step over `total_batch` images."""
        return self.lr if self.lr is not None else self.lr_base * total_batch / self.lr_base_batch


def amendable() -> list[str]:
    """The settings that --amend may change."""
    fields = TrainSettings.model_fields.items()
    return [
        key
        for key, field in fields
        if (_extra(field)["amendable"] or key in _ALSO) and key not in _FIXED
    ]


def read(config: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Settings from a YAML file (if any) and flags, which win.

    Args:
        config: YAML file with settings by name.
        flags: Settings by name.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or makes no sense.
    """
    document = _read_yaml(config) if config else None
    values = {**(document.values if document else {}), **flags}
    if flags.get("freeze") and "body_lr_factor" not in flags:
        values.pop("body_lr_factor", None)  # the file's share of the rate is for a body that learns
    try:
        return TrainSettings(**values)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, document, set(flags))) from error


def _read_yaml(path: Path) -> yamlfile.Document:
    document = yamlfile.read(path, may_be_empty=True)
    for key in document.values:
        if key not in TrainSettings.model_fields:
            hint = nearest(key, TrainSettings.model_fields)
            raise ConfigError(f"{document.place((key,))}: unknown setting {shown(key)!r}{hint}")
    return document


def _explain(
    error: pydantic.ValidationError, document: yamlfile.Document | None, flags: set[str]
) -> str:
    """The first problem in one line: where it was set, and what is wrong."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {shown(key)!r}{nearest(key, TrainSettings.model_fields)}"
    in_file = document is not None and key not in flags
    where = f"{document.place((key,))}: {key}" if in_file and document else _flag(key)
    return f"{where}: {message[0].lower()}{message[1:]}, not {shown(repr(first['input']))}"


# From here on: command-line options, derived from the fields.


class SettingsCommand(Command):
    """A command whose help lists the settings by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help text, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            field = TrainSettings.model_fields.get(str(parameter.name))
            if record:
                sections.setdefault(_extra(field)["section"] if field else "Options", []).append(
                    record
                )
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option per setting; only those that are used reach it as arguments."""
    for key, field in reversed(TrainSettings.model_fields.items()):
        function = _option(key, field)(function)
    return function


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's arguments that the user really gave."""
    return {k: v for k, v in flags.items() if v is not None and v != ()}


def _option(key: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    annotation = _without_none(field.annotation)
    text = f"{field.description}{_default_text(field)}"
    if annotation is bool:
        flag = _flag(key)
        return click.option(f"{flag}/--no-{flag[2:]}", key, default=None, help=text)
    if typing.get_origin(annotation) is tuple:
        return click.option(
            _flag(key), key, nargs=2, metavar="A B", default=None, help=text, show_default=False
        )
    if typing.get_origin(annotation) is dict:
        return click.option(
            _flag(key), key, multiple=True, metavar="KEY=VALUE", help=text, callback=_parse_pairs
        )
    return click.option(_flag(key), key, metavar=_metavar(annotation), default=None, help=text)


def _parse_pairs(_: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> Any:
    """("init_value=0.1",) -> {"init_value": 0.1}; values are read as YAML."""
    if not pairs:
        return None
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"{_flag(str(parameter.name))} takes KEY=VALUE, not {pair!r}")
    flag = _flag(str(parameter.name))
    split = (pair.split("=", 1) for pair in pairs)
    return {key: yamlfile.value_of(value, f"{flag} {key}") for key, value in split}


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _extra(field: FieldInfo) -> dict[str, Any]:
    return typing.cast(dict[str, Any], field.json_schema_extra)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _metavar(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    names = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return names[annotation]


def _default_text(field: FieldInfo) -> str:
    if field.default in (None, "", {}) or isinstance(field.default, bool):
        return "  [on]" if field.default is True else ""
    if isinstance(field.default, tuple):
        return "  [" + " ".join(f"{v:.4g}" for v in field.default) + "]"
    return f"  [{field.default}]"
