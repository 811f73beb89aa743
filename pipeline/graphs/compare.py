"""Is one graph equal to another? Seeded noise, ONNX Runtime without optimization, one measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.core.network import Images


TOLERANCE = 1e-4
"""Largest difference between two graphs' logits, relative to the largest logit, in float32."""

DYNAMIC_IMAGES = 2
"""Images to try a graph with that takes any number: more than one, so that a mix-up of axes shows.
"""


def random_images(batch: int, shape: tuple[int, ...]) -> Images:
    """Images of seeded noise, (batch, *shape), to compare two forms of one network with."""
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def images_for(path: Path, shape: tuple[int, int, int]) -> Images:
    """Images of seeded noise, as many as a graph demands, or as many as show a mix-up of axes."""
    import onnx

    from calibration.observe import fixed_batch

    model = onnx.load(path, load_external_data=False)
    return random_images(fixed_batch(model) or DYNAMIC_IMAGES, shape)


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
