"""Answers of timed calls, held against those that were judged: what is fast has to be right too.

A measurement whose calls answer something else than the validation did is of another thing, such as
of answers that were kept from the call before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.core.figures import Ratio, relative_errors
from pipeline.core.network import Logits
from pipeline.core.plain import Plain

KEPT = 32
"""Timed calls of a runner whose answers are kept."""

TOLERANCE = 0.05
"""Relative error of an image's logits from which on a timed answer is another one. Batches of other
sizes sum in another order: 1e-6 in float32, 1e-2 where 8 or 16 bits round what comes of it. The
answer for another image is off by 0.3 and more."""

_UNBOUNDED = 1e30
"""Stands for what is not finite, so that it equals itself and nothing else."""


@dataclass(frozen=True)
class Answers(Plain):
    """Whether timed calls answered as the validation did.

    Attributes:
        calls: Timed calls that were drawn, each with the same chance.
        wrong: How many of them gave an image other logits, by more than `TOLERANCE`.
        largest_error: The largest relative error of an image's logits; None without a comparison.
        why_not: Why nothing was compared; "" if it was.
    """

    calls: int = 0
    wrong: int = 0
    largest_error: float | None = None
    why_not: str = ""

    @property
    def words(self) -> str:
        """What was found, in a few words."""
        if self.why_not:
            return f"answers of timed calls not compared: {self.why_not}"
        if not self.wrong:
            return (
                f"{self.calls} answers of timed calls are those of the validation (relative error "
                f"at most {self.largest_error:.1e})"
            )
        return f"{self.problem} (relative error up to {self.largest_error:.2g})"

    @property
    def problem(self) -> str:
        """That the measurement is in error; "" if nothing says so."""
        if not self.wrong:
            return ""
        return (
            f"{self.wrong} of {self.calls} answers of timed calls are not those of the validation"
        )


LEAST_REPEATED = 0.9
"""Least time that a batch may take again and again, relative to distinct ones: what is faster still
remembers answers (MLPerf's audit allows 10 %)."""

FEWEST_AUDITED = 30
"""Calls of each kind from which an audit accuses somebody."""


@dataclass(frozen=True)
class Audit(Plain):
    """Whether one batch again and again is faster than distinct ones: answers may be remembered.

    Attributes:
        calls: Timed calls of each kind.
        ratio: Time of the repeated batch relative to that of distinct ones.
    """

    calls: int
    ratio: Ratio

    @property
    def problem(self) -> str:
        """That the measurement is in error; "" if that is not shown."""
        if self.calls < FEWEST_AUDITED or self.ratio.interval[1] >= LEAST_REPEATED:
            return ""
        return (
            f"one image again and again takes {self.ratio.value:.2f} of the time of distinct ones: "
            "answers are remembered"
        )

    @property
    def words(self) -> str:
        """What was found, in a line."""
        low, high = self.ratio.interval
        if self.problem:
            verdict = "answers are remembered"
        elif self.calls >= FEWEST_AUDITED and low >= LEAST_REPEATED:
            verdict = "fine"
        else:
            verdict = f"not to be told from {self.calls} calls"
        return (
            f"one image again and again takes {self.ratio.value:.3f} ({low:.3f} to {high:.3f}) of "
            f"the time of distinct ones: {verdict}"
        )


@dataclass
class Drawing:
    """Keeps answers of some calls, each call with the same chance, however many there will be.

    (Vitter's algorithm R, 1985.) Equal seeds draw the same calls.

    Attributes:
        most: How many answers are kept.
        seed: Decides which.
        kept: Number of the batch that was asked, and the answer.
    """

    most: int = KEPT
    seed: int = 0
    kept: list[tuple[int, Logits]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random, self._heard = random.Random(self.seed), 0

    def hear(self, batch: int, logits: Logits) -> None:
        """Hear of one call.

        Args:
            batch: Number of the batch.
            logits: The answer, (images of the batch, classes).
        """
        self._heard += 1
        if len(self.kept) < self.most:
            self.kept.append((batch, logits))
            return
        place = self._random.randrange(self._heard)
        if place < self.most:
            self.kept[place] = (batch, logits)

    def against(self, expected: Sequence[Logits]) -> Answers:
        """Hold what was kept against what was judged.

        Args:
            expected: By number of the batch, (images of the batch, classes).
        """
        errors = [_error(logits, expected[batch]) for batch, logits in self.kept]
        if not errors:
            return Answers(why_not="no call was timed")
        wrong = sum(error > TOLERANCE for error in errors)
        return Answers(len(errors), wrong, max(errors))


def _error(logits: Logits, expected: Logits) -> float:
    """The largest relative error of an image of a batch; 1 where the shapes differ."""
    if logits.shape != expected.shape:
        return 1.0
    here, judged = (
        np.nan_to_num(values.astype(np.float64), nan=_UNBOUNDED, posinf=_UNBOUNDED)
        for values in (logits, expected)
    )
    return float(relative_errors(here, judged).max())
