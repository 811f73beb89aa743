"""Options of the Core ML target."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from pipeline.core.bounds import Count, LogitError
from pipeline.targets.base import TargetOptions

DeploymentTarget = Literal["iOS16", "iOS17", "iOS18"]
DEPLOYMENT_TARGETS: tuple[str, ...] = get_args(DeploymentTarget)
"""Oldest system on which a package runs; the macOS versions of the same year are 13, 14 and 15."""


class CoreMLOptions(TargetOptions):
    """Options of the Core ML target."""

    deployment_target: DeploymentTarget = Field(
        default="iOS16", description="Oldest system that runs the package (macOS 13, 14, 15)."
    )
    compute_units: Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_neural_engine"] = Field(
        default="all", description="What may run it, where it runs on a Mac."
    )
    float32_operations: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=("reduce_mean", "real_div", "matmul", "layer_norm", "softmax"),
        description="Precision mixed: what computes in float32, by type of MIL operation or by "
        "module of the network (stages.2.blocks.*.token_mixer).",
    )
    weight_threshold: int = Field(
        default=2048, gt=0, description="Weights with fewer numbers are not compressed."
    )
    calibration_images: Count = Field(
        default=128, description="Images for w8a8, auto and repair, of the calibration set."
    )
    max_top1_drop: float = Field(
        default=0.005, ge=0, le=1, description="Precision auto: most top-1 that may be lost."
    )
    max_size_mb: float | None = Field(
        default=None,
        gt=0,
        description="Precision auto: largest size of the package, in 10^6 bytes.",
    )
    repair: bool = Field(
        default=False,
        description="Where float16 breaks the network, compute the fewest modules in float32 with "
        "which all values and the answers hold; chosen on calibration images. For fp16.",
    )
    max_error: LogitError = Field(
        default=0.05,
        description="repair: largest error of the logits, relative to their norm.",
    )
    signing_team: str = Field(
        default="", description="Development team that signs the measuring app for an iPhone."
    )
    signing_profile: str | None = Field(
        default=None, description="UUID of a provisioning profile to sign it with instead."
    )
    signing_bundle: str | None = Field(
        default=None, description="Its bundle identifier: the one that the profile names."
    )

    measuring: ClassVar[frozenset[str]] = frozenset(
        {"signing_team", "signing_profile", "signing_bundle"}
    )
