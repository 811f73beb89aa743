"""A histogram whose range grows with the data and whose result does not depend on the order.

The bin width is always a power of two and zero is always an edge. When a value lies outside, whole
bins merge until it fits, so no count is ever split or interpolated: batches in any order, or merged
from several runs, give the same counts as all values at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 4096
"""Bins from zero to the largest magnitude: more than half of them are in use, so at least the 2048
that entropy calibration is usually given."""

_SMALLEST_EXPONENT = -1000  # of a width; lets a histogram of zeros alone become any other

_LARGEST_EXPONENT = 127  # of a power of two in single precision


class Histogram:
    """Counts of finite values in bins of equal width.

    Args:
        bins: Most bins on either side of zero, a power of two.

    Attributes:
        low: Smallest value seen; infinite before the first.
        high: Largest value seen; minus infinity before the first.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"the number of bins is a power of two, not {bins}")
        self._bits = bins.bit_length() - 1
        self._exponent = _SMALLEST_EXPONENT
        self._first = 0
        self._counts: Counts = np.zeros(0, dtype=np.int64)
        self.low = math.inf
        self.high = -math.inf

    def add(self, values: Floats) -> None:
        """Count values of any shape.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        flat = np.asarray(values).reshape(-1)
        if flat.size:
            low, high = float(flat.min()), float(flat.max())
            self._insert(*self._count(flat, low, high))

    def add_part(self, values: Floats, low: float, high: float) -> None:
        """Count some of many values, and the extremes of all of them beside: in one pass.

        It comes to what `add` of the values and `add` of both extremes come to.

        Args:
            values: Of any shape; none lies beyond the extremes.
            low: The smallest of all.
            high: The largest of all.

        Raises:
            ValueError: An extreme is NaN or infinite.
        """
        first, counts = self._count(np.asarray(values).reshape(-1), low, high)
        counts[0] += 1
        counts[-1] += 1
        self._insert(first, counts)

    def _count(self, flat: Floats, low: float, high: float) -> tuple[int, Counts]:
        """The bin of `low`, and how many values lie in each from there to that of `high`."""
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a histogram counts finite values only")
        self._cover(low, high)
        bins = _scaled(flat, -self._exponent)
        np.floor(bins, out=bins)
        first, last = (math.floor(end * 2.0**-self._exponent) for end in (low, high))
        # Numbers of bins are whole and small: their difference is exact in either precision.
        bins -= first
        return first, np.bincount(bins.astype(np.int64), minlength=last - first + 1)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram with as many bins.

        Raises:
            ValueError: The other one has another number of bins.
        """
        if other._bits != self._bits:
            raise ValueError(
                f"histograms of {2**self._bits} and {2**other._bits} bins do not merge"
            )
        if not other.count:
            return
        self._cover(other.low, other.high)
        self._insert(*_coarsen(other._first, other._counts, self._exponent - other._exponent))

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until both values fit."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        amax = max(-self.low, self.high)
        if amax == 0:
            return
        exponent = max(math.frexp(amax)[1] - self._bits, _SMALLEST_EXPONENT)
        self._first, self._counts = _coarsen(self._first, self._counts, exponent - self._exponent)
        self._exponent = exponent

    def _insert(self, first: int, counts: Counts) -> None:
        if not self._counts.size:
            self._first, self._counts = first, counts.astype(np.int64)
            return
        start = min(first, self._first)
        stop = max(first + counts.size, self._first + self._counts.size)
        total = np.zeros(stop - start, dtype=np.int64)
        total[self._first - start :][: self._counts.size] = self._counts
        total[first - start :][: counts.size] += counts
        self._first, self._counts = start, total

    @classmethod
    def restored(
        cls, low: float, high: float, exponent: int, first: int, counts: Counts
    ) -> Histogram:
        """A histogram as it was, see `low`, `high`, `exponent`, `first` and `counts`."""
        found = cls()
        found.low, found.high = low, high
        found._exponent, found._first = exponent, first
        found._counts = counts.astype(np.int64)
        return found

    @property
    def exponent(self) -> int:
        """Of the width of a bin, which is a power of two."""
        return self._exponent

    @property
    def first(self) -> int:
        """Number of the first bin of `counts`: of 0, zero is the lower edge."""
        return self._first

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self._exponent

    @property
    def counts(self) -> Counts:
        """Counts of the bins from the smallest value's to the largest's."""
        return self._counts

    @property
    def edges(self) -> Doubles:
        """Edges of these bins, one more than there are bins."""
        return np.arange(self._first, self._first + self._counts.size + 1, dtype=np.float64) * (
            self.width
        )

    @property
    def centres(self) -> Doubles:
        """Middle of every bin, within the smallest and largest value."""
        middles: Doubles = np.clip(self.edges[:-1] + self.width / 2, self.low, self.high)
        return middles

    def magnitudes(self) -> Counts:
        """Counts of the absolute values, in bins of the same width from zero on."""
        zero = max(0, min(-self._first, self._counts.size))
        negative, positive = self._counts[:zero][::-1], self._counts[zero:]
        # Where all values are on one side of zero, empty bins lie between zero and them.
        negative = np.concatenate(
            [np.zeros(max(0, -self._first - self._counts.size), int), negative]
        )
        positive = np.concatenate([np.zeros(max(0, self._first), int), positive])
        total = np.zeros(max(negative.size, positive.size), dtype=np.int64)
        total[: negative.size] += negative
        total[: positive.size] += positive
        return total

    def coarse(self, bins: int) -> tuple[int, ...]:
        """Counts in `bins` equal parts of the range from the smallest to the largest value.

        For display: a bin that crosses a border counts where its middle lies.
        """
        if not self.count:
            return (0,) * bins
        if self.low == self.high:
            return (self.count,) + (0,) * (bins - 1)
        parts, _ = np.histogram(
            self.centres, bins=bins, range=(self.low, self.high), weights=self._counts
        )
        return tuple(int(part) for part in parts)


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """One histogram of all values of several.

    Raises:
        ValueError: There is none, or they have different numbers of bins.
    """
    if not histograms:
        raise ValueError("there is no histogram to merge")
    total = Histogram(2 ** histograms[0]._bits)
    for histogram in histograms:
        total.merge(histogram)
    return total


def _scaled(values: Floats, exponent: int) -> Floats:
    """Values times a power of two, exactly, in single precision where that holds the products.

    They are numbers of bins, so small; but a factor below 1 might take digits from tiny values.
    """
    if values.dtype == np.float32 and 0 <= exponent <= _LARGEST_EXPONENT:
        return values * np.float32(2.0**exponent)
    return values.astype(np.float64) * 2.0**exponent


def _coarsen(first: int, counts: Counts, doublings: int) -> tuple[int, Counts]:
    """Merge bins into ones that are 2**doublings times as wide; borders fall on borders."""
    if not doublings or not counts.size:
        return first, counts
    index = np.array([(first + i) >> doublings for i in np.flatnonzero(counts).tolist()])
    start = int(index.min())
    total = np.zeros(int(index.max()) - start + 1, dtype=np.int64)
    np.add.at(total, index - start, counts[counts > 0])
    return start, total
