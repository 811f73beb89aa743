"""A model repository for NVIDIA's Triton Inference Server, from a built artifact.

    <repository>/<name>/config.pbtxt      input, output, batching, instances, warm-up
                        labels.txt        a class a line, in the order of the logits
                        artifact.json     what we wrote, by which it is known when we export again
                        golden/           images and a client that checks the server by them
                        1/model.plan      an engine of full TensorRT, or
                        1/model.onnx      a model of ONNX Runtime

Other versions of a model, and whatever else lies in its folder, stay. A folder that we did not make
is refused, and a file of ours that was edited is set aside (`pipeline.core.replacing`).

Triton has a backend for full TensorRT and one for ONNX Runtime, and none for TensorRT-RTX. It runs
the network alone: clients send preprocessed images, so the preprocessing is written down in the
model's parameters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, InputError, PipelineError
from pipeline.core.files import file_hash
from pipeline.core.network import Network
from pipeline.core.replacing import (
    Whose,
    cannot_write,
    foreign_paths,
    put,
    refuse_foreign,
    set_aside,
    workspace,
)
from pipeline.core.words import in_short
from pipeline.exports.golden import FOLDER as GOLDEN
from pipeline.exports.golden import Served, add_to
from pipeline.steps.artifact import MANIFEST, Artifact, FileRecord, write_manifest

_ENGINE, _GRAPH = "model.engine", "model.onnx"
_KIND = "triton"
_VERSION, _LABELS, _CONFIG = "1", "labels.txt", "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Model:
    """What Triton needs to know of a model file.

    Attributes:
        source: Name of the file in the artifact.
        file: Its name in the repository.
        backend: Triton's name of what runs it.
        source_name: Name of the input.
        result_name: Name of the output.
        batch: Largest batch of a dynamic one; 0 for a fixed batch.
        shape: Shape of the input, without the batch where it is dynamic.
        preferred: Batch sizes that the server should wait for.
        gpu: It runs on a GPU.
    """

    source: str
    file: str
    backend: str
    source_name: str
    result_name: str
    batch: int
    shape: tuple[int, ...]
    preferred: tuple[int, ...]
    gpu: bool

    @property
    def request(self) -> int:
        """Images of the smallest request."""
        return 1 if self.batch else self.shape[0]


def export(
    artifact: Artifact,
    network: Network,
    repository: Path,
    *,
    name: str | None = None,
    max_batch: int = 64,
    instances: int = 1,
    queue_delay_us: int = 500,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write a model into a Triton model repository.

    Args:
        artifact: A build of the target `ort`, or of `trt` by full TensorRT.
        network: Labels and preprocessing.
        repository: The repository's folder; other models in it stay.
        name: The model's name for clients; default: the network's.
        max_batch: Largest batch of an ONNX model with a dynamic one; an engine has its own.
        instances: Copies of the model that run at the same time.
        queue_delay_us: Microseconds that a request may wait for others to share its batch.
        say: Is told if something was set aside.

    Returns:
        The model's folder.

    Raises:
        InputError: Triton cannot run this artifact, or the name does not do for a folder.
        ArtifactError: The artifact is damaged, the model's folder is somebody else's, or the
            repository cannot be written.
    """
    chosen = name or network.name
    if not _NAME.fullmatch(chosen):
        raise InputError(
            f"{chosen!r} does not do as a model's name; use letters, digits, dot, - and _"
        )
    artifact.verify()
    model = _describe(artifact, max_batch)
    config = _config(chosen, model, network, instances, queue_delay_us)
    folder = repository / chosen
    try:
        there = _written_before(folder)
        with workspace(folder) as new:
            (new / _VERSION).mkdir(parents=True)
            artifact.copy(model.source, new / _VERSION / model.file)
            (new / _LABELS).write_text("\n".join(network.labels) + "\n", encoding="utf-8")
            (new / _CONFIG).write_text(config, encoding="utf-8")
            origin = {"kind": _KIND, "name": f"{_KIND}/{chosen}", "key": artifact.digest}
            made_from = {artifact.name: artifact.digest}
            seals = {artifact.name: artifact.seal}
            stated = {"made_from": made_from, "seals": seals, "tools": {}, "facts": {}}
            served = Served(chosen, model.source_name, model.result_name, model.request)
            add_to(artifact, new, say, served)
            write_manifest(new, {**origin, **stated})
            if there is None:
                put(new, folder, Whose.FREE)
            else:
                _update(new, folder, there, say)
    except OSError as error:
        raise ArtifactError(cannot_write(folder, error)) from error
    return folder


def _written_before(folder: Path) -> Mapping[str, FileRecord] | None:
    """The files that an earlier export wrote into a model's folder; None if there is no folder.

    Raises:
        ArtifactError: The folder is somebody else's.
    """
    if not os.path.lexists(folder) or (_is_plain_folder(folder) and not any(folder.iterdir())):
        return None
    if _is_plain_folder(folder) and os.path.lexists(folder / MANIFEST):
        with contextlib.suppress(ArtifactError):  # another program's file of that name
            manifest = Artifact.read(folder)
            if manifest.kind == _KIND:
                return manifest.files
    refuse_foreign(folder, Whose.FOREIGN, "holds no model that was exported by it")
    return None


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _update(
    new: Path, folder: Path, there: Mapping[str, FileRecord], say: Callable[[str], object]
) -> None:
    """Move each part of a model into its folder, whole; the configuration refers to the others."""
    for part in (_VERSION, _LABELS, GOLDEN, _CONFIG, MANIFEST):
        made, place = new / part, folder / part
        if not made.exists():  # a kit that was there is of another model
            _take_away(folder, part, there, say)
            continue
        if _same(made, place):
            continue
        if part == MANIFEST or _as_written(folder, part, there):
            whose = Whose.OURS
        elif os.path.lexists(place):
            say(f"{place} was changed since: set aside as {set_aside(place).name}")
            whose = Whose.FREE
        else:
            whose = Whose.FREE
        with workspace(place) as moved:
            made.rename(moved)
            put(moved, place, whose)


def _take_away(
    folder: Path, part: str, there: Mapping[str, FileRecord], say: Callable[[str], object]
) -> None:
    """Remove what an earlier export wrote and this one does not; what was changed is set aside."""
    place = folder / part
    if not os.path.lexists(place):
        return
    if _as_written(folder, part, there):
        shutil.rmtree(place)
    else:
        say(f"{place} was changed since: set aside as {set_aside(place).name}")


def _same(made: Path, place: Path) -> bool:
    """Whether a part is there already, such as after an export that was killed."""
    if made.is_dir():
        names = {path.name: None for path in made.iterdir()}
        if not _is_plain_folder(place) or foreign_paths(place, names):
            return False
        return all(_same(made / name, place / name) for name in names)
    if place.is_symlink() or not place.is_file():
        return False
    return file_hash(made) == file_hash(place)


def _as_written(folder: Path, part: str, files: Mapping[str, FileRecord]) -> bool:
    """Whether a part of a model's folder holds what was written there, and nothing else."""
    place = folder / part
    if part in files:
        is_file = place.is_file() and not place.is_symlink()
        return is_file and file_hash(place) == files[part].sha256
    inside = {
        name.removeprefix(f"{part}/"): r for name, r in files.items() if name.startswith(f"{part}/")
    }
    if not inside or not _is_plain_folder(place) or foreign_paths(place, inside):
        return False
    return all(
        (place / name).is_file() and file_hash(place / name) == record.sha256
        for name, record in inside.items()
    )


def _describe(artifact: Artifact, max_batch: int) -> _Model:
    """What Triton needs to know of an artifact.

    Raises:
        InputError: Triton cannot run it.
        ArtifactError: Its model or its facts are none.
    """
    try:
        return _model(artifact, max_batch)
    except PipelineError:
        raise
    except Exception as error:  # protobuf raises kinds of its own
        raise ArtifactError(f"{artifact.name} is no model: {in_short(error)}") from error


def _model(artifact: Artifact, max_batch: int) -> _Model:
    if _ENGINE in artifact.files:
        return _engine(artifact)
    if _GRAPH in artifact.files:
        return _graph(artifact.path(_GRAPH), max_batch)
    raise InputError(
        f"Triton cannot run {artifact.name}: it holds neither {_ENGINE} nor {_GRAPH}; export a "
        "build of the target ort"
    )


def _engine(artifact: Artifact) -> _Model:
    try:
        return _described_engine(artifact, artifact.facts)
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.folder} does not state input, output and batches of its engine "
            f"({in_short(error)}): build it again"
        ) from error


def _described_engine(artifact: Artifact, facts: Mapping[str, Any]) -> _Model:
    if facts.get("library") != "tensorrt":
        raise InputError(
            f"Triton has no backend for TensorRT-RTX, which built {artifact.name}; build it with "
            "the option library: tensorrt on a GPU, or export the target ort"
        )
    batches = facts["batches"]
    shape = tuple(int(extent) for extent in facts["input"]["shape"])
    if len(shape) != 4:
        raise ValueError(f"an input of shape {shape}")
    dynamic = batches["min"] < batches["max"]
    return _Model(
        source=_ENGINE,
        file="model.plan",
        backend="tensorrt",
        source_name=str(facts["input"]["name"]),
        result_name=str(facts["output"]["name"]),
        batch=int(batches["max"]) if dynamic else 0,
        shape=shape[1:] if dynamic else (int(batches["max"]), *shape[1:]),
        preferred=(int(batches["opt"]), int(batches["max"])) if dynamic else (),
        gpu=True,
    )


def _graph(path: Path, max_batch: int) -> _Model:
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        source, result = graph.input[0], graph.output[0]
        shape = tuple(d.dim_value or -1 for d in source.type.tensor_type.shape.dim)
        dynamic = shape[0] < 0
    except OSError:
        raise
    except Exception as error:  # protobuf raises kinds of its own, an empty graph has no input
        raise ArtifactError(
            f"{path} is no model with an input and an output ({in_short(error)}): build it again"
        ) from error
    return _Model(
        source=_GRAPH,
        file=_GRAPH,
        backend="onnxruntime",
        source_name=source.name,
        result_name=result.name,
        batch=max_batch if dynamic else 0,
        shape=shape[1:] if dynamic else shape,
        preferred=(max_batch,) if dynamic else (),
        gpu=False,
    )


def _config(name: str, model: _Model, network: Network, instances: int, queue_delay_us: int) -> str:
    """The configuration in protobuf's text format."""
    classes = len(network.labels)
    result = (classes,) if model.batch else (model.shape[0], classes)
    parts = [
        f"name: {_text(name)}",
        f"backend: {_text(model.backend)}",
        f"default_model_filename: {_text(model.file)}",
        f"max_batch_size: {model.batch}",
        _block("input", f"name: {_text(model.source_name)}", "data_type: TYPE_FP32", _dims(model)),
        _block(
            "output",
            f"name: {_text(model.result_name)}",
            "data_type: TYPE_FP32",
            f"dims: {list(result)}",
            'label_filename: "labels.txt"',
        ),
        _block("instance_group", f"count: {instances}", f"kind: KIND_{_kind(model)}"),
        *_batching(model, queue_delay_us),
        *(_warmup(model, batch) for batch in sorted({min(1, model.batch), model.batch})),
        _parameter("preprocess", dict(network.preprocess)),
        *(_parameter(key, told) for key, told in network.licence.items()),
    ]
    return "\n".join(parts) + "\n"


def _batching(model: _Model, queue_delay_us: int) -> list[str]:
    if not model.batch:
        return []
    preferred = f"preferred_batch_size: {sorted(set(model.preferred))}"
    return [
        _block("dynamic_batching", preferred, f"max_queue_delay_microseconds: {queue_delay_us}")
    ]


def _warmup(model: _Model, batch: int) -> str:
    """A request before the first client's: kernels are compiled and memory is allocated then."""
    value = f"{{ data_type: TYPE_FP32 {_dims(model)} random_data: true }}"
    return _block(
        "model_warmup",
        f'name: "batch {batch or model.shape[0]}"',
        f"batch_size: {batch}",
        f"inputs {{ key: {_text(model.source_name)} value {value} }}",
    )


def _parameter(key: str, value: Any) -> str:
    words = _text(json.dumps(value, default=list))
    return _block("parameters", f"key: {_text(key)}", f"value {{ string_value: {words} }}")


def _kind(model: _Model) -> str:
    return "GPU" if model.gpu else "CPU"


def _dims(model: _Model) -> str:
    return f"dims: {list(model.shape)}"


def _block(name: str, *lines: str) -> str:
    inner: Sequence[str] = [f"  {line}" for line in lines]
    return "\n".join([f"{name} {{", *inner, "}"])


def _text(value: str) -> str:
    """A string literal of protobuf's text format: bytes beyond ASCII as octal escapes."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in value.encode()
    )
    return f'"{escaped}"'
