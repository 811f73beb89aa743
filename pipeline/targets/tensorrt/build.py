"""What is to be built, and what is known of the engine afterwards.

TensorRT-RTX needs no GPU for this and builds in a process of its own, see `process.py`. Full
TensorRT times kernels on the GPU at hand, so that its builds differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError, UnsupportedOperatorError
from pipeline.core.plain import read_json
from pipeline.targets.tensorrt import builder, facts
from pipeline.targets.tensorrt.api import cuda_major
from pipeline.targets.tensorrt.builder import ENGINE as ENGINE
from pipeline.targets.tensorrt.builder import LAYERS, RTX, Library
from pipeline.targets.tensorrt.device import Gpu


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
        part: It is a part of a network, with any number of inputs and outputs.
        shapes: Of a part, smallest, usual and largest shape of each input with an open axis.
    """

    graph: Path
    tf32: bool
    capabilities: tuple[str, ...]
    batches: tuple[int, int, int]
    workspace: int | None
    gpu: Gpu | None
    part: bool = False
    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def read(self) -> bytes:
        """The graph's content.

        Raises:
            BuildError: It cannot be read.
        """
        try:
            return self.graph.read_bytes()
        except OSError as error:
            raise BuildError(f"cannot read {self.graph}: {error.strerror or error}") from error

    def keywords(self) -> dict[str, Any]:
        """What `builder.build` is to know of it."""
        return {
            "graph": str(self.graph),
            "tf32": self.tf32,
            "capabilities": self.capabilities,
            "batches": self.batches,
            "workspace": self.workspace,
            "part": self.part,
            "shapes": self.shapes,
        }


def build_engine(
    library: Library, job: EngineJob, folder: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Write the engine and the list of its layers into `folder`.

    Returns:
        What `facts_of` knows of it.

    Raises:
        BuildError: The parser or the builder refuses the graph; the message carries the reason.
    """
    content = job.read()
    try:
        told = builder.build(library, content, folder, log, **job.keywords())
    except builder.RefusedError as error:
        raise refusal(str(error), operator=error.operator) from error
    return facts_of(library.name, job, content, told, folder)


def refusal(message: str, *, operator: bool) -> BuildError:
    """The error about a graph that the library does not take."""
    return UnsupportedOperatorError(message) if operator else BuildError(message)


def facts_of(
    library: str, job: EngineJob, graph: bytes, told: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """What is known of an engine.

    Args:
        library: Name of the library.
        job: What was to be built.
        graph: Content of the graph.
        told: What `builder.build` told.
        folder: Where it wrote.

    Returns:
        Library, CUDA and compute capabilities, input and output, profile, layers, memory, hash of
        the graph, size and hash of the engine, warnings, the whole log.
    """
    engine = (folder / ENGINE).read_bytes()
    capabilities = list(job.capabilities)
    if library != RTX:
        capabilities = [job.gpu.capability] if job.gpu else []
    return {
        "library": library,
        "cuda_major": cuda_major(library),
        "compute_capabilities": capabilities,
        "tf32": job.tf32,
        "layers": facts.summary(read_json(folder / LAYERS, BuildError)),
        "weight_bytes": facts.weight_bytes(graph),
        "memory": facts.memory(told["log"]),
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "engine_bytes": len(engine),
        "engine_sha256": hashlib.sha256(engine).hexdigest(),
        **told,
    }
