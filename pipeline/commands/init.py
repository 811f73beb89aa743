"""`init`: a first configuration, written after a look at the checkpoint and the images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import config as configuration
from pipeline.api.files import GRAPH, Stated, preprocess_of, said_by
from pipeline.config import AUTO, OWN_WEIGHTS
from pipeline.core import yamlfile
from pipeline.core.checkpoints import HUB, HUB_NAMED
from pipeline.core.described import describe, described_by
from pipeline.core.errors import DataError, InputError, about
from pipeline.core.files import write_atomically
from pipeline.core.inputs import expanded
from pipeline.core.listing import Folders, list_split, parse
from pipeline.core.words import nearest_or_all, shown
from pipeline.source import PRETRAINED
from pipeline.targets.registry import TARGETS, needs_calibration

_NO_FILES = ("embedded", PRETRAINED, "random", OWN_WEIGHTS)
"""What stands for a checkpoint and is no file."""

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:-]*(?<!:)")
"""Text that is itself in YAML, without quotes, unless it reads as a number."""


@dataclass(frozen=True)
class Wanted:
    """What the user says of a first configuration.

    Attributes:
        model: Name of a network, "package.module:callable", an ONNX graph's file, or
            "hub:organization/repository"; None for what the checkpoint says.
        checkpoint: A file, "embedded", "random" or "own"; None where the model holds its weights.
        data: Name of the validation images' dataset, such as "folder:photos".
        calibration: The same of training images; None for the training split of `data`, if any.
        labels: File with the network's classes; None for the classes of `data`.
        name: Name of the results; None for the network's.
        targets: Which targets, such as "ort", or "ort/fp32" for one precision of it; empty for
            the usual ones.
        images: How images become a graph's input, as far as it does not say so itself.
    """

    model: str | None
    checkpoint: str | None
    data: str
    calibration: str | None = None
    labels: str | None = None
    name: str | None = None
    targets: tuple[str, ...] = ()
    images: Stated = field(default_factory=Stated)


@dataclass(frozen=True)
class First:
    """A first configuration before it is written.

    Attributes:
        written: What it holds; its messages say that it was not written.
        text: What the file will hold.
        found: What was found on the way, lines for people.
    """

    written: configuration.Written
    text: str
    found: Sequence[str]


def first(wanted: Wanted, path: Path) -> First:
    """Look at what a configuration shall hold.

    Args:
        wanted: What it shall hold.
        path: Where it will be written; a file that is there stays.

    Raises:
        InputError: The file is there already, or what was given does not fit together.
    """
    if path.exists():
        raise InputError(f"{path} is there already: name another file, or remove it first")
    values, found = _looked_at(wanted)
    text = _text(values)
    held = yamlfile.value_of(text, str(path))
    return First(configuration.from_mapping(held, f"{path} was not written"), text, found)


def write(looked_at: First, path: Path) -> str:
    """Write a first configuration.

    Returns:
        Lines for people.
    """
    write_atomically(path, looked_at.text)
    configuration.load(path)
    return "\n".join([*looked_at.found, f"wrote {path}"])


def _looked_at(wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    """Values of the configuration, and what was found on the way."""
    asked = _asked(wanted.targets)
    key, stated = _source(wanted)
    model = wanted.model or stated.get("model")
    if not model:
        raise InputError(
            f"{wanted.checkpoint} does not say which network it is of: give --model, such as "
            "timm/resnet18 or my_package.nets:make"
        )
    classes = _classes(wanted.data)
    if not wanted.labels:
        _require_known(stated, classes)
        _require_as_many(wanted, str(model), stated, classes)
    held_out = _held_out(wanted)
    calibration = wanted.calibration or _training(wanted.data) or (AUTO if held_out else None)
    found = [f"network {model}, {_count(stated.get('labels') or classes, wanted.labels)}"]
    if held_out:
        found.append(held_out)
    if key == "module" and not stated.get("preprocess"):
        found.append(
            "how its images are prepared is left to the network itself, which has to state it as "
            "timm's do (pretrained_cfg); if it does not, state it here with --size, --mean and "
            "--std"
        )
    if not calibration:
        found.append(
            "no training images were found: without --calibration, no precision that needs them "
            "(int8) is asked for"
        )
    values = {
        "name": wanted.name or _results_name(model.removesuffix(GRAPH)),
        "key": key,
        "model": model.removeprefix(HUB),
        "kwargs": stated.get("model_kwargs") or {},
        "checkpoint": wanted.checkpoint,
        "data": wanted.data,
        "calibration": calibration or wanted.data,
        "calibrated": bool(calibration),
        "labels": wanted.labels,
        "says": bool(stated.get("labels")),
        "preprocess": stated.get("preprocess"),
        "targets": {
            name: own or _usual(name, calibrated=bool(calibration)) for name, own in asked.items()
        },
    }
    return values, found


def _source(wanted: Wanted) -> tuple[str, Mapping[str, Any]]:
    """The key of the network's source, and what is known of the network.

    Raises:
        InputError: Checkpoint and network do not go together.
    """
    model = wanted.model or ""
    holds = {"onnx": model.lower().endswith(GRAPH), "hub": model.startswith(HUB)}
    key = next((name for name, is_it in holds.items() if is_it), None)
    key = key or ("module" if ":" in model else "name")
    if key not in ("onnx", "module") and wanted.images != Stated():
        raise InputError(
            "--size, --crop, --mean and --std are for --model graph.onnx and "
            "package.module:callable alone: other networks state them themselves"
        )
    if key in ("module", "name"):
        if wanted.checkpoint is None:
            raise InputError(
                "--checkpoint is missing: name a file, or embedded, pretrained, random or own; "
                f"only an ONNX graph and {HUB}organization/repository hold their weights"
            )
        if key == "name" and model:
            from care.factory import require_known

            with about("--model"):
                require_known(model.removeprefix("timm/"))
        stated = _stated(wanted.checkpoint, model)
        return key, _prepared(stated, wanted) if key == "module" else stated
    if wanted.checkpoint is not None:
        raise InputError(f"--model {model} holds its weights: leave out --checkpoint")
    with about("--model"):
        return key, _of_graph(wanted) if key == "onnx" else _of_hub(model.removeprefix(HUB))


def _prepared(stated: Mapping[str, Any], wanted: Wanted) -> Mapping[str, Any]:
    """What a checkpoint says, with what the user says of the images of a network of their own."""
    if wanted.images == Stated():
        return stated
    said = described_by(stated, Path(str(wanted.checkpoint)))
    with about(f"--model {wanted.model}"):
        # Where nothing is said of channels, one value of --mean is all three's.
        depth = said.preprocess.depth if said.preprocess else 3
        preprocess = preprocess_of(wanted.images, said, (depth, None, None), normalizes=False)
    return {**stated, "preprocess": preprocess.to_dict()}


def _of_graph(wanted: Wanted) -> dict[str, Any]:
    """What an ONNX graph says of itself, and what the user says of its images."""
    from pipeline.graphs.given import look

    path = Path(expanded(str(wanted.model)))
    if not path.is_file():
        raise InputError(f"{path} is no file: name an ONNX graph")
    found = look(path)
    said = said_by(found.metadata, path)
    preprocess = preprocess_of(wanted.images, said, found.shape, normalizes=False)
    return {
        "num_classes": found.classes,
        "labels": list(said.labels or ()),
        "preprocess": preprocess.to_dict(),
    }


def _of_hub(repository: str) -> dict[str, Any]:
    from care.pretrained import fetch_hub

    if not re.match(HUB_NAMED, repository):
        raise InputError(f"{shown(repository)} names no repository: write {HUB}org/repository")
    found = fetch_hub(repository)
    return {"num_classes": found.classes, "labels": list(found.labels or ())}


def _asked(targets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Precisions of each target that is asked for; none where the usual ones will do."""
    asked: dict[str, tuple[str, ...]] = {}
    for stated in targets or [name for name in TARGETS if TARGETS[name].proposed]:
        name, slash, precision = stated.partition("/")
        if name not in TARGETS:
            raise InputError(f"{shown(name)!r} is no target{nearest_or_all(name, list(TARGETS))}")
        known = list(TARGETS[name].precisions)
        if slash and precision not in known:
            hint = nearest_or_all(precision, known)
            raise InputError(f"{name} has no precision {shown(precision)!r}{hint}")
        asked[name] = (*asked.get(name, ()), *([precision] if slash else []))
    return asked


def _usual(name: str, *, calibrated: bool) -> tuple[str, ...]:
    """Precisions of a target of which none was named: its first where it proposes none."""
    target = TARGETS[name]
    usual = tuple(
        precision
        for precision in target.proposed
        if calibrated or not needs_calibration(target, precision, None)
    )
    return usual or tuple(target.precisions)[:1]


def _stated(checkpoint: str, model: str) -> Mapping[str, Any]:
    """What a checkpoint says about itself; nothing where it is no file.

    Of weights that timm publishes, their number of classes, which it knows without them.
    """
    if checkpoint == PRETRAINED:
        import timm

        stated = timm.get_pretrained_cfg(model.removeprefix("timm/"), allow_unregistered=True)
        return {} if stated is None else {"num_classes": stated.num_classes}
    if checkpoint in _NO_FILES:
        return {}
    path = Path(expanded(checkpoint))
    if not path.is_file():
        raise InputError(f"--checkpoint: {path} is no file: name a checkpoint")
    from care import checkpoint as checkpoints
    from care.factory import stated_arguments

    with about("--checkpoint"):
        metadata = checkpoints.read_metadata(path)
        # Refused here rather than in the run: it would be written into the configuration.
        return {**metadata, "model_kwargs": stated_arguments(metadata, path)}


def _classes(data: str) -> tuple[str, ...] | None:
    """Names of the classes of a dataset of folders; None where they are in files."""
    with about("--data"):
        split = list_split(data, "validation", _assets())
    return split.classes if isinstance(split, Folders) else None


def _training(data: str) -> str | None:
    """The same dataset, if it has a training split of its own."""
    kind, path = parse(data)
    if kind == "fashion-mnist":
        return data
    if kind != "folder":
        return None
    root = Path(expanded(path))
    try:
        training = list_split(data, "train", _assets())
    except DataError:
        return None
    validation = list_split(data, "validation", _assets())
    apart = isinstance(training, Folders) and training.root != validation.root
    return data if apart and training.root != root else None


def _require_known(stated: Mapping[str, Any], classes: Sequence[str] | None) -> None:
    """Refuse folders of classes that the checkpoint does not name: it knows no others."""
    labels = stated.get("labels")
    if not labels or classes is None:
        return
    if unknown := [name for name in classes if name not in labels]:
        raise DataError(
            f"the checkpoint's classes are {', '.join(map(str, labels[:4]))}, …, and the images' "
            f"folders {', '.join(map(shown, unknown[:4]))}, …: give the images of its own classes"
        )


def _require_as_many(
    wanted: Wanted, model: str, stated: Mapping[str, Any], classes: Sequence[str] | None
) -> None:
    """Refuse images of another number of classes, where nothing names the network's own."""
    if classes is None or stated.get("labels"):
        return
    own = stated.get("num_classes") or _head_classes(wanted.checkpoint, model, len(classes))
    if own not in (None, len(classes)):
        raise DataError(
            f"{wanted.checkpoint or model} has {own} classes, and {wanted.data} has "
            f"{len(classes)}: give the images of its own classes, the network's classes as "
            "--labels, or fine-tune it for "
            "these with python -m care.train --init"
        )


def _head_classes(checkpoint: str | None, model: str, count: int) -> int | None:
    """How many classes the head of a file's weights has; None where that is not known."""
    if checkpoint is None or checkpoint in _NO_FILES or ":" in model:
        return None
    from care import checkpoint as checkpoints
    from care.factory import create_model
    from care.finetune import head_classes

    with about("--checkpoint"):
        state = checkpoints.read(expanded(checkpoint))
    with about("--model"):
        return head_classes(state, create_model(model.removeprefix("timm/"), num_classes=count))


def _held_out(wanted: Wanted) -> str | None:
    """What to say of the images that training held out; None where they are none of these."""
    if wanted.checkpoint is None or wanted.checkpoint in _NO_FILES:
        return None
    from care.data import hold_out, open_dataset

    with about("--checkpoint"):
        stated = describe(Path(expanded(wanted.checkpoint))).hold_out
    if stated is None:
        return None
    with about("--data"):
        whole = open_dataset(wanted.data, "validation")
    if whole.identity() != stated.identity:
        return None
    learned, judging = hold_out(whole, stated.share, stated.seed)
    return (
        f"{len(judging)} of {len(whole)} images judge, those that training held out; the "
        f"{len(learned)} that it learned from give the ranges of int8"
    )


def _count(classes: Sequence[str] | None, labels: str | None) -> str:
    if labels:
        return f"classes by {labels}"
    return "classes by the dataset" if classes is None else f"{len(classes)} classes"


def _results_name(model: str) -> str:
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model.rpartition("/")[2])
    return name.lstrip("._-") or "network"


def _assets() -> Path:
    import care

    return Path(str(care.__file__)).parent / "assets"


def _yaml(value: Any) -> str:
    """A value as YAML; whatever stands in a name or a path stays what it is."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and yamlfile.plain(value) == value:
        return value
    # JSON is YAML.
    return json.dumps(value, ensure_ascii=False)


def _text(values: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("pipeline.commands", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _yaml
    return environment.get_template("pipeline.yaml.j2").render(values)
