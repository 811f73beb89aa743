"""How far a network's layers are from a reference, one by one, and the first that is at fault.

first = jump(errors)            # the first layer where the error jumps, or None
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FLOOR = 1e-3
"""A relative error that mere rounding in half precision brings."""

FLOOR_OF_8_BITS = 4e-2
"""And in 8 bits: the layers of care_tiny, whose int8 forms lose no accuracy, err by 0.4 to 11 %."""

JUMP = 4.0
"""Times what is usual: a jump."""

LARGEST_USUAL = 0.25
"""An error of its own beyond which a layer is at fault, however usual that is in its graph."""


@dataclass(frozen=True)
class LayerError:
    """How far one tensor is from the reference's.

    Attributes:
        module: Dotted name of the torch module that computes it; "" for the network itself.
        tensor: Its name in what was built.
        operation: The operation that makes it.
        line: That operation's line in the program, or its place in the graph.
        relative: Euclidean norm of the difference over that of the reference's values; NaN where
            values are not finite or shapes differ.
        largest: Largest absolute difference.
        own: `relative` where the layer reads the reference's values: what it errs itself. None
            where it cannot be run so.
        dtype: The narrowest type that its values pass through, such as "int8"; "" if unknown.
    """

    module: str
    tensor: str
    operation: str
    line: int
    relative: float
    largest: float
    own: float | None = None
    dtype: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def jump(errors: Sequence[LayerError]) -> LayerError | None:
    """The first layer that is at fault.

    Where layers were run on the reference's values, it is the first whose own error is several
    times what is usual among those of its type. Elsewhere it is the first whose error is several
    times that of all before it, and no mere rounding.
    """
    if any(error.own is not None for error in errors):
        return _first_of_its_own(errors)
    before = FLOOR / JUMP
    for error in errors:
        # Written so that NaN is a jump.
        if not error.relative <= JUMP * before:
            return error
        before = max(before, error.relative)
    return None


def by_module(errors: Sequence[LayerError]) -> list[LayerError]:
    """One line a module: its last tensor."""
    last = {error.module: error for error in errors}
    return list(last.values())


def rows(errors: Sequence[LayerError]) -> list[dict[str, Any]]:
    """A row a module as tables and JSON have it: its last tensor, or the one that is at fault.

    Returns:
        Rows of equal keys, those of `LayerError` and `jump`, true for the module at fault.
    """
    first, table = jump(errors), []
    for error in by_module(errors):
        at_fault = first is not None and error.module == first.module
        shown = first if at_fault and first is not None else error
        table.append({**shown.to_dict(), "jump": at_fault})
    return table


def _first_of_its_own(errors: Sequence[LayerError]) -> LayerError | None:
    most = {dtype: _limit(errors, dtype) for dtype in {error.dtype for error in errors}}
    for error in errors:
        if error.own is not None and not error.own <= most[error.dtype]:
            return error
    return None


def _limit(errors: Sequence[LayerError], dtype: str) -> float:
    """The largest error of its own that a layer of a type may have: from the lower median."""
    own = sorted(e.own for e in errors if e.dtype == dtype and e.own is not None and e.own >= 0)
    usual = own[(len(own) - 1) // 2] if own else 0.0
    floor = FLOOR_OF_8_BITS if dtype.startswith(_8_BITS) else FLOOR
    return min(LARGEST_USUAL, JUMP * max(floor, usual))


_8_BITS = ("int8", "uint8", "float8", "int4", "uint4")
