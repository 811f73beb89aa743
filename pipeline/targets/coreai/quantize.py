"""Weights in fewer bits, written as coreai-opt writes them, in a converted program.

8-bit integers are coreai-opt's own pass. Its palettes need scikit-learn or a C++ compiler where
they are made; ours come from the same operation and an own clustering, which gives the same numbers
on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 50
"""Most rounds of clustering; it ends before when nothing changes."""

_BINS = 1024
"""Of the histogram with which clustering begins."""

_READERS = frozenset(
    {"coreai.conv2d", "coreai.batch_matmul", "coreai.decomposable.broadcasting_batch_matmul"}
)
"""Operations whose constant inputs are weights."""

Weights = npt.NDArray[np.floating[Any]]
Compress = Callable[[Any, int], Any]
"""Takes a program and the fewest numbers of a weight that is compressed."""


def int8(program: Any, threshold: int) -> Any:
    """Store weights as 8-bit integers with a scale for each output channel."""
    from coreai_opt.coreai_utils import DType, quantize_weights

    return quantize_weights(program, DType.INT8, weight_num_threshold=threshold)


def palette(bits: int) -> Compress:
    """Store weights as indices of so many bits into a table of values, one for each weight."""

    def compress(program: Any, threshold: int) -> Any:
        from coreai._compiler.ir import WalkResult

        def visit(op: Any) -> Any:
            if _is_weight(op, threshold):
                _look_up(op, bits)
            return WalkResult.ADVANCE

        program._module._mlir_module.operation.walk(visit)
        return program

    return compress


def _is_weight(op: Any, threshold: int) -> bool:
    if op.name != "coreai.constant" or str(op.result.type.element_type) not in ("f16", "f32"):
        return False
    readers = {use.owner.name for use in op.result.uses}
    return bool(readers) and readers <= _READERS and np.prod(op.result.type.shape) >= threshold


def _look_up(op: Any, bits: int) -> None:
    """Put a look-up in the place of a constant."""
    from coreai._compiler.ir import InsertionPoint, IntegerType
    from coreai.authoring import lut_to_dense
    from coreai_opt.coreai_utils._coreai_imports import _get_constant_value_as_np_array
    from coreai_opt.coreai_utils._utils.graph_utils import _create_constant_value_from_np_array

    weights: Any = _get_constant_value_as_np_array(op)
    table, indices = cluster(weights, 1 << bits)
    # As many axes as the weight, of one block each, then the table and a vector of one value.
    shape = (*[1] * weights.ndim, len(table), 1)
    with op.context, op.location, InsertionPoint(op):
        constant = _create_constant_value_from_np_array
        dense = lut_to_dense(
            indices=constant(indices, IntegerType.get_unsigned(bits)),
            lut=constant(table.reshape(shape), op.result.type.element_type),
            axis=constant(np.int16(0), IntegerType.get_signed(16)),
        )
    op.result.replace_all_uses_with(dense._to_mlir())


def cluster(weights: Weights, count: int) -> tuple[Weights, npt.NDArray[np.uint8]]:
    """Choose the values that stand for weights: clusters by the distance to their mean.

    Args:
        weights: Any shape.
        count: How many values there are, at most 256.

    Returns:
        The values, (count,), ascending and of the weights' type; for each weight the index of the
        nearest, in the weights' shape.
    """
    values, inverse, counts = np.unique(weights, return_inverse=True, return_counts=True)
    exact = values.astype(np.float64)
    cumulated = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0.0], np.cumsum(exact * counts)])
    centres = _first_centres(exact, counts, count)
    for _ in range(_ROUNDS):
        edges = np.searchsorted(exact, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(exact)]])
        members, totals = np.diff(cumulated[edges]), np.diff(sums[edges])
        moved = np.where(members > 0, totals / np.maximum(members, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    table = np.sort(centres).astype(weights.dtype)
    wide = table.astype(np.float64)
    nearest = np.searchsorted((wide[1:] + wide[:-1]) / 2, exact).astype(np.uint8)
    return table, nearest[inverse].reshape(weights.shape)


def _first_centres(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64]:
    """As dense as the cube root of the density: best for many values (Panter and Dite, 1951)."""
    if len(values) <= count:
        return np.concatenate([values, np.full(count - len(values), values[-1])])
    density, edges = np.histogram(values, _BINS, weights=counts)
    cumulated = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    shares = (np.arange(count) + 0.5) / count * cumulated[-1]
    centres: npt.NDArray[np.float64] = np.interp(shares, cumulated, edges)
    return centres
