"""Options of the Core AI target."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Count
from pipeline.targets.base import TargetOptions


class CoreAIOptions(TargetOptions):
    """Options of the Core AI target."""

    runtime_images: Count = Field(
        default=64,
        description="Validation images that Apple's runtime judges where it is too slow for all of "
        "them, as many of each class; the emulation of all has to agree with it on these.",
    )
    weight_threshold: int = Field(
        default=2048, gt=0, description="Weights with fewer numbers are not compressed."
    )
    compute_unit: Literal["default", "cpu_only", "gpu", "neural_engine"] = Field(
        default="default", description="What is preferred where it runs on a Mac."
    )
