"""Layers of a graph beside those of the float32 graph it was made from, for several targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError
from pipeline.core.preprocess import Pictures
from pipeline.emulate.layers import rows
from pipeline.graphs.compare import relative_difference

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-3
"""Largest difference between the reference's logits and PyTorch's, relative to the largest logit;
the export holds 1e-4."""


def graph_rows(
    built: Path, reference: Path, module: nn.Module, pictures: Pictures, *, tf32: bool = False
) -> list[dict[str, Any]]:
    """Errors by module of a graph, as `Target.diff` gives them.

    Args:
        built: The graph in its precision.
        reference: The float32 graph that it was made from.
        module: The float32 module that `reference` was exported from.
        pictures: A few images.
        tf32: The engine rounds factors to TF32.

    Raises:
        ArtifactError: A graph cannot be read or run, or is of another network.
        DataError: The images do not fit.
    """
    from pipeline.emulate.onnx.executor import OnnxExecutor
    from pipeline.emulate.onnx.layers import compare

    _check_same(OnnxExecutor(reference), reference, module, pictures)
    return rows(compare(built, reference, pictures.images, tf32=tf32))


def _check_same(executor: Any, reference: Path, module: nn.Module, pictures: Pictures) -> None:
    import torch

    logits = executor.run_all(pictures.images)
    with torch.inference_mode():
        expected = module(torch.from_numpy(pictures.images)).numpy()
    if logits.shape == expected.shape and relative_difference(logits, expected) <= TOLERANCE:
        return
    raise ArtifactError(
        f"{reference} is not the graph of the configured model: their logits differ; run the "
        "pipeline again"
    )
