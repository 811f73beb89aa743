"""What a precision is: one form of the ONNX graph, made from the float32 graph.

Runtimes without precision flags (TensorRT 11, TensorRT-RTX) and with them alike take the precision
from the graph: its types and its quantize/dequantize pairs. Here are the forms that serve any
runtime; one that belongs to a single runtime lives in that target's package and is named in its
`Target.forms`. Targets name the form that each precision builds from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from calibration.sample import CalibrationSet
from pipeline.core.errors import BuildError
from pipeline.core.files import write_atomically
from pipeline.core.network import Network
from pipeline.steps.keys import versions


@dataclass(frozen=True)
class FormJob:
    """What a form needs to make its graph.

    Attributes:
        source: The float32 ONNX graph (simplified), one input and one output, float32 both.
        network: Labels, shape and preprocessing.
        options: Settings of the form, from the configuration.
        calibration: Reads the calibration set; costs time, so only forms that need it call it.
        log: Takes a line for the log file.
    """

    source: Path
    network: Network
    options: Mapping[str, Any]
    calibration: Callable[[], CalibrationSet]
    log: Callable[[str], None]


class Form(ABC):
    """One form of the graph.

    Attributes:
        name: Its name in folders, such as "float16".
        calibrated: The result depends on the calibration set.
        code: Modules of this project, beside the form's own, that decide the result.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    code: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide the result, without importing them."""

    @abstractmethod
    def convert(self, job: FormJob, destination: Path) -> dict[str, Any]:
        """Write the graph in this form to `destination` and return the facts about it.

        Inputs and outputs stay float32.

        Raises:
            BuildError: The graph has no such form.
        """


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
    code = ("pipeline.graphs.float16", "pipeline.graphs.metadata")

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
    code = ("pipeline.graphs.float16", "pipeline.graphs.metadata")

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
