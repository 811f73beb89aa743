"""bfloat16 throughout: float32's range with eight bits of precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.precisions.base import Form, FormJob
from pipeline.precisions.versions import onnx_version


class BFloat16(Form):
    """The whole graph in bfloat16, with float32 inputs and outputs.

    The graph is raised to opset 22, the first in which convolutions take this type.
    """

    name = "bfloat16"
    code = ("pipeline.precisions.half", "pipeline.metadata")

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return onnx_version()

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the bfloat16 graph; the facts list what was lost on the way. See `Form`."""
        from pipeline.precisions import half

        model, facts = half.to_half(half.read_graph(job.source), half.BFLOAT16)
        half.write_graph(model, destination)
        return facts.to_dict()
