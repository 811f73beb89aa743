"""Squared errors of quantizing a histogram in many ways, without quantizing every bin for each.

Bins ascend, and so does what is stored of them: each stored value stands for a run of bins. With
cumulative sums over the bins, a way to quantize costs two look-ups for each stored value, whatever
the number of bins. Sums made so are differences of larger ones and off in their last digits; so
they only say which ways cannot be the best, and the others are left to be computed bin by bin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.histogram import Doubles, Histogram

MARGIN = 1e-6
"""By how much, relative, an error may exceed the smallest without being ruled out. Sums are right
to about 1e-9."""

_LAST_DIGITS = 1e-12
"""The same, relative to the sum of squares: what is left of errors that are next to nothing."""


class SquaredErrors:
    """Errors of one histogram.

    Args:
        histogram: What is quantized.
        function: What is applied to values before they are compared, elementwise; None for nothing.

    Attributes:
        centres: Middles of the bins that hold something, ascending.
        weights: Their counts.
        wanted: The function of the centres.
    """

    def __init__(
        self, histogram: Histogram, function: Callable[[Doubles], Doubles] | None = None
    ) -> None:
        counts = histogram.counts
        used = np.flatnonzero(counts)
        self._function = function
        self.centres: Doubles = histogram.centres[used]
        self.weights: Doubles = counts[used].astype(np.float64)
        self.wanted = self._of(self.centres)
        self._ends = float(self.centres[0]), float(self.centres[-1])
        self._width, self._first = histogram.width, histogram.first
        products = np.zeros(len(counts))
        products[used] = self.weights * self.wanted
        # Of the first n bins, for each n.
        self._counted = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
        self._summed = np.concatenate([[0.0], np.cumsum(products)])
        with np.errstate(over="ignore"):
            self._squares = float((self.weights * self.wanted**2).sum())

    def exact(self, rounded: npt.NDArray[np.floating[Any]]) -> float:
        """Squared error, bin by bin.

        Args:
            rounded: What the centres become.
        """
        with np.errstate(over="ignore"):
            return float((self.weights * (self._of(rounded) - self.wanted) ** 2).sum())

    def may_be_best(
        self, scales: npt.NDArray[np.float32], zeros: Doubles, limits: tuple[int, int]
    ) -> npt.NDArray[np.int64]:
        """Numbers of the ways to quantize whose error may be the smallest, ascending.

        Args:
            scales: Of each way, (ways,).
            zeros: Zero point of each way, (ways,).
            limits: Smallest and largest stored value.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            errors = self._errors(scales, zeros, limits)
            smallest = errors.min()
            most = smallest + MARGIN * abs(smallest) + _LAST_DIGITS * self._squares
            # What is not finite rules nothing out.
            return np.flatnonzero(~(errors > most))

    def _errors(
        self, scales: npt.NDArray[np.float32], zeros: Doubles, limits: tuple[int, int]
    ) -> Doubles:
        """Nearly the squared errors, (ways,)."""
        steps = np.arange(limits[0], limits[1] + 1) - zeros[:, None]
        values = self._of((steps.astype(np.float32) * scales[:, None]).astype(np.float64))
        before = self._bins_below((steps[:, 1:] - 0.5) * scales[:, None].astype(np.float64))
        last, total, summed = values[:, -1], self._counted[-1], self._summed[-1]
        # Sums by parts: all bins at the last value, then what each border takes away.
        at_last = last**2 * total - 2 * last * summed
        taken = self._counted[before]
        taken *= values[:, 1:] + values[:, :-1]
        taken -= 2 * self._summed[before]
        errors: Doubles = self._squares + at_last - np.einsum("ws,ws->w", taken, np.diff(values))
        return errors

    def _bins_below(self, borders: Doubles) -> npt.NDArray[np.intp]:
        """How many bins have their centre below each border."""
        first, last = self._ends
        bins = len(self._counted) - 1
        below = borders / self._width
        below -= self._first + 0.5
        np.ceil(below, out=below)
        # The outermost centres are no middles: no bin reaches beyond what was seen.
        np.clip(below, 1, bins - 1, out=below)
        below[borders <= first] = 0
        below[borders > last] = bins
        return below.astype(np.intp)

    def _of(self, values: Any) -> Doubles:
        if self._function is None:
            unchanged: Doubles = values
            return unchanged
        return self._function(values)
