"""The strict executor's word on an engine that cannot run here.

It runs the very ONNX graph that the engine was built from and rounds every result to the type that
the graph gives it, so that an overflow shows. What it cannot know is which layers the engine fuses:
a fused layer rounds less often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtifactError
from pipeline.core.files import file_hash
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Numerics, Runner
from pipeline.core.threads import SMALL, batches_for
from pipeline.steps.artifact import Artifact

if TYPE_CHECKING:
    from pipeline.emulate.onnx.plan import Accumulate
    from pipeline.emulate.ranges import TensorRange


def check_graph(artifact: Artifact, graph: Path) -> None:
    """Refuse a graph that an engine was not built from.

    Raises:
        ArtifactError: It was built from another one.
    """
    if file_hash(graph) != artifact.facts.get("graph_sha256"):
        raise ArtifactError(
            f"{graph} is not the graph that {artifact.folder} was built from: build it again"
        )


class EmulatedRunner(Runner):
    """Runs an engine's graph on the strict executor.

    Args:
        artifact: The engine.
        graph: The graph that it was built from.
        accumulate: Where running sums of products are rounded, see `OnnxExecutor`; what values the
            tensors have is recorded for "float32" only.

    Raises:
        ArtifactError: The graph is another one.
    """

    device = "emulated: strict ONNX executor"

    def __init__(self, artifact: Artifact, graph: Path, accumulate: Accumulate = "float32") -> None:
        from pipeline.emulate.onnx.executor import OnnxExecutor

        check_graph(artifact, graph)
        self._artifact, self._graph = artifact, graph
        self._record = accumulate == "float32"
        if not self._record:
            self.device = f"{self.device}, sums of products in half precision"
        self._executor = OnnxExecutor(
            graph,
            record=self._record,
            accumulate=accumulate,
            tf32=bool(artifact.facts.get("tf32")),
        )
        sides = [side or SMALL for side in self._executor.input.shape[1:]]
        self.divides = batches_for(math.prod(sides))

    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images, (batch, channels, height, width); any batch size."""
        return self._executor.run_all(images)

    def narrow_sums(self) -> Runner | None:
        """See `Runner`. Sums in bfloat16 are none: tensor cores have no such accumulator."""
        import torch

        if not self._executor.holds(torch.float16):
            return None
        return EmulatedRunner(self._artifact, self._graph, accumulate="output")

    def numerics(self) -> Numerics | None:
        """Overflows, and the headroom by block; see `Runner`."""
        from pipeline.emulate.ranges import tightest

        if not self._record:
            return None

        report = self.overflow_report()
        overflowed = [entry for entry in report if not entry.finite]
        blocks = tightest(report)
        return Numerics(
            overflowed_values=sum(entry.overflowed for entry in report),
            overflowed_tensors=tuple(f"{e.block}: {e.op_type} {e.tensor}" for e in overflowed[:10]),
            more={
                "headroom": min((entry.headroom for entry in blocks.values()), default=0.0),
                "blocks": [
                    {
                        "block": block,
                        "tensor": entry.tensor,
                        "largest": entry.largest,
                        "headroom": entry.headroom,
                    }
                    for block, entry in blocks.items()
                ],
            },
        )

    def noted(self) -> Any:
        """See `Runner`."""
        return [asdict(entry) for entry in self.overflow_report()] if self._record else None

    def go_on(self, images: int, noted: Any) -> None:
        """See `Runner`."""
        from pipeline.emulate.ranges import TensorRange

        if self._record:
            self._executor.go_on([TensorRange(**entry) for entry in noted])

    def begin(self, images: int) -> None:
        """See `Runner`."""
        if self._record:
            self._executor.begin()

    def joined(self, noted: Sequence[Any]) -> Any:
        """See `Runner`."""
        from pipeline.emulate.ranges import TensorRange

        if not self._record:
            return None
        reports = [[TensorRange(**entry) for entry in part] for part in noted]
        return [asdict(entry) for entry in self._executor.joined(reports)]

    def overflow_report(self) -> list[TensorRange]:
        """Ranges of all tensors over the images so far, in execution order."""
        return self._executor.overflow_report()
