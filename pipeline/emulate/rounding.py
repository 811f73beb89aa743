"""Number formats: what a value becomes when it is stored in one.

Executors compute in float32 on values that are already representable in their tensor's type. So a
tensor of a narrow floating-point type is *stored* as float32 that holds rounded values: the next
operation needs no conversion, and torch's float32 kernels are the fast ones on a CPU (measured on a
1x1 convolution, GELU and a depthwise convolution, one thread: half storage with conversions at each
use takes 1.3 to 1.4 times as long, torch's half kernels 1.8 to 3 times).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)
"""Types that a conversion saturates by default: ONNX's rule for `Cast` and `QuantizeLinear`."""

_FRACTION_BITS = {
    torch.float8_e4m3fn: 3,
    torch.float8_e4m3fnuz: 3,
    torch.float8_e5m2: 2,
    torch.float8_e5m2fnuz: 2,
}
"""As the names say. `torch.finfo(float8_e5m2fnuz).eps` of PyTorch 2.13 is that of three bits."""

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # missing in torch's stubs
UINT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]

_FOUR_BITS = {INT4: (-8, 7), UINT4: (0, 15)}

# torch computes little or nothing on these; a wider type holds every value of theirs. The unsigned
# 64-bit integers above 2^63 are the exception, and no network that we run has them.
_STORED_WIDER = {
    INT4: torch.int8,
    UINT4: torch.uint8,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}


_SATURATED = frozenset({torch.int8, torch.uint8, torch.int16, torch.uint16, INT4, UINT4})


def storage(dtype: torch.dtype) -> torch.dtype:
    """The torch type in which an executor holds tensors of type `dtype`."""
    if dtype.is_floating_point:
        return torch.float64 if dtype == torch.float64 else torch.float32
    return _STORED_WIDER.get(dtype, dtype)


def name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16, and so on."""
    return str(dtype).removeprefix("torch.")


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest finite value of a numeric type."""
    if dtype in _FOUR_BITS:
        return _FOUR_BITS[dtype]
    if dtype == torch.bool:
        return 0, 1
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.min, info.max


def smallest_normal(dtype: torch.dtype) -> float:
    """The smallest positive normal number; hardware may flush anything smaller to zero."""
    return torch.finfo(dtype).smallest_normal


def narrow(exact: Tensor, dtype: torch.dtype, *, saturate: bool = True) -> Tensor:
    """Convert computed values to `dtype`, rounding half to even.

    Values beyond the range of a 16-bit floating-point type become infinite, as in hardware. Those
    beyond the range of an 8-bit float stop at its limits, and so do floating-point values that
    become integers of 16 bits or fewer, of which NaN becomes 0. Integers keep their lowest bits, as
    integer units do.

    Args:
        exact: The computed values, any shape.
        dtype: The type to round to.
        saturate: False makes values beyond the range of an 8-bit float NaN or infinite instead
            (ONNX's `saturate=0`).

    Returns:
        The values as a tensor of type `dtype`; integers of 4 bits and the unsigned integers that
        torch lacks in their `storage` type.
    """
    if dtype in FLOAT8:
        return _narrow_float8(exact, dtype, saturate)
    if dtype.is_floating_point:
        return exact.to(dtype)
    if exact.is_floating_point() and dtype in _SATURATED:
        return saturated(exact.round(), dtype)
    if dtype in _STORED_WIDER and not exact.is_floating_point():
        return wrap(exact, dtype).to(storage(dtype))
    return exact.to(storage(dtype))


def saturated(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers as integers of 16 bits or fewer that stop at their limits; NaN becomes 0.

    Args:
        whole: Floating-point values; their memory is written to.
        dtype: The type of the integers.
    """
    low, high = bounds(dtype)
    return whole.clamp_(low, high).nan_to_num_(0.0).to(storage(dtype))


def wrap(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep the lowest bits of integers: what is left of them in an integer type.

    Args:
        integers: Of any integer type that holds them.
        dtype: An integer type.

    Returns:
        Integers within the range of `dtype`; those of 64 bits as they are.
    """
    low, high = (int(limit) for limit in bounds(dtype))
    if high >= 2**63 - 1 or dtype == torch.bool:
        return integers
    return (integers.long() - low) % (high - low + 1) + low


def round_to(exact: Tensor, dtype: torch.dtype, *, saturate: bool = True) -> Tensor:
    """What an executor stores for computed values of a tensor of type `dtype`; see `narrow`."""
    return narrow(exact, dtype, saturate=saturate).to(storage(dtype))


def to_tf32(x: Tensor) -> Tensor:
    """Round float32 values to TF32: its exponent, ten bits of significand, half to even."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def _narrow_float8(exact: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Explicit about what lies beyond the range: there torch versions differ."""
    low, high = bounds(dtype)
    rounded = exact.clamp(low, high).to(dtype)
    if saturate:
        return rounded
    # Up to half a step above the limit rounds down to it. A tie goes to the even neighbour, which
    # is the limit itself in e4m3fn alone (its odd neighbour is the encoding of NaN).
    exponent = math.frexp(high)[1] - 1
    half_step = 2.0 ** (exponent - _FRACTION_BITS[dtype] - 1)
    size = exact.abs()
    beyond = size > high + half_step
    if dtype != torch.float8_e4m3fn:
        beyond |= size == high + half_step
    special = float("inf") if dtype == torch.float8_e5m2 else float("nan")
    signed = torch.where(exact < 0, -special, special)
    return torch.where(beyond, signed, rounded.to(exact.dtype)).to(dtype)
