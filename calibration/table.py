"""The ranges of a network: what calibration hands to the quantizers and to the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibration.observe import Statistics, check
from calibration.ranges import PERCENTILE, DType, Method, Range, Scheme, choose_range

BINS = 32
"""Bins of the histograms that are kept for display."""


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Range of one tensor.

    Attributes:
        chosen: The range to quantize with.
        seen: What was seen.
        histogram: Counts in `BINS` equal parts of what was seen.
    """

    chosen: Range
    seen: Range
    histogram: tuple[int, ...]

    @property
    def clipped(self) -> float:
        """Share of what was seen that the chosen range leaves out, by length."""
        length = self.seen.high - self.seen.low
        return 1 - (self.chosen.high - self.chosen.low) / length if length else 0.0


@dataclass(frozen=True)
class Table:
    """Ranges by tensor, in the order of the graph.

    Attributes:
        method: How they were chosen.
        scheme: What they were chosen for.
        percentile: Percent of values that the percentile method kept.
        images: Number of images that were observed.
        tensors: The ranges.
        warnings: What a report must say.
    """

    method: Method
    scheme: Scheme
    percentile: float
    images: int
    tensors: Mapping[str, TensorRange]
    warnings: tuple[str, ...] = ()

    @property
    def ranges(self) -> dict[str, Range]:
        """The chosen ranges."""
        return {name: tensor.chosen for name, tensor in self.tensors.items()}

    def with_ranges(self, chosen: Mapping[str, Range]) -> Table:
        """The same with other ranges of some tensors."""
        tensors = {
            name: replace(tensor, chosen=chosen.get(name, tensor.chosen))
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": str(self.method),
            "scheme": {
                "dtype": str(self.scheme.dtype),
                "symmetric": self.scheme.symmetric,
                "narrow": self.scheme.narrow,
            },
            "percentile": self.percentile,
            "images": self.images,
            "tensors": {
                name: {
                    "chosen": [tensor.chosen.low, tensor.chosen.high],
                    "seen": [tensor.seen.low, tensor.seen.high],
                    "histogram": list(tensor.histogram),
                }
                for name, tensor in self.tensors.items()
            },
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Table:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: It was not made by `to_dict`.
            DataError: A range is not finite.
        """
        scheme = plain["scheme"]
        return cls(
            Method(plain["method"]),
            Scheme(DType(scheme["dtype"]), bool(scheme["symmetric"]), bool(scheme["narrow"])),
            float(plain["percentile"]),
            int(plain["images"]),
            {name: _tensor_range(tensor) for name, tensor in plain["tensors"].items()},
            tuple(str(warning) for warning in plain["warnings"]),
        )


def _tensor_range(plain: Mapping[str, Any]) -> TensorRange:
    chosen_low, chosen_high = plain["chosen"]
    seen_low, seen_high = plain["seen"]
    return TensorRange(
        Range(float(chosen_low), float(chosen_high)),
        Range(float(seen_low), float(seen_high)),
        tuple(int(count) for count in plain["histogram"]),
    )


def make_table(
    statistics: Mapping[str, Statistics],
    method: Method,
    scheme: Scheme,
    *,
    images: int,
    percentile: float = PERCENTILE,
    exempt: Collection[str] = frozenset(),
) -> Table:
    """Choose the ranges of all observed tensors.

    Args:
        statistics: See `calibration.observe`.
        method: How ranges are chosen.
        scheme: What the values will be stored in.
        images: Number of images that were observed.
        percentile: Percent of values that the percentile method keeps.
        exempt: Tensors that will not be quantized: they get no range and may hold anything.

    Raises:
        DataError: A tensor holds NaN or infinite values, or no values.
        ConfigError: The method does not fit the scheme.
    """
    warnings = check(statistics, exempt)
    tensors = {
        name: TensorRange(
            choose_range(seen.histogram, method, scheme, percentile),
            Range(seen.low, seen.high),
            seen.histogram.coarse(BINS),
        )
        for name, seen in statistics.items()
        if name not in exempt
    }
    return Table(method, scheme, percentile, images, tensors, warnings)
