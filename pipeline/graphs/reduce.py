"""The smallest part of a graph that still fails: with which a builder dies, or a layer jumps.

    found = reduce(recorded, fails, seconds=600, say=print)
    found.part.model

A part fails if it fails in the way of the whole: one that is refused for another reason is no
smaller case of the first failure. First nodes are left out, with inputs in the place of what they
made. Then what is left is simplified so that it computes something else: that is right for a
builder, which dies of a graph's structure, and wrong for a layer whose values are at fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.graphs.parts import Part, Recording, simpler

Nodes = tuple[int, ...]
Fails = Callable[[Part], bool]


@dataclass(frozen=True)
class Reduced:
    """What a search found.

    Attributes:
        part: The smallest part that fails.
        tries: How many parts were tried.
        minimal: No single node of it can be left out; False where time ran out before that was
            known.
    """

    part: Part
    tries: int
    minimal: bool


def reduce(
    recorded: Recording,
    fails: Fails,
    *,
    seconds: float,
    say: Callable[[str], None],
    anyhow: bool = False,
) -> Reduced | None:
    """Search for few nodes of a graph that fail together.

    Args:
        recorded: The graph.
        fails: Whether a part fails in the way in question.
        seconds: After how long no further part is tried.
        say: Takes a line about what was found.
        anyhow: Also take parts that compute something else, see the module.

    Returns:
        What was found; None if not even the whole fails.
    """
    search = _Search(fails, seconds, say)
    minimal = False
    try:
        if not search.whole(recorded):
            return None
        search.leave_out()
        while anyhow and search.simplify():
            search.leave_out()
        minimal = True
    except _OutOfTimeError:
        say(f"time is over after {search.tries} tries")
    return None if search.part is None else Reduced(search.part, search.tries, minimal)


class _OutOfTimeError(Exception):
    """The time for a search is over."""


class _Search:
    """One search: the smallest part so far, and the way to smaller ones."""

    def __init__(self, fails: Fails, seconds: float, say: Callable[[str], None]) -> None:
        self._fails, self._say = fails, say
        self._deadline = time.monotonic() + seconds
        self._known: dict[Nodes, bool] = {}
        self._tried: dict[bytes, bool] = {}
        self._kept: Nodes = ()
        self.tries = 0
        self.part: Part | None = None

    def whole(self, recorded: Recording) -> bool:
        """Start from all of a graph; whether that fails."""
        self._recorded, self._known = recorded, {}
        return self._keep(range(len(recorded)))

    def leave_out(self) -> None:
        """Cut the end as early as it can be, the beginning as late; then leave pieces out."""
        self._bisect(lambda size: range(size), len(self._recorded))
        kept = self._kept
        self._bisect(lambda size: kept[len(kept) - size :], len(kept))
        self._without_pieces()

    def simplify(self) -> bool:
        """Go on from the first simpler graph that fails; whether there is one."""
        assert self.part is not None
        smallest = self.part
        for model, feeds in simpler(smallest):
            try:
                recorded = Recording(model, feeds)
                part = recorded.part(range(len(recorded)))
            except (ArtifactError, UnsupportedOperatorError):
                continue  # what is left does not fit together
            if part is not None and part.size < smallest.size and self.whole(recorded):
                return True
        return False

    def _keep(self, nodes: Sequence[int]) -> bool:
        """Try a part, each but once; one that fails is kept."""
        key = tuple(nodes)
        if key not in self._known:
            part = self._recorded.part(key)
            self._known[key] = part is not None and self._try(part)
            if self._known[key]:
                self._kept = key
        return self._known[key]

    def _try(self, part: Part) -> bool:
        if self.part is not None and time.monotonic() > self._deadline:
            raise _OutOfTimeError
        text = part.model.SerializeToString(deterministic=True)
        if text not in self._tried:
            self.tries += 1
            self._tried[text] = self._fails(part)
        if not self._tried[text]:
            return False
        if self.part is None or part.size < self.part.size:
            nodes, inputs, _ = part.size
            self._say(f"try {self.tries}: {nodes} nodes with {inputs} inputs fail")
        self.part = part
        return True

    def _bisect(self, candidate: Callable[[int], Sequence[int]], size: int) -> None:
        """Shrink to a candidate of few nodes that fails, `candidate(size)` failing."""
        low, high = 0, size
        while high - low > 1:
            middle = (low + high) // 2
            if self._keep(candidate(middle)):
                high = middle
            else:
                low = middle

    def _without_pieces(self) -> None:
        """Leave pieces out, ever smaller ones, until no single node can go (delta debugging)."""
        pieces = 2
        while len(self._kept) > 1:
            size = -(-len(self._kept) // pieces)
            if self._without_one(size):
                pieces = max(2, pieces - 1)
            elif size == 1:
                return
            else:
                pieces = min(2 * pieces, len(self._kept))

    def _without_one(self, size: int) -> bool:
        kept = self._kept
        # From the end: what comes late reads much, and little reads it.
        starts = reversed(range(0, len(kept), size))
        return any(self._keep(kept[:start] + kept[start + size :]) for start in starts)


def refused_alike(refusal: Callable[[Part], str | None], alike: Callable[[str], bool]) -> Fails:
    """Whether a builder refuses a part for the reason for which it refused all.

    Args:
        refusal: Why the builder does not take a part.
        alike: Whether it is the reason for which it does not take the whole.
    """

    def fails(part: Part) -> bool:
        message = refusal(part)
        return message is not None and alike(message)

    return fails


def jumps(tensor: str, limit: float) -> Fails:
    """Whether a tensor that a part computes is far from the reference's.

    Args:
        tensor: The tensor.
        limit: Relative error from which on it is; NaN and infinity are always.
    """

    def fails(part: Part) -> bool:
        if tensor not in part.expected:
            return False
        try:
            found = GraphExecutor(part.model).evaluate(part.feeds)[tensor]
        except (ArtifactError, UnsupportedOperatorError):
            return False
        return not relative_error(found, part.expected[tensor]) < limit

    return fails


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Euclidean norm of the difference over that of what is expected; NaN for another shape."""
    if found.shape != expected.shape:
        return float("nan")
    with np.errstate(invalid="ignore"):
        difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected)), 1e-30))
