"""Options of the TensorRT target."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from pipeline.core.bounds import Batch
from pipeline.targets.base import TargetOptions
from pipeline.targets.tensorrt import api
from pipeline.targets.tensorrt.limits import ComputeCapability

_Capability = Annotated[
    # YAML reads 8.6 as a number, and people write it so.
    ComputeCapability,
    BeforeValidator(lambda value: f"{value:.1f}" if isinstance(value, float) else value),
]


class TrtOptions(TargetOptions):
    """Options of the TensorRT target."""

    library: api.Choice = Field(
        default="auto",
        description="'rtx' builds for GPUs that need not be there, 'tensorrt' for the one that is; "
        "'auto' takes full TensorRT where it and a GPU are there.",
    )
    compute_capabilities: tuple[_Capability, ...] = Field(
        default=("8.6", "8.9", "12.0"),
        min_length=1,
        description="GPUs that one TensorRT-RTX engine holds: 7.5 (RTX 20), 8.0 (A100), 8.6 (RTX "
        "30), 8.9 (RTX 40), 12.0 (RTX 50).",
    )
    batches: tuple[Batch, Batch, Batch] = Field(
        default=(1, 8, 64),
        description="Smallest, usual and largest batch of a network with a dynamic one.",
    )
    workspace_mib: int | None = Field(
        default=None,
        gt=0,
        le=2**20,
        description="Most scratch memory; default: the library's own limit.",
    )

    repair: bool = Field(
        default=False,
        description="Where 16 bits break the network, compute the fewest parts in bfloat16 or "
        "float32 with which all values and the accuracy hold; chosen on calibration images. For "
        "fp16, bf16, int8 and fp8.",
    )

    @field_validator("compute_capabilities")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a compute capability is named twice")
        return tuple(sorted(value, key=float))

    @field_validator("batches")
    @classmethod
    def _ascending(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= value[0] <= value[1] <= value[2]:
            raise ValueError("batches are smallest, usual, largest: 1 <= smallest <= … <= largest")
        return value
