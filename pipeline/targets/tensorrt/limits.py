"""Which precisions exist on which compute capabilities, and why the others do not.

Established with TensorRT-RTX 1.7, which builds for GPUs that are not there and so refuses in clear
words; `benchmarks/trt_build_matrix.py` shows every combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pipeline.core.errors import ConfigError

ComputeCapability = Literal["7.5", "8.0", "8.6", "8.9", "12.0"]
"""Turing, A100, the 30, 40 and 50 series: what TensorRT-RTX compiles for."""

FORMS: Mapping[str, str] = {
    "fp32": "float32",
    "tf32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8-trt",
    "fp8": "fp8-trt",
}
"""Precision -> form of the ONNX graph. Only fp32 and tf32 share one: a builder flag parts them."""

REPAIRED: Mapping[str, bool] = {"fp16": True, "int8": True, "bf16": False, "fp8": False}
"""Precisions that have repaired forms, and whether also one without bfloat16: the GPUs that compute
in bf16 or fp8 have it."""

_LOWEST: Mapping[str, tuple[float, str]] = {
    "tf32": (8.0, "its tensor cores have no TF32"),
    "bf16": (8.0, "it has no bfloat16"),
    "fp8": (8.9, "float8 tensor cores came with compute capability 8.9"),
}

_LOWEST_RTX: Mapping[str, tuple[float, str]] = {
    **_LOWEST,
    "fp32": (8.0, "TensorRT-RTX has no float32 matrix products for it"),
}


def why_not(precision: str, capability: str, *, rtx: bool = True) -> str | None:
    """Why a GPU does not have a precision; None if it has.

    Args:
        precision: The precision.
        capability: The GPU's compute capability.
        rtx: TensorRT-RTX builds; full TensorRT has fewer limits.
    """
    lowest, reason = (_LOWEST_RTX if rtx else _LOWEST).get(precision, (0.0, ""))
    return reason if float(capability) < lowest else None


def check_capabilities(precision: str, capabilities: Sequence[str], *, rtx: bool = True) -> None:
    """Refuse a precision that one of the GPUs does not have.

    Args:
        precision: The precision.
        capabilities: The GPUs' compute capabilities.
        rtx: TensorRT-RTX builds; full TensorRT has fewer limits.

    Raises:
        ConfigError: The message names the compute capabilities and says what works instead.
    """
    reasons = {c: why_not(precision, c, rtx=rtx) for c in capabilities}
    refused = [c for c, reason in reasons.items() if reason]
    if refused:
        raise ConfigError(
            f"trt: {precision} cannot be built for compute capability {', '.join(refused)}: "
            f"{reasons[refused[0]]}; build fp16 or int8 for it, or take it out of "
            "compute_capabilities"
        )


def capabilities_with(precision: str) -> tuple[str, ...]:
    """The compute capabilities of GeForce GPUs that have a precision, as TensorRT-RTX builds it."""
    known: tuple[str, ...] = get_args(ComputeCapability)
    return tuple(c for c in known if c != "8.0" and why_not(precision, c) is None)
