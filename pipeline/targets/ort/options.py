"""Options of the ONNX Runtime target."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import Seconds, Threads
from pipeline.targets.base import TargetOptions

ClassName = Literal["avx512-vnni", "avx512", "avx2-vnni", "avx2"]
"""Names of `pipeline.core.cpu_classes.CLASSES`."""


class OrtOptions(TargetOptions):
    """Options of the ONNX Runtime target."""

    provider: Literal["cpu", "openvino"] = Field(
        default="cpu", description="What executes: ONNX Runtime's own kernels, or OpenVINO's."
    )
    threads: Threads | None = Field(
        default=None, description="Default: as many as this process may use."
    )
    graph_optimization: Literal["none", "basic", "extended", "layout", "all"] = Field(
        default="all", description="How far ONNX Runtime optimizes the graph on opening."
    )
    allow_spinning: bool = Field(
        default=True,
        description="Threads wait actively for more work, for a moment: faster, but busy.",
    )
    huge_pages: bool = Field(
        default=True,
        description="What it works in is moved to pages of 2 MB, where Linux has them: faster.",
    )
    allow_fallback: bool = Field(
        default=False, description="Nodes that the provider cannot run may run elsewhere."
    )
    tune: bool = Field(
        default=True, description="Measure the ways to run the model and take the fastest."
    )
    tune_seconds: Seconds = Field(default=3.0, description="How long to measure them.")
    gelu: Literal["exact", "tanh"] = Field(
        default="exact",
        description="GELU of fp32: as trained, or by tanh: faster without AVX-512, not the same.",
    )
    repair: bool = Field(
        default=False,
        description="int8 holds the limits of calibration with the fewest blocks in float32, or is "
        "not built; the report says what was raised.",
    )
    cpu_classes: tuple[ClassName, ...] = Field(
        default=(),
        description="Classes of CPUs to judge and measure for beside the one that is here.",
    )

    measuring: ClassVar[frozenset[str]] = frozenset({"cpu_classes"})

    def classes(self) -> tuple[str, ...]:
        """See `TargetOptions.classes`."""
        return self.cpu_classes
