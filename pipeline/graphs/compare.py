"""Is one graph equal to another? Seeded noise, ONNX Runtime without optimization, one measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.core.network import Images


TOLERANCE = 1e-4
"""Largest difference between two graphs' logits, relative to the largest logit, in float32."""


def random_images(batch: int, shape: tuple[int, int, int]) -> Images:
    """Images of seeded noise, (batch, *shape), to compare two forms of one network with."""
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def relative_difference(logits: Images, expected: Images) -> float:
    """Largest difference, relative to the largest expected value; NaN if there is a NaN."""
    return float(np.abs(logits - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def run_graph(path: Path, images: Images) -> Images:
    """Logits of a float32 graph by ONNX Runtime, unoptimized: a reference, not a deployment."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: Images = session.run(None, {session.get_inputs()[0].name: images})[0]
    return output
