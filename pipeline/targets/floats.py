"""The forms of the graph that serve any runtime: one floating-point type throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.errors import BuildError
from pipeline.core.files import write_atomically
from pipeline.steps.keys import versions
from pipeline.targets.forms import Form, FormJob


class Float32(Form):
    """float32: the source graph, byte for byte."""

    name = "float32"

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return {}

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Copy the source. See `Form`."""
        try:
            content = job.source.read_bytes()
        except OSError as error:
            raise BuildError(
                f"cannot read the graph {job.source}: {error.strerror or error}; run the export "
                "stage again"
            ) from error
        write_atomically(destination, content)
        return {}


class Float16(Form):
    """float16 throughout, the tensor cores' own type; inputs and outputs stay float32.

    Nothing is held back in float32: the fused network's attention is free of the activations'
    scale, so that it stays in float16's range of 65504. Whether that is so for a given network the
    strict executor of `pipeline.emulate` tells.
    """

    name = "float16"

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return versions("onnx")

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the float16 graph; the facts list what was lost on the way. See `Form`."""
        from pipeline.graphs import float16

        model, facts = float16.to_half(float16.read_graph(job.source), float16.FLOAT16)
        for name in facts.small_constants:
            job.log(f"{name} is subnormal in float16: hardware may take it for zero")
        float16.write_graph(model, destination)
        return facts.to_dict()


class BFloat16(Form):
    """The whole graph in bfloat16, with float32 inputs and outputs.

    The graph is raised to opset 22, the first in which convolutions take this type.
    """

    name = "bfloat16"

    def versions(self) -> dict[str, str]:
        """What decides the result: see `Form`."""
        return versions("onnx")

    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the bfloat16 graph; the facts list what was lost on the way. See `Form`."""
        from pipeline.graphs import float16

        model, facts = float16.to_half(float16.read_graph(job.source), float16.BFLOAT16)
        float16.write_graph(model, destination)
        return facts.to_dict()


SHARED: tuple[Form, ...] = (Float32(), Float16(), BFloat16())
"""Forms that any target may build from."""
