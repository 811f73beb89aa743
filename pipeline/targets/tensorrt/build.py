"""From an ONNX graph to an engine.

TensorRT-RTX needs no GPU for this. With a dynamic batch it names and orders the values of its shape
computations by their addresses in memory: `process.py` holds these still, so that the same graph
gives the same bytes. Full TensorRT times kernels on the GPU at hand, so that its builds differ.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError
from pipeline.targets.tensorrt import facts
from pipeline.targets.tensorrt.api import Library, Messages, cuda_major
from pipeline.targets.tensorrt.device import Gpu

ENGINE = "model.engine"
LAYERS = "layers.json"


@dataclass(frozen=True)
class EngineJob:
    """What is to be built.

    Attributes:
        graph: The ONNX graph.
        tf32: Let float32 products round their factors to TF32.
        capabilities: Compute capabilities to compile for; only TensorRT-RTX can choose.
        batches: Smallest, usual and largest batch of a graph with a dynamic one.
        workspace: Upper limit of scratch memory in bytes, or None.
        gpu: The GPU of this machine, which full TensorRT builds for.
    """

    graph: Path
    tf32: bool
    capabilities: tuple[str, ...]
    batches: tuple[int, int, int]
    workspace: int | None
    gpu: Gpu | None


def build_engine(
    library: Library, job: EngineJob, folder: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Write the engine and the list of its layers into `folder`.

    Returns:
        Facts: library, CUDA and compute capabilities, input and output, profile, layers, memory,
        hash of the graph, size and hash of the engine, warnings, the whole log, seconds.

    Raises:
        BuildError: The parser or the builder refuses the graph; the message carries the reason.
    """
    start = time.perf_counter()
    try:
        content = job.graph.read_bytes()
    except OSError as error:
        raise BuildError(f"cannot read {job.graph}: {error.strerror or error}") from error
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        log(line)

    with library.listening(keep) as (logger, messages):
        builder = _builder(library, logger, messages)
        network = library.parse(builder, logger, job.graph, content)
        config = library.configure(builder, tf32=job.tf32, workspace=job.workspace)
        batches = _profile(library, builder, config, network, job)
        if library.rtx:
            library.aim(config, job.capabilities)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"{library.title} cannot build {job.graph.name}: {messages.reason}")
        engine = bytes(plan)
        layers = facts.layers_of(network)
        (folder / ENGINE).write_bytes(engine)
        text = json.dumps([layer.to_dict() for layer in layers], indent=0)
        (folder / LAYERS).write_text(text + "\n")
        return {
            **_origin(library, job),
            **_ports(network, batches),
            "network": facts.summary(layers),
            "weight_bytes": facts.weight_bytes(content),
            "memory": facts.memory(lines),
            "graph_sha256": hashlib.sha256(content).hexdigest(),
            "engine_bytes": len(engine),
            "engine_sha256": hashlib.sha256(engine).hexdigest(),
            "warnings": messages.warnings,
            "log": lines,
            "build_seconds": round(time.perf_counter() - start, 3),
        }


def _builder(library: Library, logger: Any, messages: Messages) -> Any:
    try:
        return library.module.Builder(logger)
    except TypeError as error:  # pybind11's word for a constructor that gave nothing
        raise BuildError(f"{library.title} does not start: {messages.reason}") from error


def _profile(
    library: Library, builder: Any, config: Any, network: Any, job: EngineJob
) -> tuple[int, int, int]:
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise BuildError(
            f"{job.graph} has {network.num_inputs} inputs and {network.num_outputs} outputs; a "
            "classifier has one of each"
        )
    batch, *others = tuple(network.get_input(0).shape)
    if any(extent < 0 for extent in others):
        raise BuildError(f"{job.graph}: only the batch of the input may be dynamic")
    if batch >= 0:
        return (batch, batch, batch)
    library.add_profile(builder, config, network, job.batches)
    return job.batches


def _origin(library: Library, job: EngineJob) -> dict[str, Any]:
    capabilities = list(job.capabilities)
    if not library.rtx:
        capabilities = [job.gpu.capability] if job.gpu else []
    return {
        "library": library.name,
        "library_version": library.version,
        "cuda_major": cuda_major(library.name),
        "compute_capabilities": capabilities,
        "tf32": job.tf32,
    }


def _ports(network: Any, batches: tuple[int, int, int]) -> dict[str, Any]:
    source, result = network.get_input(0), network.get_output(0)
    return {
        "input": {
            "name": source.name,
            "dtype": source.dtype.name,
            "shape": list(source.shape),
        },
        "output": {
            "name": result.name,
            "dtype": result.dtype.name,
            "shape": list(result.shape),
        },
        "batches": {"min": batches[0], "opt": batches[1], "max": batches[2]},
    }
