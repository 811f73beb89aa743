"""The configuration: pipeline.yaml as frozen, strict models.

Every key is known, every type is checked, and an error names the file, the line, the path of keys
and the nearest known key. Reading a configuration imports none of the runtimes.
"""

from __future__ import annotations

import json
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from pipeline.core import yamlfile
from pipeline.core.arguments import first_reserved
from pipeline.core.errors import ConfigError
from pipeline.core.words import nearest_or_all
from pipeline.targets.base import TargetOptions
from pipeline.targets.registry import TARGETS

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """Which network, with which weights."""

    name: str = Field(
        description="care_s0, care_s1, care_s2, care_tiny, mlla_t, or timm/NAME for any "
        "classification model of timm."
    )
    checkpoint: str = Field(
        description="A checkpoint file (.pth.tar, .pt, .safetensors); 'embedded' for the weights "
        "that the package carries; 'random' for random weights, to try the pipeline."
    )
    ema: bool = Field(default=False, description="Take the averaged weights of the checkpoint.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the model's constructor."
    )

    @field_validator("kwargs")
    @classmethod
    def _no_reserved(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if problem := first_reserved(kwargs):
            raise ValueError(problem)
        if "num_classes" in kwargs:
            raise ValueError("num_classes cannot be an argument: it follows from data.labels")
        return kwargs


class PreprocessConfig(Section):
    """How an image becomes the network's input."""

    size: Positive = Field(description="Height and width in pixels.")
    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Share of the resized shorter side that the centre crop keeps."
    )
    interpolation: str = "bicubic"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal["rgb", "gray"] = "rgb"


class DataConfig(Section):
    """Which images: never the same ones for validation and calibration."""

    validation: str = Field(
        description="folder:PATH, tar:PATH, wds:PATTERN or fashion-mnist: the validation split."
    )
    calibration: str = Field(description="The same for training images, for calibration.")
    labels: str | None = Field(
        default=None,
        description="The network's classes in its order: a text file with a class a line (as the "
        "dataset names it, and after a tab as people do), or imagenet-1k; default: the classes of "
        "the validation set.",
    )
    identity: Literal["content", "fingerprint"] = Field(
        default="content",
        description="How changed images are noticed: 'content' hashes every image once; "
        "'fingerprint' trusts names and sizes and hashes a sample, for very large data.",
    )


class ExportConfig(Section):
    """The ONNX graph from which the targets are built."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    batch: Literal["dynamic"] | Positive = Field(
        default="dynamic", description="Batch size of the graph: 'dynamic' or a number."
    )
    simplify: bool = True
    simplify_timeout_s: Positive = 300

    @property
    def tried_batch(self) -> int:
        """Images to trace and to compare with: of a dynamic batch more than one."""
        return 2 if self.batch == "dynamic" else self.batch


class CalibrationConfig(Section):
    """Ranges for quantization, and decisions about precision."""

    images: Positive = 512
    method: Literal["min-max", "percentile", "entropy", "mse"] = "mse"
    seed: int = 0
    max_top1_drop: Share = Field(
        default=0.003, description="Layers stay in higher precision until the drop is at most this."
    )


class Gates(Section):
    """Limits that decide the exit code; a limit of None is none."""

    max_top1_drop: Share | None = Field(
        default=None, description="Top-1 of PyTorch minus that of the artifact, as a share."
    )
    min_agreement: Share | None = Field(
        default=None, description="Share of images with the same top-1 class as PyTorch."
    )
    max_latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Median at the first batch size; ignored where it is not measured.",
    )


class ValidationConfig(Section):
    """How accuracy is judged."""

    images: Positive | None = Field(
        default=None, description="At most so many images; default: all."
    )
    batch: Positive = 64
    gates: Gates = Gates()


class BenchConfig(Section):
    """How latency is measured."""

    batches: tuple[Positive, ...] = (1,)
    threads: Positive | None = Field(
        default=None, description="CPU threads; default: as many as this process may use."
    )
    warmup: Positive = Field(default=20, description="Calls before the first timed one.")
    samples: Positive = Field(default=300, description="Timed calls.")
    max_seconds: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="End a measurement after this time, with the samples it has."
    )


def _target_section(name: str) -> type[TargetOptions]:
    """Options of a target, with what every target has: its precisions and its own gates."""
    target = TARGETS[name]
    known: Any = Literal[tuple(target.precisions)]
    fields: dict[str, Any] = {
        "precisions": (
            Annotated[tuple[known, ...], Field(min_length=1)],
            Field(description="Which precisions to build."),
        ),
        "gates": (Gates | None, Field(default=None, description="In place of validation.gates.")),
    }
    return create_model(
        f"{name.title()}Section", __base__=target.options, __doc__=target.title, **fields
    )


class TargetsConfig(Section):
    """Which targets, in which precisions: one optional section for each registered target."""


class Config(Section):
    """The whole configuration."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Names the folder of the results under `output`."
    )
    output: Path = Field(default=Path("engines"), description="Where results go.")
    model: ModelConfig
    data: DataConfig
    preprocess: PreprocessConfig | None = Field(
        default=None, description="Default: what the model states."
    )
    export: ExportConfig = ExportConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    targets: TargetsConfig
    validation: ValidationConfig = ValidationConfig()
    bench: BenchConfig = BenchConfig()

    @property
    def folder(self) -> Path:
        """Where this configuration's results lie."""
        return self.output / self.name

    def target(self, name: str) -> TargetOptions | None:
        """Options of a target, or None if the configuration does not build it."""
        section: TargetOptions | None = getattr(self.targets, name, None)
        return section

    def precisions(self, name: str) -> tuple[str, ...]:
        """Precisions of a target, each once."""
        return tuple(dict.fromkeys(getattr(self.target(name), "precisions", ())))

    def gates(self, name: str) -> Gates:
        """Gates of a target: its own, or those of the validation section."""
        own: Gates | None = getattr(self.target(name), "gates", None)
        return own or self.validation.gates


def config_type() -> type[Config]:
    """The configuration with a section for every registered target."""
    return _config_type(tuple(TARGETS))


@cache
def _config_type(names: tuple[str, ...]) -> type[Config]:
    sections: dict[str, Any] = {name: (_target_section(name) | None, None) for name in names}
    targets = create_model(
        "TargetsConfig",
        __base__=TargetsConfig,
        __doc__="Which targets, in which precisions.",
        **sections,
    )
    fields: dict[str, Any] = {"targets": (targets, ...)}
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, **fields)


def load(path: Path) -> Config:
    """Read a configuration file.

    Relative paths in it are relative to the working directory, as on a command line.

    Raises:
        ConfigError: Anything is wrong with it; the message names file, line and key.
    """
    document = yamlfile.read(path)
    try:
        # As JSON, lists become tuples and text becomes paths, while all else stays strict.
        config = config_type().model_validate_json(json.dumps(document.values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, document))) from error
    _check_targets(config, document)
    batch = config.export.batch
    if batch != "dynamic" and set(config.bench.batches) != {batch}:
        place = document.place(("export", "batch"))
        raise ConfigError(
            f"{place}: export.batch fixes the batch to {batch}, and bench.batches asks for "
            f"{list(config.bench.batches)}: set bench.batches to [{batch}]"
        )
    return config


def _check_targets(config: Config, document: yamlfile.Document) -> None:
    """What no type can say: every target can do its precisions with its options."""
    chosen = [name for name in TARGETS if config.target(name)]
    if not chosen:
        place = document.place(("targets",))
        raise ConfigError(f"{place}: targets is empty: name at least one of {', '.join(TARGETS)}")
    for name in chosen:
        options = config.target(name)
        assert options is not None
        for precision in config.precisions(name):
            try:
                TARGETS[name].check(precision, options)
            except ConfigError as error:
                place = document.place(("targets", name, "precisions"))
                raise ConfigError(f"{place}: targets.{name}: {error}") from error


def _explain(error: ValidationError, document: yamlfile.Document) -> list[str]:
    """A line for every mistake: file, line, path of keys, what is wrong, what to write."""
    lines: dict[tuple[object, object], tuple[str, str, yamlfile.KeyPath]] = {}
    for detail in error.errors():
        # Pydantic's location also names alternatives of a union; the document knows only keys.
        written: yamlfile.KeyPath = ()
        for part in detail["loc"]:
            if (*written, part) in document.places:
                written = (*written, part)
        kind, key = detail["type"], ".".join(str(part) for part in written)
        if kind == "missing":
            missing = str(detail["loc"][-1])
            key = f"{key}.{missing}" if key else missing
            message = "is missing"
        elif kind == "extra_forbidden":
            message = f"unknown key{nearest_or_all(str(written[-1]), _known_keys(written[:-1]))}"
        else:
            text = detail["msg"].removeprefix("Value error, ")
            message = text[0].lower() + text[1:]
            if isinstance(detail["input"], str | int | float | bool):
                message += f", not {detail['input']!r}"
        lines.setdefault((written, kind == "missing" and key), (key, message, written))
    return [f"{document.place(w)}: {key}: {message}" for key, message, w in lines.values()]


def _known_keys(path: yamlfile.KeyPath) -> list[str]:
    """Keys of the section at `path`."""
    section: type[BaseModel] = config_type()
    for key in path:
        if str(key) not in section.model_fields:
            return []
        annotation = section.model_fields[str(key)].annotation
        choices = typing.get_args(annotation) or (annotation,)
        models = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        section = models[0]
    return list(section.model_fields)


def schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **config_type().model_json_schema(),
    }
