"""Figures and how they came about: pure functions over arrays, and the `Number` that carries one.

Latency follows one protocol: every sample is kept and no outlier is dropped; a percentile is given
only where there are enough samples for it; an interval comes from a bootstrap with a fixed seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.core import cpu_classes
from pipeline.core.cpu_classes import Purpose
from pipeline.core.plain import Plain

Floats = npt.NDArray[np.floating[Any]]

SAMPLES_FOR_P90 = 64
SAMPLES_FOR_P99 = 662
"""Fewest samples for a percentile: with these, the chance that even the largest sample lies below
the true percentile is 0.9**64 = 0.0012 and 0.99**662 = 0.0013."""

_DOUBT = 0.01
"""Chance that a bound of a percentile is none."""

Z95 = 1.959963984540054
"""Quantile of the normal distribution for a two-sided interval of 95 %."""


class State(StrEnum):
    """How a figure came about.

    RESTRICTED is measured by the real runtime that sees a lesser CPU than there is: the figure
    holds for that class of CPUs, and is never mixed with those of the CPU as it is. ESTIMATED is a
    time of that runtime where the CPU lacks instructions of the class, and others that take as long
    ran in their place.
    """

    MEASURED = "measured"
    RESTRICTED = "measured here, restricted"
    EMULATED = "emulated"
    ESTIMATED = "estimated"
    NOT_MEASURED = "not measured"


def measured_here() -> State:
    """The state of what this process measures."""
    if cpu_classes.emulated(Purpose.TIMES):
        return State.ESTIMATED
    if cpu_classes.emulated():
        return State.EMULATED
    return State.MEASURED if cpu_classes.restriction() is None else State.RESTRICTED


@dataclass(frozen=True)
class Number(Plain):
    """A figure with its origin.

    Attributes:
        value: The figure; None exactly when it was not measured.
        state: How it came about.
        unit: "", "%", "ms", "images/s", "bytes", …
        by: What gave it: the runtime and device that ran, or the executor that emulated.
        why: Why it was not measured, or what an emulation stands for.
        samples: Number of images or timed calls behind it.
        interval: 95 % interval, in the unit of the value.
    """

    value: float | None
    state: State
    unit: str = ""
    by: str = ""
    why: str = ""
    samples: int | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.state is State.NOT_MEASURED):
            raise ValueError(f"a number is {self.state} and has the value {self.value}")
        if self.state is State.NOT_MEASURED and not self.why:
            raise ValueError("a number that was not measured says why")
        if self.state is not State.NOT_MEASURED and not self.by:
            raise ValueError(f"a number that was {self.state} says by what")

    @classmethod
    def not_measured(cls, why: str, unit: str = "") -> Self:
        """A figure that could not be had, and why."""
        return cls(None, State.NOT_MEASURED, unit, why=why)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without what is empty."""
        values = super().to_dict()
        return {k: v for k, v in values.items() if v not in (None, "") or k == "value"}


def top_k(logits: Floats, labels: npt.NDArray[np.integer[Any]], k: int = 1) -> int:
    """Number of images of which the label is among the `k` largest logits.

    Args:
        logits: (images, classes); a row with a NaN counts as wrong.
        labels: (images,).
        k: At most the number of classes counts.
    """
    if not len(labels):
        return 0
    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    hits = (best == np.asarray(labels)[:, None]).any(1)
    return int((hits & ~np.isnan(logits).any(1)).sum())


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), within 0 and 1.

    Raises:
        ValueError: `total` is not positive, or `correct` does not lie within it.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no share")
    share, z2 = correct / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - spread), min(1.0, centre + spread)


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits over the same images.

    Attributes:
        agreement: Share of images with the same top-1 class.
        flips: Number of images with another top-1 class.
        cosine: Mean over images of the cosine similarity of the logits.
        max_difference: Largest absolute difference of two logits.
        relative_error: Euclidean norm of the difference over that of the reference.
        finite: No logit is NaN or infinite.
    """

    agreement: float
    flips: int
    cosine: float
    max_difference: float
    relative_error: float
    finite: bool


def compare(logits: Floats, reference: Floats) -> Comparison:
    """Compare `logits` with `reference`, (images, classes) each.

    Raises:
        ValueError: The shapes differ, or there is no image.
    """
    if logits.shape != reference.shape or not len(logits):
        raise ValueError(f"logits of shapes {logits.shape} and {reference.shape} do not compare")
    finite = bool(np.isfinite(logits).all())
    same = (logits.argmax(1) == reference.argmax(1)) & np.isfinite(logits).all(1)
    left, right = (
        np.nan_to_num(a.astype(np.float64), posinf=1e30, neginf=-1e30) for a in (logits, reference)
    )
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine = (left * right).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    difference = left - right
    return Comparison(
        agreement=float(same.mean()),
        flips=int((~same).sum()),
        cosine=float(cosine.mean()),
        max_difference=float(np.abs(difference).max()),
        relative_error=float(np.linalg.norm(difference)) / max(float(np.linalg.norm(right)), 1e-30),
        finite=finite,
    )


def relative_errors(logits: Floats, reference: Floats) -> npt.NDArray[np.float64]:
    """Norm of the difference of each image's logits, relative to that of the reference.

    Args:
        logits: (images, classes).
        reference: Likewise.

    Returns:
        (images,).
    """
    difference = logits.astype(np.float64) - reference
    norms = np.linalg.norm(reference.astype(np.float64), axis=1)
    errors: npt.NDArray[np.float64] = np.linalg.norm(difference, axis=1) / np.maximum(norms, 1e-30)
    return errors


@dataclass(frozen=True)
class Drop:
    """Top-1 of a reference minus that of another, over the same images.

    Attributes:
        value: As a share; negative where the other is better.
        interval: 95 % interval that uses the pairing: only images on which the two differ count.
        lost: Images that only the reference has right.
        won: Images that only the other has right.
    """

    value: float
    interval: tuple[float, float]
    lost: int
    won: int


def paired_drop(logits: Floats, reference: Floats, labels: npt.NDArray[np.integer[Any]]) -> Drop:
    """How much top-1 falls from `reference` to `logits`, (images, classes) each; see `paired`."""
    return paired(answers(logits) == labels, answers(reference) == labels)


def answers(logits: Floats) -> npt.NDArray[np.int64]:
    """The class that logits name, (images,); -1 where one is no number.

    Args:
        logits: (images, classes).
    """
    return np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).astype(np.int64)


def paired(right: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_]) -> Drop:
    """How much the share of right answers falls, image by image.

    Args:
        right: Which answers are right now, (images,).
        before: Which were before, (images,).

    The interval is that of the difference of paired proportions (Agresti and Min, 2005: half an
    image is added to each of the four cells, so that it has a width where the two never differ).
    """
    lost, won, total = int((before & ~right).sum()), int((right & ~before).sum()), len(right)
    b, c, n = lost + 0.5, won + 0.5, total + 2
    centre = (b - c) / n
    spread = Z95 * math.sqrt(max(b + c - (b - c) ** 2 / n, 0)) / n
    return Drop((lost - won) / total, (centre - spread, centre + spread), lost, won)


@dataclass(frozen=True)
class LatencySummary(Plain):
    """What many timed calls come to, in milliseconds.

    Attributes:
        samples: Number of calls.
        p50: Median.
        p50_interval: 95 % bootstrap interval of the median.
        p90: 90th percentile; None with fewer than `SAMPLES_FOR_P90` calls.
        p99: 99th percentile; None with fewer than `SAMPLES_FOR_P99` calls.
        mean: Mean.
        min: Shortest call.
        max: Longest call.
        p90_bound: What the 90th percentile is at most, see `percentile_bound`; None with too few.
        p99_bound: The same of the 99th.
    """

    samples: int
    p50: float
    p50_interval: tuple[float, float]
    p90: float | None
    p99: float | None
    mean: float
    min: float
    max: float
    p90_bound: float | None = None
    p99_bound: float | None = None

    def median(self, by: str) -> Number:
        """The median as a figure.

        Args:
            by: The runtime and device that ran.
        """
        return Number(
            self.p50,
            measured_here(),
            unit="ms",
            by=by,
            samples=self.samples,
            interval=self.p50_interval,
        )


@dataclass(frozen=True)
class Latency:
    """Timed calls of one thing.

    Attributes:
        samples: Milliseconds of every call, in order.
    """

    samples: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("no call was timed")

    @property
    def p50(self) -> float:
        """Median, in milliseconds."""
        return float(np.median(self.samples))

    @property
    def p90(self) -> float | None:
        """90th percentile, in milliseconds; None with fewer than 64 samples."""
        return self._percentile(90, SAMPLES_FOR_P90)

    @property
    def p99(self) -> float | None:
        """99th percentile, in milliseconds; None with fewer than 662 samples."""
        return self._percentile(99, SAMPLES_FOR_P99)

    @property
    def mean(self) -> float:
        """Mean, in milliseconds."""
        return float(np.mean(self.samples))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the median, in milliseconds."""
        return bootstrap(np.asarray(self.samples), seed=seed)

    def _percentile(self, q: float, needed: int) -> float | None:
        return float(np.percentile(self.samples, q)) if len(self.samples) >= needed else None

    def summary(self) -> LatencySummary:
        """What the calls come to."""
        return LatencySummary(
            samples=len(self.samples),
            p50=self.p50,
            p50_interval=self.interval(),
            p90=self.p90,
            p99=self.p99,
            mean=self.mean,
            min=min(self.samples),
            max=max(self.samples),
            p90_bound=percentile_bound(self.samples, 0.9),
            p99_bound=percentile_bound(self.samples, 0.99),
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary for JSON, in milliseconds."""
        return self.summary().to_dict()


def percentile_bound(samples: Sequence[float], share: float) -> float | None:
    """What a percentile of calls like these is at most, with a confidence of 99 %.

    Whatever the distribution: the chance that at most k of n calls lie above the true percentile is
    that of k or fewer in n trials. Where it is 1 % at most, the call with k longer ones is a bound.
    This is the early stopping of MLPerf's inference rules, which also ask that one call lies above
    (k >= 1): hence `SAMPLES_FOR_P90` and `SAMPLES_FOR_P99`.

    Args:
        samples: Milliseconds of every call.
        share: Of the calls that the percentile covers, such as 0.9.

    Returns:
        Milliseconds; None with too few calls.
    """
    total, above = len(samples), -1
    chance = total * math.log(share)  # of k = 0, as a logarithm: 0.9**10000 is no float
    tail = 0.0
    while above < total:
        tail += math.exp(chance)
        if tail > _DOUBT:
            break
        above += 1
        chance += math.log((total - above) / (above + 1)) + math.log((1 - share) / share)
    return sorted(samples)[total - 1 - above] if above >= 1 else None


_MOST_PICKS = 2**16
"""Values that are drawn at a time: half a MiB of numbers."""


def _resampled_medians(values: Floats, rounds: int, rng: np.random.Generator) -> Floats:
    # Some rounds at a time: a matrix of all would need much memory for long runs.
    samples = len(values)
    most = max(1, _MOST_PICKS // samples)
    parts = [min(most, rounds - done) for done in range(0, rounds, most)]
    picks = (rng.integers(0, samples, (part, samples)) for part in parts)
    return np.concatenate([np.median(values[pick], axis=1) for pick in picks])


def bootstrap(values: Floats, rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median of `values`, (samples,)."""
    medians = _resampled_medians(values, rounds, np.random.default_rng(seed))
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class RangeRow(Plain):
    """Range of one quantized tensor, for people.

    Attributes:
        tensor: Its name.
        seen: Lowest and highest value that was seen.
        chosen: Lowest and highest value that the quantized tensor can hold.
        clipped: Share of the seen range that is cut off.
        constant: All values that were seen are the same.
        histogram: Counts in equal parts of the seen range.
    """

    tensor: str
    seen: tuple[float, float]
    chosen: tuple[float, float]
    clipped: float
    constant: bool
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Throughput(Plain):
    """Calls that follow each other in a queue, at one batch size.

    Attributes:
        batch: Images in a call.
        p50_ms: Median time of a call.
        p99_ms: 99th percentile; None with too few calls.
        images_per_s: Images by the time of all calls, with the gaps between them.
    """

    batch: int
    p50_ms: float
    p99_ms: float | None
    images_per_s: float


@dataclass(frozen=True)
class Ratio(Plain):
    """How long one thing takes relative to another, both timed in one interleaved run.

    Attributes:
        value: Ratio of the medians; below 1 is faster.
        interval: 95 % bootstrap interval.
    """

    value: float
    interval: tuple[float, float]

    @property
    def faster(self) -> bool:
        """The whole interval lies below 1."""
        return self.interval[1] < 1

    @property
    def slower(self) -> bool:
        """The whole interval lies above 1."""
        return self.interval[0] > 1

    @property
    def inverse(self) -> Ratio:
        """How long the other thing takes relative to the one."""
        low, high = self.interval
        return Ratio(1 / self.value, (1 / high, 1 / low))

    def times(self, other: Ratio) -> Ratio:
        """The product with a ratio that was measured independently.

        Relative errors of independent factors add like the legs of a right triangle: that both lie
        at the far ends of their intervals is less likely than that one does.
        """
        value = self.value * other.value
        below, above = (
            math.hypot(*(math.log(one.interval[end] / one.value) for one in (self, other)))
            for end in (0, 1)
        )
        return Ratio(value, (value * math.exp(-below), value * math.exp(above)))


def ratio(times: Sequence[float], baseline: Sequence[float], rounds: int = 1000) -> Ratio:
    """Ratio of the median of `times` to that of `baseline`, with its interval.

    The seed is fixed: what several pages ask of the same calls is computed once.
    """
    return _ratio(tuple(times), tuple(baseline), rounds)


@functools.lru_cache(maxsize=64)
def _ratio(times: tuple[float, ...], baseline: tuple[float, ...], rounds: int) -> Ratio:
    a, b = np.asarray(times, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    rng = np.random.default_rng(0)
    resampled = _resampled_medians(a, rounds, rng) / _resampled_medians(b, rounds, rng)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Ratio(float(np.median(a) / np.median(b)), (float(low), float(high)))
