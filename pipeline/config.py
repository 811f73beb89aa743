"""The configuration: pipeline.yaml as frozen, strict models.

Every key is known, every type is checked, and an error names the file, the line, the path of keys
and the nearest known key. Reading a configuration imports none of the runtimes.
"""

from __future__ import annotations

import copy
import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from pipeline.core import machine, yamlfile
from pipeline.core.address import parse
from pipeline.core.arguments import first_excessive, first_reserved
from pipeline.core.bounds import Batch, Calls, Count, LogitError, Seconds, Seed, Threads
from pipeline.core.callables import NAMED
from pipeline.core.checkpoints import HUB_NAMED
from pipeline.core.errors import ConfigError, InputError, PreprocessError
from pipeline.core.inputs import expanded, why_no_output, why_no_path
from pipeline.core.preprocess import (
    GRAPH_FILTERS,
    CropMode,
    Interpolation,
    Preprocess,
    problem_with,
)
from pipeline.core.remote import is_address, why_no_address
from pipeline.core.words import nearest_or_all, shown
from pipeline.targets.base import TargetOptions
from pipeline.targets.registry import TARGETS, needs_calibration

Share = Annotated[float, Field(ge=0, le=1)]

_BYTES = 4  # of a float32
_SMALLEST_INPUT = 3 * 32 * 32  # numbers of an image, where only the network knows


def _path(text: str) -> str:
    """A path with the home folder for `~`."""
    path = expanded(text)
    if problem := why_no_path(path):
        raise ValueError(f"this {problem}")
    return path


def _dataset(uri: str) -> str:
    """A dataset's name with the home folder for `~` in its path."""
    scheme, colon, rest = uri.partition(":")
    if is_address(rest) and (problem := why_no_address(rest)):
        raise ValueError(problem)
    return f"{scheme}{colon}{_path(rest)}" if rest else uri


PathText = Annotated[str, AfterValidator(_path)]
DatasetName = Annotated[str, AfterValidator(_dataset)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AUTO = "auto"
"""In place of calibration images: those of the training split, or a part of the validation's."""

OWN_WEIGHTS = "own"
"""In place of a checkpoint: those that the callable of `model.module` gives its network, or those
of the graph of `model.onnx`."""


HUB_WEIGHTS = "hub"
"""In place of a checkpoint: those of the repository of `model.hub`."""


class ModelConfig(Section):
    """Which network, with which weights."""

    name: str | None = Field(
        default=None,
        max_length=200,
        description="care_s0, care_s1, care_s2, care_tiny, mlla_t, or timm/NAME for any "
        "classification model of timm.",
    )
    module: str | None = Field(
        default=None,
        max_length=200,
        pattern=NAMED,
        description="In place of a name: package.module:callable, which returns an nn.Module of "
        "your own; it is looked for where Python looks, then in the working directory.",
    )
    onnx: PathText | None = Field(
        default=None,
        description="In place of a name: an ONNX graph in float32, which holds its weights; it is "
        "the reference then, and needs no checkpoint.",
    )
    hub: str | None = Field(
        default=None,
        max_length=200,
        pattern=HUB_NAMED,
        description="In place of a name: organization/repository of the Hub that holds a network "
        "of timm's with its weights; after an @ a revision. It is taken from the Hub's cache, or "
        "else from the Hub.",
    )
    checkpoint: PathText = Field(
        description="A checkpoint file (.pth.tar, .pt, .safetensors), or the index of several "
        "(model.safetensors.index.json); 'embedded' for the weights that the package carries; "
        "'pretrained' for those that timm has of its network; 'random' for random weights, to try "
        "the pipeline; 'own' for those that the callable of "
        "`module` gives its network."
    )
    ema: bool = Field(default=False, description="Take the averaged weights of the checkpoint.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the model's constructor."
    )

    @property
    def title(self) -> str:
        """Its name, or that of the callable that makes it, of its repository or graph's file."""
        return self.name or self.module or self.hub or Path(str(self.onnx)).name

    @model_validator(mode="before")
    @classmethod
    def _weights_of_graph(cls, values: Any) -> Any:
        """A graph or a repository holds its weights: nothing else has to be said."""
        if not isinstance(values, dict) or "checkpoint" in values:
            return values
        if values.get("onnx"):
            return {**values, "checkpoint": OWN_WEIGHTS}
        return {**values, "checkpoint": HUB_WEIGHTS} if values.get("hub") else values

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        sources = (self.name, self.module, self.onnx, self.hub)
        if sum(stated is not None for stated in sources) != 1:
            raise ValueError(
                "give the network's name, a module that makes it, its onnx graph, or its "
                "repository on the hub: one of them"
            )
        if (self.hub is None) == (self.checkpoint == HUB_WEIGHTS) or (self.hub and self.ema):
            raise ValueError(
                "hub names organization/repository, which holds the weights: leave out checkpoint "
                "and ema; for other weights give name and checkpoint"
            )
        if self.onnx and (self.checkpoint != OWN_WEIGHTS or self.ema or self.kwargs):
            raise ValueError(
                "an onnx graph holds its weights and is made already: leave out checkpoint, ema "
                "and kwargs"
            )
        if self.name and self.checkpoint == OWN_WEIGHTS:
            raise ValueError(
                f"checkpoint {OWN_WEIGHTS!r} is for a network that a module makes: name a file"
            )
        if self.module and self.checkpoint in ("embedded", "pretrained", "random"):
            raise ValueError(
                f"checkpoint {self.checkpoint!r} is for named networks: name a file, or 'own' for "
                "the weights that the callable gives its network"
            )
        return self

    @field_validator("kwargs")
    @classmethod
    def _no_reserved(cls, kwargs: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # What timm would do with an argument is nothing to a callable of the user's own.
        named = info.data.get("name") is not None or info.data.get("hub") is not None
        if named and (problem := first_reserved(kwargs) or first_excessive(kwargs)):
            raise ValueError(problem)
        return kwargs


class PreprocessConfig(Section):
    """How an image becomes the network's input."""

    size: int = Field(description="Height and width in pixels.")
    crop: float = Field(description="Share of the resized shorter side that the centre crop keeps.")
    interpolation: Interpolation = Field(default="bicubic", description="How an image is resized.")
    mean: tuple[float, ...] = Field(description="By channel, for pixels of 0 … 1.")
    std: tuple[float, ...] = Field(description="By channel, for pixels of 0 … 1.")
    channels: Literal["rgb", "gray"] = Field(
        default="rgb", description="What the network takes: colours, or their brightness alone."
    )
    exif: Literal["apply", "ignore"] = Field(
        default="apply",
        description="Whether an orientation tag turns an image; published checkpoints were trained "
        "and judged with 'ignore'.",
    )
    crop_mode: CropMode = Field(
        default="center",
        description="What is resized to size / crop pixels: 'center', the shorter side; 'squash', "
        "both sides, whatever the shape; 'border', the longer side, with the mean colour around "
        "what is left.",
    )

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise ValueError(
                "only square inputs are supported: give one number, both height and width, and a "
                "network that takes such images"
            )
        return value

    @field_validator("size", "crop", "mean", "std")
    @classmethod
    def _sensible(cls, value: Any, info: ValidationInfo) -> Any:
        if problem := problem_with(str(info.field_name), value):
            raise ValueError(problem)
        return value


class DataConfig(Section):
    """Which images: never the same ones for validation and calibration."""

    validation: DatasetName = Field(
        description="folder:PATH, tar:PATH, wds:PATTERN or fashion-mnist: the validation split. "
        "Tar files may lie at an address: wds:s3://bucket/val-{000..049}.tar."
    )
    calibration: DatasetName | None = Field(
        default=None,
        description="The same for training images, from which int8 gets its ranges; their classes "
        "are not needed, so that a folder of images will do. 'auto': the training split beside "
        "the validation split; where there is none, a part of the validation images, on which "
        "nothing is judged then.",
    )
    labels: PathText | None = Field(
        default=None,
        description="The network's classes in its order: a text file with a class a line (as the "
        "dataset names it, and after a tab as people do), or imagenet-1k; default: what the "
        "checkpoint states, or the classes of the validation set.",
    )
    identity: Literal["content", "fingerprint"] = Field(
        default="content",
        description="How changed images are noticed: 'content' hashes every image once; "
        "'fingerprint' trusts names and sizes and hashes a sample, for very large data.",
    )


class ExportConfig(Section):
    """The ONNX graph from which the targets are built."""

    opset: Annotated[int, Field(ge=18, le=23)] = Field(
        default=20, description="Version of ONNX's operator set."
    )
    batch: Literal["dynamic"] | Batch = Field(
        default="dynamic",
        description="Batch size that engines and models take: 'dynamic' or a number.",
    )
    preprocessing: Literal["outside", "graph"] = Field(
        default="outside",
        description="'graph': also write photo.onnx, beside the export and into each ONNX Runtime "
        "artifact, which takes a decoded photograph of any size, uint8 (height, width, 3), and "
        "resizes, crops and normalizes it itself; other targets keep their input.",
    )
    simplify: bool = Field(default=True, description="Let onnxsim simplify the exported graph.")
    simplify_timeout_s: Annotated[int, Field(gt=0, le=24 * 3600)] = Field(
        default=300, description="End onnxsim after so many seconds, and keep the exported graph."
    )

    @property
    def fixed_batch(self) -> int | None:
        """The batch size, None for a dynamic one."""
        return None if self.batch == "dynamic" else self.batch


class CalibrationConfig(Section):
    """Ranges for quantization, and decisions about precision."""

    images: Count = Field(default=512, description="How many calibration images, at least 8.")
    method: Literal["min-max", "percentile", "entropy", "mse"] = Field(
        default="mse", description="How the range of a tensor is chosen from what was seen."
    )
    seed: Seed = Field(default=0, description="Chooses the images: equal seeds choose equally.")
    shard: Count = Field(
        default=256,
        description="Images of a shard: a calibration that is killed goes on after its last one, "
        "and workers share them.",
    )
    max_top1_drop: Share = Field(
        default=0.003, description="Layers stay in higher precision until the drop is at most this."
    )
    max_error: LogitError | None = Field(
        default=None,
        description="repair of trt: largest error of the logits in 16 bits, relative to "
        "their norm; default: 0.05 in float16, any in bfloat16.",
    )
    cpus: Literal["any", "vnni"] = Field(
        default="any",
        description="int8 of ort: the same answers on every CPU, or as precise as VNNI allows.",
    )
    gelu: Literal["auto", "exact", "sigmoid"] = Field(
        default="auto",
        description="int8 of ort: GELU in 8 bits where nothing is lost, never, or always.",
    )


class MetricLimits(Section):
    """Limits of one number of `validation.metrics`."""

    min: float | None = Field(default=None, description="It is at least so large.")
    max: float | None = Field(default=None, description="It is at most so large.")


class Gates(Section):
    """Limits that decide the exit code; a limit of None is none."""

    max_top1_drop: Share | None = Field(
        default=None, description="Top-1 of PyTorch minus that of the artifact, as a share."
    )
    min_agreement: Share | None = Field(
        default=None, description="Share of images with the same top-1 class as PyTorch."
    )
    min_worst_class: Share | None = Field(
        default=None, description="Top-1 of the class that has the lowest, as a share."
    )
    metrics: dict[str, MetricLimits] = Field(
        default_factory=dict,
        description="Limits of what validation.metrics gives, by its names, such as "
        "{macro_f1: {min: 0.8}}.",
    )
    max_latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Median at the first batch size; ignored where it is not measured.",
    )
    undecided: Literal["point", "fail", "pass"] = Field(
        default="point",
        description="A limit inside of the figure's 95 % interval cannot be told: judge it by the "
        "figure itself ('point'), let it fail, or let it pass. The report says so in any case.",
    )


class ValidationConfig(Section):
    """How accuracy is judged."""

    images: Count | None = Field(default=None, description="At most so many images; default: all.")
    batch: Batch = Field(default=64, description="Images that are judged at once.")
    shard: Count = Field(
        default=1000,
        description="Images of a shard: a validation that is killed goes on after its last one, "
        "and several processes or workers share them.",
    )
    metrics: str | None = Field(
        default=None,
        max_length=200,
        pattern=NAMED,
        description="package.module:function of your own: takes logits (images, classes) and "
        "labels (images,), returns numbers by name; it is looked for as model.module is.",
    )
    gates: Gates = Field(default=Gates(), description="Limits for all targets.")


class BenchConfig(Section):
    """How latency is measured."""

    batches: Annotated[tuple[Batch, ...], Field(min_length=1)] = Field(
        default=(1,), description="Batch sizes; the latency at the first stands for an artifact."
    )
    threads: Threads | None = Field(
        default=None, description="CPU threads; default: as many as this process may use."
    )
    warmup: Calls = Field(default=20, description="Calls before the first timed one.")
    samples: Calls = Field(default=300, description="Timed calls, at most.")
    settled: Share = Field(
        default=0.03,
        description="End a measurement once every artifact's median is known to this share of "
        "itself (99 %), after enough calls for each percentile that all samples would give; 0: "
        "never.",
    )
    max_seconds: Seconds = Field(
        default=20.0, description="End a measurement after this time, with the samples it has."
    )


def _address(text: SecretStr) -> SecretStr:
    """A store's address, if it can be one."""
    try:
        parse(text.get_secret_value())
    except InputError as error:
        raise ValueError(str(error)) from None
    return text


class StoreConfig(Section):
    """A store that several machines share."""

    address: Annotated[SecretStr, AfterValidator(_address)] = Field(
        max_length=2000,
        description="A folder, s3://bucket/folder, gs://…, abfs://… or sftp://…; take keys from "
        "the environment: ${NAME}.",
    )
    options: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Further options of the driver of fsspec, such as endpoint_url.",
    )
    push: bool = Field(default=False, description="Give what is built here to the store.")
    required: bool = Field(
        default=False, description="A store that fails is an error; else the run goes on alone."
    )
    timeout_s: Seconds = Field(default=60.0, description="How long the store may take to answer.")


SchedulerAddress = Annotated[
    str, Field(pattern=r"^(tcp|tls)://[^/@?#\s]+:\d{1,5}$", max_length=300)
]


class FleetConfig(Section):
    """Workers on other machines, by dask.distributed; they need a store."""

    scheduler: SchedulerAddress = Field(
        description="The address of Dask's scheduler: tls://HOST:PORT; tcp://HOST:PORT for one on "
        "this machine."
    )
    insecure: bool = Field(
        default=False, description="Take tcp:// to other machines, too: without TLS."
    )
    resources: tuple[str, ...] | None = Field(
        default=None,
        description="What the fleet shall have, of cpu, bench, rtx and mac: steps wait for it; "
        "default: what its workers state when the run begins.",
    )
    wait_s: Seconds = Field(
        default=300.0, description="How long a step may wait for a worker with what it needs."
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


RESULTS_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a configuration may call its results: the name of a folder."""


class TargetsConfig(Section):
    """Which targets, in which precisions: one optional section for each registered target."""


class Config(Section):
    """The whole configuration."""

    name: Annotated[str, Field(pattern=RESULTS_NAME, max_length=100)] = Field(
        description="Names the folder of the results under `output`."
    )
    output: Annotated[Path, AfterValidator(lambda path: Path(expanded(str(path))))] = Field(
        default=Path("engines"), description="Where results go."
    )
    model: ModelConfig = Field(description="Which network, with which weights.")
    data: DataConfig = Field(description="Which images judge and calibrate.")
    preprocess: PreprocessConfig | None = Field(
        default=None, description="Default: what the checkpoint states, or the model."
    )
    export: ExportConfig = Field(default=ExportConfig(), description="The ONNX graph.")
    calibration: CalibrationConfig = Field(
        default=CalibrationConfig(), description="How ranges of int8 are found."
    )
    targets: TargetsConfig = Field(description="Which runtimes to build for.")
    validation: ValidationConfig = Field(
        default=ValidationConfig(), description="How accuracy is judged."
    )
    bench: BenchConfig = Field(default=BenchConfig(), description="How latency is measured.")
    store: StoreConfig | None = Field(
        default=None, description="Where machines share what they built; default: nowhere."
    )
    fleet: FleetConfig | None = Field(
        default=None, description="Where steps run; default: on this machine."
    )

    @property
    def folder(self) -> Path:
        """Where this configuration's results lie."""
        return self.output / self.name

    @property
    def calibrated(self) -> tuple[str, ...]:
        """What needs calibration images, such as "ort/int8"."""
        return tuple(
            f"{name}/{precision}"
            for name in TARGETS
            for precision in self.precisions(name)
            if needs_calibration(TARGETS[name], precision, self.target(name))
        )

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
    sections: dict[str, Any] = {
        name: (_target_section(name) | None, Field(default=None, description=TARGETS[name].title))
        for name in names
    }
    targets = create_model(
        "TargetsConfig",
        __base__=TargetsConfig,
        __doc__="Which targets, in which precisions.",
        **sections,
    )
    fields: dict[str, Any] = {
        "targets": (targets, Field(description="Which runtimes to build for."))
    }
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, **fields)


@dataclass(frozen=True)
class Written:
    """A configuration, and where its values stand.

    Attributes:
        config: The configuration.
        document: The file's values and their lines.
    """

    config: Config
    document: yamlfile.Document


def load(path: Path) -> Config:
    """Read a configuration file; see `read`."""
    return read(path).config


def read(path: Path) -> Written:
    """Read a configuration file, and keep where its values stand.

    Relative paths in it are relative to the working directory, as on a command line.

    Raises:
        ConfigError: Anything is wrong with it; the message names file, line and key.
    """
    first = "write a first one: python -m pipeline init --help"
    document = yamlfile.read(path, advice=f"{yamlfile.NAME_ONE}, or {first}")
    return Written(_checked(document), document)


def from_mapping(values: Mapping[str, Any], what: str = "(a mapping)") -> Written:
    """Read a configuration from a mapping, as a configuration file holds one.

    Nothing in it is filled from the environment, and it extends no file.

    Args:
        values: The mapping.
        what: What it is, for messages.

    Raises:
        ConfigError: Anything is wrong with it; the message names the key.
    """
    try:
        # As a file would hold it: paths and tuples become what JSON has.
        plain = json.loads(json.dumps(values, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration is no plain mapping: {error}") from error
    place = yamlfile.Place(Path(what), 0)
    document = yamlfile.Document(plain, dict.fromkeys(_paths(plain), place))
    return Written(_checked(document), document)


def _paths(values: Any, above: yamlfile.KeyPath = ()) -> Iterator[yamlfile.KeyPath]:
    """Path of every value of a plain mapping, and its own."""
    yield above
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _paths(value, (*above, key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _paths(value, (*above, number))


def _checked(document: yamlfile.Document) -> Config:
    config = _validated(document)
    problems = [
        problem
        for check in (
            _check_targets,
            _check_batch,
            _check_opset,
            _check_preprocess,
            _check_photo,
            _check_memory,
            _check_output,
            _check_metrics,
        )
        for problem in check(config, document)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _validated(document: yamlfile.Document) -> Config:
    try:
        return _parsed(document.values)
    except ValidationError as error:
        values = _with_numbers(document, error)
    try:
        return _parsed(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, document))) from error


def _parsed(values: dict[str, Any]) -> Config:
    # As JSON, lists become tuples and text becomes paths, while all else stays strict.
    return _config_type(_asked_for(values)).model_validate_json(json.dumps(values))


def _asked_for(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Targets that a document has a section for: the modules of the others need not be loaded."""
    stated = values.get("targets")
    asked = stated if isinstance(stated, dict) else ()
    return tuple(name for name in TARGETS if name in asked)


def _with_numbers(document: yamlfile.Document, error: ValidationError) -> dict[str, Any]:
    """The document with numbers where a variable's text stands in a number's place.

    What comes from the environment is text: a checkpoint may be called 5. Where a number is needed,
    the text is read as one.
    """
    values = copy.deepcopy(document.values)
    for detail in error.errors():
        path = _written(detail, document)
        if detail["type"] in ("int_type", "float_type", "bool_type") and path in document.filled:
            *above, last = path
            holder: Any = values
            for key in above:
                holder = holder[key]
            holder[last] = yamlfile.plain(holder[last])
    return values


def _check_batch(config: Config, document: yamlfile.Document) -> Iterator[str]:
    batch = config.export.batch
    if batch != "dynamic" and set(config.bench.batches) != {batch}:
        place = document.place(("export", "batch"))
        yield (
            f"{place}: export.batch fixes the batch to {batch}, and bench.batches asks for "
            f"{list(config.bench.batches)}: set bench.batches to [{batch}]"
        )


def _check_opset(config: Config, document: yamlfile.Document) -> Iterator[str]:
    if config.model.onnx is not None and "opset" in config.export.model_fields_set:
        yield (
            f"{document.place(('export', 'opset'))}: export.opset: the graph of model.onnx keeps "
            "its own operator set: leave it out"
        )


def _check_preprocess(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """What no field says by itself: as many values as channels, as many channels as the network."""
    if config.preprocess is None:
        return
    place = document.place(("preprocess",))
    try:
        depth = Preprocess.from_dict(config.preprocess.model_dump()).depth
    except PreprocessError as error:
        yield f"{place}: preprocess: {error}"
        return
    stated = config.model.kwargs.get("in_chans", depth)
    if stated != depth:
        place = document.place(("model", "kwargs", "in_chans"))
        yield (
            f"{place}: model.kwargs.in_chans: the network takes {stated!r} channels, and "
            f"{config.preprocess.channels} images have {depth}: set preprocess.channels, mean and "
            "std to what the network takes"
        )


def _check_photo(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """Refuse preprocessing in the graph where that is known to fail already."""
    if config.export.preprocessing != "graph":
        return
    place = document.place(("export", "preprocessing"))
    if config.export.fixed_batch not in (None, 1):
        yield (
            f"{place}: export.preprocessing: a graph that takes photographs of any size takes one "
            f"at a time, and export.batch fixes the batch to {config.export.batch}: set it to 1, "
            "or leave it out"
        )
    stated = config.preprocess
    if stated is not None and stated.interpolation not in GRAPH_FILTERS:
        yield (
            f"{place}: export.preprocessing: a graph can resize by {' and '.join(GRAPH_FILTERS)}, "
            f"and preprocess.interpolation is {stated.interpolation}: leave one of them out"
        )


def _check_memory(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """Refuse batches whose images alone fill the memory."""
    stated = config.preprocess
    numbers = stated.size**2 * len(stated.mean) if stated else _SMALLEST_INPUT
    there = machine.memory()
    for path, batch in _batches(config):
        needed = numbers * batch * _BYTES
        if needed > there / 2:
            yield (
                f"{document.place(path)}: {'.'.join(map(str, path))}: {batch} images take "
                f"{needed / 1e9:.3g} GB, this process may use {there / 1e9:.3g} GB: choose a "
                "smaller batch"
            )


def _batches(config: Config) -> Iterator[tuple[yamlfile.KeyPath, int]]:
    """Every size of a batch that is made, and where it is stated."""
    yield ("validation", "batch"), config.validation.batch
    yield ("export", "batch"), config.export.fixed_batch or 1
    for number, batch in enumerate(config.bench.batches):
        yield ("bench", "batches", number), batch


def _check_output(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """Results need a folder, and not among the images: a run would read what it wrote."""
    place = document.place(("output",))
    if problem := why_no_output(config.folder):
        yield f"{place}: output: {shown(config.folder, most=300)} {problem}: choose another folder"
        return
    output = os.path.realpath(config.folder)
    told: set[str] = set()
    for key, uri in (
        ("validation", config.data.validation),
        ("calibration", config.data.calibration),
    ):
        scheme, _, path = (uri or "").partition(":")
        if scheme != "folder":
            continue
        images = os.path.realpath(path)
        if os.path.commonpath([images, output]) == images and images not in told:
            told.add(images)
            yield (
                f"{place}: output: {config.folder} lies in the folder of data.{key}, so that "
                "results would be taken for images: choose a folder outside"
            )


def _check_metrics(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """Limits of numbers that nothing gives would hold without end."""
    if config.validation.metrics is not None:
        return
    own = [(("targets", name), getattr(config.target(name), "gates", None)) for name in TARGETS]
    for owner, gates in ((("validation",), config.validation.gates), *own):
        if gates is not None and gates.metrics:
            path = (*owner, "gates", "metrics")
            yield (
                f"{document.place(path)}: {'.'.join(path)}: there are no such numbers: give "
                "validation.metrics, the function that returns them"
            )


def _check_targets(config: Config, document: yamlfile.Document) -> Iterator[str]:
    """What no type can say: every target can do its precisions with its options."""
    chosen = [name for name in TARGETS if config.target(name)]
    if not chosen:
        place = document.place(("targets",))
        yield f"{place}: targets is empty: name at least one of {', '.join(TARGETS)}"
    for name in chosen:
        options = config.target(name)
        assert options is not None
        for precision in config.precisions(name):
            try:
                TARGETS[name].check(precision, options)
            except ConfigError as error:
                place = document.place(("targets", name, "precisions"))
                yield f"{place}: targets.{name}: {error}"


def _explain(error: ValidationError, document: yamlfile.Document) -> list[str]:
    """A line for every mistake: file, line, path of keys, what is wrong, what to write."""
    lines: dict[tuple[object, object], tuple[str, str, yamlfile.KeyPath]] = {}
    for detail in error.errors():
        written = _written(detail, document)
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
            # An address may hold keys.
            secret = written[:1] == ("store",) or is_address(str(detail["input"]))
            if isinstance(detail["input"], str | int | float | bool) and not secret:
                message += f", not {shown(repr(detail['input']))}"
        lines.setdefault((written, kind == "missing" and key), (key, message, written))
    return [f"{document.place(w)}: {key}: {message}" for key, message, w in lines.values()]


def _written(detail: Any, document: yamlfile.Document) -> yamlfile.KeyPath:
    """The keys in the document that an error is about.

    Pydantic's location also names alternatives of a union; the document knows only keys.
    """
    written: yamlfile.KeyPath = ()
    for part in detail["loc"]:
        if (*written, part) in document.places:
            written = (*written, part)
    return written


def _known_keys(path: yamlfile.KeyPath) -> list[str]:
    """Keys of the section at `path`."""
    section: type[BaseModel] = config_type()
    named = False
    for key in path:
        if named:  # a name of the user's own, in a mapping of sections
            named = False
            continue
        if str(key) not in section.model_fields:
            return []
        annotation = section.model_fields[str(key)].annotation
        choices = typing.get_args(annotation) or (annotation,)
        models = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        section, named = models[0], typing.get_origin(annotation) is dict
    return [] if named else list(section.model_fields)


def schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **config_type().model_json_schema(),
    }
