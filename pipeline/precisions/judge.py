"""How a graph does on calibration images, by the strict executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from calibration.sensitivity import Outcome
from pipeline.measure import compare, top_k
from pipeline.precisions.base import CalibrationSet
from pipeline.reference.onnx_executor import OnnxExecutor
from pipeline.targets.base import Logits


class Judge:
    """Compares graphs with the float32 graph on the same images.

    Args:
        source: The float32 graph.
        images: The calibration set.
        count: Most images to judge on: spread evenly over the set.

    Attributes:
        count: Images judged on.
        baseline: Outcome of the float32 graph.
    """

    def __init__(self, source: Path, images: CalibrationSet, count: int) -> None:
        total = len(images.images)
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
        self.count = len(chosen)
        self._images, self._labels = images.images[chosen], images.labels[chosen]
        self._reference = self._run(source)
        correct = top_k(self._reference, self._labels)
        self.baseline = Outcome(correct / self.count, 1.0, 0.0)

    def __call__(self, model: onnx.ModelProto) -> Outcome:
        """Outcome of a graph."""
        logits = self._run(model)
        comparison = compare(logits, self._reference)
        error = comparison.relative_error if comparison.finite else float("nan")
        return Outcome(top_k(logits, self._labels) / self.count, comparison.agreement, error)

    def _run(self, model: Path | onnx.ModelProto) -> Logits:
        executor = OnnxExecutor(model)
        return executor.run_all(self._images)
