"""float16 throughout: half the memory, and the tensor cores' own type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.precisions.base import Form, FormJob
from pipeline.precisions.versions import onnx_version


class Float16(Form):
    """The whole graph in float16, with float32 inputs and outputs.

    Nothing is held back in float32: the fused network's attention is free of the activations'
    scale, so that it stays in float16's range of 65504. Whether that is so for a given network the
    strict executor of `pipeline.reference` tells.
    """

    name = "float16"
    code = ("pipeline.precisions.half", "pipeline.metadata")

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return onnx_version()

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the float16 graph; the facts list what was lost on the way. See `Form`."""
        from pipeline.precisions import half

        model, facts = half.to_half(half.read_graph(job.source), half.FLOAT16)
        for name in facts.small_constants:
            job.log(f"{name} is subnormal in float16: hardware may take it for zero")
        half.write_graph(model, destination)
        return facts.to_dict()
