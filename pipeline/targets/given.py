"""An ONNX graph as the reference: as it was given, in float32, by ONNX Runtime on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.core.machine import resolve_threads
from pipeline.steps.facts.accuracy import FLOAT16_LIMIT, ModuleRange
from pipeline.targets.ort.runner import OrtRunner
from pipeline.targets.ort.session import Settings

if TYPE_CHECKING:
    import onnx

    from pipeline.core.network import Images
    from pipeline.emulate.ranges import TensorRange


def exact_runner(path: Path) -> OrtRunner:
    """Runs a graph as it says, operation by operation: what others are judged against.

    Raises:
        ArtifactError: ONNX Runtime does not accept the graph.
    """
    return OrtRunner(path, Settings(level="none"), resolve_threads(None))


def fast_runner(path: Path, threads: int | None) -> OrtRunner:
    """Runs a graph as fast as ONNX Runtime can without changing it: what others are timed against.

    Raises:
        ArtifactError: ONNX Runtime does not accept the graph.
        InputError: More threads are asked for than this process may use.
    """
    return OrtRunner(path, Settings(), resolve_threads(threads))


def range_of_graph(model: onnx.ModelProto, images: Images) -> ModuleRange | None:
    """The largest value that any operation gives for some images.

    Args:
        model: A float32 graph.
        images: Preprocessed images, (batch, channels, height, width).

    Returns:
        None where our executor does not know an operation of the graph.
    """
    from pipeline.emulate.onnx.executor import OnnxExecutor  # needs torch, which takes its time

    try:
        executor = OnnxExecutor(model, record=True)
        executor.run_all(images)
    except UnsupportedOperatorError:
        return None
    seen = [(entry.module or entry.node, _magnitude(entry)) for entry in executor.overflow_report()]
    if not seen:
        return None
    at, largest = max(seen, key=lambda entry: entry[1])
    first = next((name for name, value in seen if value > FLOAT16_LIMIT), "")
    return ModuleRange(largest, at, first, len(images))


def _magnitude(entry: TensorRange) -> float:
    return math.inf if entry.nan or entry.infinite else entry.largest
