"""How close the tensors of a run came to the limits of their types."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.emulate import rounding

Values = npt.NDArray[np.floating[Any]]
Bits = npt.NDArray[np.int16]


@dataclass(slots=True, kw_only=True)
class TensorRange:
    """What was seen of one tensor, over every batch since recording began.

    Counts are of values, not of images.

    Attributes:
        tensor: Name of the tensor.
        node: Name of the node that produced it.
        op_type: That node's operator.
        module: Dotted path of the module that the node comes from; "" if unknown.
        block: The block of the network around that module; "" if unknown.
        dtype: The tensor's type.
        limit: Largest finite magnitude of the type: 65504 for float16, 448 for float8_e4m3fn.
        largest: Largest finite magnitude before rounding to the type.
        values: Values seen.
        overflowed: Finite before rounding, infinite after.
        saturated: Beyond the range of an 8-bit or narrower type, and set to its limit.
        infinite: Infinite after rounding, for whatever reason.
        nan: Not a number.
        flushed: Not zero before rounding, zero after.
        subnormal: Kept, but below the smallest normal number: hardware may flush these to zero.
    """

    tensor: str
    node: str
    op_type: str
    module: str
    block: str
    dtype: str
    limit: float
    largest: float = 0.0
    values: int = 0
    overflowed: int = 0
    saturated: int = 0
    infinite: int = 0
    nan: int = 0
    flushed: int = 0
    subnormal: int = 0

    @property
    def headroom(self) -> float:
        """How often the largest value fits into the range of the type.

        Below 1 the tensor overflowed; 0 means that it holds infinities or NaN that came from
        elsewhere: a division by zero, an operand, or a running sum in a narrow accumulator.
        """
        if not self.finite and self.largest <= self.limit:
            return 0.0
        return self.limit / self.largest if self.largest else math.inf

    @property
    def finite(self) -> bool:
        """No value was infinite or not a number."""
        return not (self.infinite or self.nan)

    def observe(
        self,
        exact: Tensor,
        rounded: Tensor,
        dtype: torch.dtype,
        extremes: tuple[float, float] | None = None,
    ) -> None:
        """Take one batch into account.

        Args:
            exact: Values as computed, any shape.
            rounded: The same as `rounding.narrow` made them; not read where the type is an integer.
            dtype: The tensor's type.
            extremes: Of `exact`, where they are known.
        """
        if dtype in _BITS:
            self.observe_bits(exact, rounded.view(torch.int16).numpy(), dtype)
            return
        if not exact.numel():
            return
        self.values += exact.numel()
        low, high = extremes or extremes_of(exact)
        self._note_largest(exact.numpy(), low, high)
        if not dtype.is_floating_point or dtype in rounding.FLOAT8:
            self._count_saturated(exact, dtype, low, high)
        if dtype.is_floating_point and not self._holds(low, high):
            self._count_special(exact.numpy(), rounded.float().numpy())
        if dtype in rounding.FLOAT8:
            self._count_small_in_float8(exact, rounded, dtype)

    def observe_bits(
        self, exact: Tensor, bits: Bits, dtype: torch.dtype, spend: bool = False
    ) -> None:
        """Take one batch of a tensor of 16-bit floating-point values into account.

        All of it is numpy, which leaves torch's threads alone: another thread may do it.

        Args:
            exact: Values as computed, any shape.
            bits: The same after rounding, as the type stores them.
            dtype: float16 or bfloat16.
            spend: Nobody else reads the bits: their memory may be written to.
        """
        if not bits.size:
            return
        self.values += bits.size
        kind = _BITS[dtype]
        magnitudes = np.bitwise_and(bits, 0x7FFF, out=bits if spend else None)
        if not kind.above(int(np.maximum.reduce(magnitudes, axis=None))) <= self.largest:
            # Else no value was as large as the largest: bits are read in less time than values.
            values = exact.numpy()
            low, high = values.min().item(), values.max().item()
            self._note_largest(values, low, high)
            if not self._holds(low, high):
                rounded = torch.from_numpy(bits).view(dtype).float().numpy()
                self._count_special(values, rounded)
        self._count_small(exact, magnitudes, kind.normal)

    def emptied(self) -> TensorRange:
        """The same tensor before any value was counted; the largest stays known."""
        empty = replace(self)
        for name in _COUNTS:
            setattr(empty, name, 0)
        return empty

    def merge(self, other: TensorRange) -> None:
        """Take other images of the same tensor into account."""
        self.largest = max(self.largest, other.largest)
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _count_saturated(self, exact: Tensor, dtype: torch.dtype, low: float, high: float) -> None:
        smallest, largest = rounding.bounds(dtype)
        if not (smallest <= low and high <= largest):
            values = exact.numpy()  # numpy compares and counts ten times as fast as torch
            if not smallest <= low:
                self.saturated += int(np.count_nonzero(values < smallest))
            if not high <= largest:
                self.saturated += int(np.count_nonzero(values > largest))

    def _note_largest(self, exact: Values, low: float, high: float) -> None:
        if math.isfinite(low) and math.isfinite(high):
            self.largest = max(self.largest, -low, high)
        else:
            finite = np.nan_to_num(np.abs(exact), nan=0.0, posinf=0.0)
            self.largest = max(self.largest, finite.max().item())

    def _holds(self, low: float, high: float) -> bool:
        return -self.limit <= low and high <= self.limit

    def _count_special(self, exact: Values, rounded: Values) -> None:
        infinite = np.isinf(rounded)
        self.infinite += int(np.count_nonzero(infinite))
        self.overflowed += int(np.count_nonzero(infinite & np.isfinite(exact)))
        self.nan += int(np.count_nonzero(np.isnan(rounded)))

    def _count_small(self, exact: Tensor, magnitudes: Bits, normal: int) -> None:
        large = int(np.count_nonzero(magnitudes >= normal))
        if large < magnitudes.size:
            kept = int(np.count_nonzero(magnitudes))
            if kept < magnitudes.size:
                self.flushed += _not_zero(exact.numpy(), magnitudes, magnitudes.size - kept)
            self.subnormal += kept - large

    def _count_small_in_float8(self, exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> None:
        rounded = rounded.to(torch.float32)  # torch computes nothing on 8-bit floats
        kept = int(torch.count_nonzero(rounded))
        self.flushed += int(np.count_nonzero(exact.numpy() != 0)) - kept
        self.subnormal += _subnormal(rounded, kept, rounding.smallest_normal(dtype))


_COUNTS = ("values", "overflowed", "saturated", "infinite", "nan", "flushed", "subnormal")


def extremes_of(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; both are NaN if any value is. Zeros for no value."""
    if not values.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(values)
    return low.item(), high.item()


_FEW = 1 / 16
"""Where a smaller share of the values is zero, these are looked up, and the others not read."""


@dataclass(frozen=True)
class _Kind:
    """A floating-point type of 16 bits. Without the sign, bits grow with what they stand for.

    Attributes:
        normal: The smallest normal number.
        infinity: Infinity; what is above is NaN.
        left: Bits that float32 has to the right of these; None for float16.
    """

    normal: int
    infinity: int
    left: int | None

    def above(self, bits: int) -> float:
        """What the next larger bits without a sign stand for; infinity for NaN."""
        return self._values[min(bits, self.infinity - 1) + 1]

    @cached_property
    def _values(self) -> list[float]:
        """What all bits without a sign stand for, up to infinity."""
        every = np.arange(self.infinity + 1, dtype=np.uint32)
        if self.left is None:
            values: list[float] = every.astype(np.uint16).view(np.float16).tolist()
        else:
            values = (every << np.uint32(self.left)).view(np.float32).tolist()
        return values


_BITS = {
    torch.float16: _Kind(0x0400, 0x7C00, None),
    torch.bfloat16: _Kind(0x0080, 0x7F80, 16),
}


def _not_zero(exact: Values, magnitudes: Bits, zeros: int) -> int:
    """How many values that are zero in 16 bits were not before.

    Args:
        exact: The values as computed.
        magnitudes: Their bits in 16 bits, without the sign.
        zeros: How many are zero there.
    """
    if zeros < exact.size * _FEW and exact.flags.c_contiguous and magnitudes.flags.c_contiguous:
        places = np.flatnonzero(magnitudes.reshape(-1) == 0)
        return int(np.count_nonzero(exact.reshape(-1)[places]))
    return int(np.count_nonzero(exact != 0)) - (exact.size - zeros)


def _subnormal(rounded: Tensor, kept: int, smallest_normal: float) -> int:
    """How many of float32 values lie below a narrower type's normal numbers, zeros left out."""
    small = int(torch.count_nonzero(rounded.abs() < smallest_normal))
    return small - (rounded.numel() - kept)


def first_failure(report: Iterable[TensorRange]) -> TensorRange | None:
    """Where infinities and NaN begin: the first tensor, in execution order, that has any.

    Args:
        report: Ranges in execution order, as an executor reports them.

    Returns:
        That tensor's range, or None where every value was finite.
    """
    return next((entry for entry in report if not entry.finite), None)


def tightest(report: Iterable[TensorRange]) -> dict[str, TensorRange]:
    """The tensor of least headroom of each block, blocks in execution order.

    Args:
        report: Ranges in execution order.

    Returns:
        Block name to range. Tensors of quantized types are left out: they saturate by design.
    """
    worst: dict[str, TensorRange] = {}
    for entry in report:
        if entry.dtype.startswith(("int", "uint", "float8")):
            continue
        rival = worst.get(entry.block)
        if rival is None or _urgency(entry) < _urgency(rival):
            worst[entry.block] = entry
    return worst


def _urgency(entry: TensorRange) -> tuple[bool, float]:
    return entry.finite, entry.headroom
