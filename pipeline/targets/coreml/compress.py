"""Weights in fewer bits: what coremltools stores, with tables that we choose.

A scheme is one way to store a weight tensor. `apply` compresses a converted model by giving each of
its weight tensors a scheme; `simulate` computes what the tensor becomes, for the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import BuildError

Weight = npt.NDArray[Any]
"""A weight tensor; its first axis is that of the output channels."""

_ROUNDS = 50


@dataclass(frozen=True)
class Scheme:
    """One way to store a weight tensor.

    Attributes:
        kind: "linear": symmetric integers, a scale for each output channel. "palette": a table of
            2**bits values for the tensor, indices into it. "pruned": the smallest values are zero
            and not stored.
        bits: Of a stored value.
        sparsity: Share of values that are zero.
    """

    kind: Literal["linear", "palette", "pruned"]
    bits: int = 16
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """For people: "int8", "palette6", "pruned50"."""
        if self.kind == "pruned":
            return f"pruned{100 * self.sparsity:.0f}"
        return f"{'int' if self.kind == 'linear' else 'palette'}{self.bits}"

    def bytes(self, weight: Weight) -> int:
        """Bytes of the stored tensor, tables and masks included, rounding of records aside."""
        numbers: int = weight.size
        channels: int = weight.shape[0]
        if self.kind == "linear":
            return numbers + 3 * channels
        if self.kind == "palette":
            return numbers * self.bits // 8 + 2 * (1 << self.bits)
        return round(numbers * (1 - self.sparsity)) * 2 + numbers // 8


INT8 = Scheme("linear", 8)
PALETTE6 = Scheme("palette", 6)
PALETTE4 = Scheme("palette", 4)


def palette(weight: Weight, bits: int) -> tuple[Weight, npt.NDArray[np.uint8]]:
    """The table that represents a tensor best, by k-means in one dimension (Lloyd's algorithm).

    The start is at quantiles of the values, so that the result depends on the tensor alone.

    Args:
        weight: Any shape.
        bits: The table gets 2**bits values.

    Returns:
        The table, ascending, in the type of `weight`, and an index for each value, flat.
    """
    values = weight.astype(np.float64).ravel()
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    size = 2**bits
    distinct = np.unique(ordered)
    if len(distinct) <= size:
        table = np.pad(distinct, (0, size - len(distinct)), mode="edge")
    else:
        table = _lloyd(ordered, sums, size)
    stored = table.astype(weight.dtype)
    borders = (stored[1:].astype(np.float64) + stored[:-1]) / 2
    return stored, np.searchsorted(borders, values).astype(np.uint8)


def _lloyd(
    ordered: npt.NDArray[np.float64], sums: npt.NDArray[np.float64], size: int
) -> npt.NDArray[np.float64]:
    # Half of the start follows the quantiles, half the range: both dense and rare values count.
    quantiles = np.quantile(ordered, (np.arange(size // 2) + 0.5) / (size // 2))
    spread = np.linspace(ordered[0], ordered[-1], size - size // 2)
    table = np.sort(np.concatenate([quantiles, spread]))
    for _ in range(_ROUNDS):
        ends = np.searchsorted(ordered, (table[1:] + table[:-1]) / 2)
        starts, ends = np.concatenate([[0], ends]), np.concatenate([ends, [len(ordered)]])
        counts = ends - starts
        means = (sums[ends] - sums[starts]) / np.maximum(counts, 1)
        better = np.sort(np.where(counts > 0, means, table))
        if np.array_equal(better, table):
            break
        table = better
    return table


def simulate(weight: Weight, scheme: Scheme) -> Weight:
    """What a tensor becomes when it is stored and read again, in its own type.

    The arithmetic is that of coremltools, down to the type: it rounds float16 weights in float16.
    """
    if scheme.kind == "palette":
        table, indices = palette(weight, scheme.bits)
        return table[indices].reshape(weight.shape)
    size = np.abs(weight)
    if scheme.kind == "pruned":
        return np.where(size <= np.percentile(size, 100 * scheme.sparsity), 0, weight)
    largest = size.max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    scale = (largest + largest) / weight.dtype.type(254)
    stored = np.rint(np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 0))
    rounded: Weight = np.clip(stored, -127, 127) * scale
    return rounded


def apply(model: Any, scheme: Scheme, threshold: int, *, joint: bool = False) -> Any:
    """Compress every weight tensor of a model in the same way.

    Args:
        model: A coremltools model.
        scheme: How.
        threshold: Tensors with at most so many values stay as they are.
        joint: The model was pruned already; the zeros stay unstored (iOS 18).

    Raises:
        BuildError: coremltools refuses.
    """
    import coremltools.optimize.coreml as cto

    config = cto.OptimizationConfig(global_config=_config(scheme, threshold))
    return _compress(model, scheme, config, joint)


def apply_mixed(model: Any, schemes: Mapping[str, Scheme]) -> Any:
    """Compress each weight tensor in its own way.

    Args:
        model: A coremltools model.
        schemes: By the tensor's name in the program; others stay as they are.

    Raises:
        BuildError: coremltools refuses.
    """
    import coremltools.optimize.coreml as cto

    for scheme in sorted(set(schemes.values()), key=repr):
        config = cto.OptimizationConfig()
        for name, chosen in schemes.items():
            if chosen == scheme:
                config.set_op_name(name, _config(scheme, 0))
        model = _compress(model, scheme, config, False)
    return model


def _config(scheme: Scheme, threshold: int) -> Any:
    import coremltools.optimize.coreml as cto

    if scheme.kind == "linear":
        return cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", weight_threshold=threshold
        )
    if scheme.kind == "pruned":
        return cto.OpMagnitudePrunerConfig(
            target_sparsity=scheme.sparsity, weight_threshold=threshold
        )

    def table(weight: Weight) -> tuple[Weight, npt.NDArray[np.uint8]]:
        return palette(weight, scheme.bits)

    return cto.OpPalettizerConfig(
        mode="custom", lut_function=table, nbits=None, weight_threshold=threshold
    )


def _compress(model: Any, scheme: Scheme, config: Any, joint: bool) -> Any:
    import coremltools.optimize.coreml as cto

    try:
        if scheme.kind == "linear":
            return cto.linear_quantize_weights(model, config, joint_compression=joint)
        if scheme.kind == "palette":
            return cto.palettize_weights(model, config, joint_compression=joint)
        return cto.prune_weights(model, config, joint_compression=joint)
    # coremltools raises whatever its passes do.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BuildError(f"coremltools cannot compress the weights: {reason}") from error
