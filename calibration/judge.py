"""How a graph does on calibration images: by the strict executor, or by what shall run it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from calibration.kept import Kept
from calibration.sample import CalibrationSet
from calibration.sensitivity import Outcome
from pipeline.core.errors import BuildError
from pipeline.core.figures import compare, top_k
from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Images, Logits
from pipeline.core.threads import threads_that_help

Graph = Path | onnx.ModelProto


def by_strict_executor(model: Graph, images: Images) -> Logits:
    """Logits with every result rounded to its type."""
    from pipeline.emulate.onnx.executor import OnnxExecutor  # needs torch, which takes its time

    with freed_memory_kept(), threads_that_help(images[0].size):
        return OnnxExecutor(model).run_all(images)


class Judge:
    """Compares graphs with the float32 graph on the same images.

    Args:
        source: The float32 graph.
        images: The calibration set.
        count: Most images to judge on: spread evenly over the set.
        run: Gives the logits of a graph.
        kept: Outcomes that an earlier search on the same images wrote down.

    Attributes:
        count: Images judged on.
        baseline: Outcome of the float32 graph.

    Raises:
        BuildError: There are no calibration images.
    """

    def __init__(
        self,
        source: Graph,
        images: CalibrationSet,
        count: int,
        run: Callable[[Graph, Images], Logits] = by_strict_executor,
        kept: Kept | None = None,
    ) -> None:
        self._kept = kept or Kept()
        total = len(images.images)
        if not total:
            raise BuildError("there are no calibration images: 8-bit forms need them")
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
        self.count = len(chosen)
        self._images, self._labels = images.images[chosen], images.labels[chosen]
        self._run = run
        self._reference = run(source, self._images)
        # Without a label, the float network's answer stands for the right one: what may be lost
        # is then a share of equal answers, which top-1 never loses more than.
        self._labels = np.where(self._labels < 0, self._reference.argmax(1), self._labels)
        correct = top_k(self._reference, self._labels)
        self.baseline = Outcome(correct / self.count, 1.0, 0.0)

    def __call__(self, model: onnx.ModelProto) -> Outcome:
        """Outcome of a graph."""
        content = model.SerializeToString(deterministic=True)
        key = hashlib.sha256(content).hexdigest()
        return self._kept.outcome(key, lambda: self.by(self._run, model))

    def by(self, run: Callable[[Graph, Images], Logits], model: onnx.ModelProto) -> Outcome:
        """Outcome of a graph that something else runs; it is not kept."""
        logits = run(model, self._images)
        comparison = compare(logits, self._reference)
        error = comparison.relative_error if comparison.finite else float("nan")
        return Outcome(top_k(logits, self._labels) / self.count, comparison.agreement, error)
