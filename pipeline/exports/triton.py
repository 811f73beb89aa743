"""A model repository for NVIDIA's Triton Inference Server, from a built artifact.

    <repository>/<name>/config.pbtxt      input, output, batching, instances, warm-up
                        labels.txt        a class a line, in the order of the logits
                        1/model.plan      an engine of full TensorRT, or
                        1/model.onnx      a model of ONNX Runtime

Triton has a backend for full TensorRT and one for ONNX Runtime, and none for TensorRT-RTX. It runs
the network alone: clients send preprocessed images, so the preprocessing is written down in the
model's parameters.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.files import TEMPORARY_PREFIX
from pipeline.core.network import Network
from pipeline.steps.artifact import Artifact

_ENGINE, _GRAPH = "model.engine", "model.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Model:
    """What Triton needs to know of a model file.

    Attributes:
        source: The file.
        file: Its name in the repository.
        backend: Triton's name of what runs it.
        source_name: Name of the input.
        result_name: Name of the output.
        batch: Largest batch of a dynamic one; 0 for a fixed batch.
        shape: Shape of the input, without the batch where it is dynamic.
        preferred: Batch sizes that the server should wait for.
        gpu: It runs on a GPU.
    """

    source: Path
    file: str
    backend: str
    source_name: str
    result_name: str
    batch: int
    shape: tuple[int, ...]
    preferred: tuple[int, ...]
    gpu: bool


def export(
    artifact: Artifact,
    network: Network,
    repository: Path,
    *,
    name: str | None = None,
    max_batch: int = 64,
    instances: int = 1,
    queue_delay_us: int = 500,
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

    Returns:
        The model's folder.

    Raises:
        InputError: Triton cannot run this artifact, or the name does not do for a folder.
        ArtifactError: The artifact is damaged, or the repository cannot be written.
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
        repository.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=repository, prefix=TEMPORARY_PREFIX))
        try:
            (temporary / "1").mkdir()
            shutil.copyfile(model.source, temporary / "1" / model.file)
            (temporary / "labels.txt").write_text("\n".join(network.labels) + "\n")
            (temporary / "config.pbtxt").write_text(config)
            temporary.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}; make the folder writable"
        ) from error
    return folder


def _describe(artifact: Artifact, max_batch: int) -> _Model:
    if _ENGINE in artifact.files:
        return _engine(artifact)
    if _GRAPH in artifact.files:
        return _graph(artifact.path(_GRAPH), max_batch)
    raise InputError(
        f"Triton cannot run {artifact.name}: it holds neither {_ENGINE} nor {_GRAPH}; export a "
        "build of the target ort"
    )


def _engine(artifact: Artifact) -> _Model:
    facts = artifact.facts
    if facts.get("library") != "tensorrt":
        raise InputError(
            f"Triton has no backend for TensorRT-RTX, which built {artifact.name}; build it with "
            "the option library: tensorrt on a GPU, or export the target ort"
        )
    batches = facts["batches"]
    shape = tuple(int(extent) for extent in facts["input"]["shape"])
    dynamic = shape[0] < 0
    return _Model(
        source=artifact.path(_ENGINE),
        file="model.plan",
        backend="tensorrt",
        source_name=str(facts["input"]["name"]),
        result_name=str(facts["output"]["name"]),
        batch=int(batches["max"]) if dynamic else 0,
        shape=shape[1:] if dynamic else shape,
        preferred=(int(batches["opt"]), int(batches["max"])) if dynamic else (),
        gpu=True,
    )


def _graph(path: Path, max_batch: int) -> _Model:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    source, result = graph.input[0], graph.output[0]
    shape = tuple(d.dim_value or -1 for d in source.type.tensor_type.shape.dim)
    dynamic = shape[0] < 0
    return _Model(
        source=path,
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
