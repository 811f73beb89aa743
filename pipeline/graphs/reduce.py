"""The smallest part of a graph that still fails: with which a builder dies, or a layer jumps.

    kept = smallest(len(recorded), fails, deadline, say)

A candidate fails if it fails in the same way: a part that is refused for another reason is no
smaller case of the first failure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.graphs.parts import Part, Recording

Nodes = tuple[int, ...]

_OF_THIS_PART = (
    (r"\{[^}]*\}|'[^']*'|\"[^\"]*\"", "…"),
    (r"\S*/\S*", "…"),
    (r"\d+", "#"),
)
"""What changes in a message from part to part: names of nodes, paths, numbers."""


def signature(message: str) -> str:
    """What of a builder's message tells one failure from another."""
    for pattern, text in _OF_THIS_PART:
        message = re.sub(pattern, text, message)
    return message


@dataclass(frozen=True)
class Reduced:
    """What a search found.

    Attributes:
        nodes: Places of the nodes of the smallest part that fails.
        tries: How many parts were tried.
        minimal: No single node of it can be left out; False where time ran out before that was seen.
    """

    nodes: Nodes
    tries: int
    minimal: bool


class OutOfTimeError(Exception):
    """The time for a search is over."""


class _Search:
    """One search.

    Args:
        fails: Whether a part that holds the nodes at these places fails.
        seconds: After how long no further part is tried.
        say: Takes a line about what was found.
    """

    def __init__(
        self, fails: Callable[[Nodes], bool], seconds: float, say: Callable[[str], None]
    ) -> None:
        self._fails, self._say = fails, say
        self._deadline = time.monotonic() + seconds
        self._known: dict[Nodes, bool] = {}
        self.kept: Nodes = ()

    @property
    def tries(self) -> int:
        return len(self._known)

    def fails(self, nodes: Sequence[int]) -> bool:
        """Try a part, each but once; one that fails is kept."""
        key = tuple(nodes)
        if key not in self._known:
            if time.monotonic() > self._deadline:
                raise OutOfTimeError
            self._known[key] = bool(key) and self._fails(key)
            if self._known[key]:
                self._say(f"try {self.tries}: {len(key)} nodes fail")
        if self._known[key]:
            self.kept = key
        return self._known[key]

    def bisect(self, part: Callable[[int], Sequence[int]], size: int) -> None:
        """Shrink to a part of few nodes that fails, of those that `part` gives for 1 to `size`."""
        low, high = 0, size
        while high - low > 1:
            middle = (low + high) // 2
            if self.fails(part(middle)):
                high = middle
            else:
                low = middle

    def without_pieces(self) -> None:
        """Leave pieces out, ever smaller ones, until no single node can go (delta debugging)."""
        pieces = 2
        while len(self.kept) > 1:
            size = -(-len(self.kept) // pieces)
            if self._leave_one_out(size):
                pieces = max(2, pieces - 1)
            elif size == 1:
                return
            else:
                pieces = min(2 * pieces, len(self.kept))

    def _leave_one_out(self, size: int) -> bool:
        kept = self.kept
        # From the end: what comes late reads much, and little reads it.
        starts = reversed(range(0, len(kept), size))
        return any(self.fails(kept[:start] + kept[start + size :]) for start in starts)


def smallest(
    count: int, fails: Callable[[Nodes], bool], seconds: float, say: Callable[[str], None]
) -> Reduced | None:
    """Search for few nodes of a graph that fail together.

    The end is cut as early as it can be, the beginning as late; then pieces between are left out.

    Args:
        count: Nodes of the graph, in an order in which each follows those that it reads from.
        fails: Whether a part that holds the nodes at these places, in order, fails.
        seconds: After how long no further part is tried.
        say: Takes a line about what was found.

    Returns:
        What was found; None if not even all nodes fail.
    """
    search = _Search(fails, seconds, say)
    minimal = False
    try:
        if not search.fails(range(count)):
            return None
        search.bisect(lambda end: range(end), count)
        kept = search.kept
        search.bisect(lambda size: kept[len(kept) - size :], len(kept))
        search.without_pieces()
        minimal = True
    except OutOfTimeError:
        say(f"time is over after {search.tries} tries")
    return Reduced(search.kept, search.tries, minimal) if search.kept else None


def refused_alike(
    recorded: Recording, refusal: Callable[[Part], str | None], first: str
) -> Callable[[Nodes], bool]:
    """For `smallest`: whether a builder refuses a part for the reason for which it refused all.

    Args:
        recorded: The graph.
        refusal: Why the builder does not take a part.
        first: Why it does not take the whole.
    """
    wanted = signature(first)

    def fails(nodes: Nodes) -> bool:
        part = recorded.part(nodes)
        message = refusal(part) if part is not None else None
        return message is not None and signature(message) == wanted

    return fails


def jumps(recorded: Recording, tensor: str, limit: float) -> Callable[[Nodes], bool]:
    """For `smallest`: whether a tensor that a part computes is far from the reference's.

    Args:
        recorded: The graph, recorded beside its reference.
        tensor: The tensor.
        limit: Relative error from which on it is; NaN and infinity are always.
    """

    def fails(nodes: Nodes) -> bool:
        part = recorded.part(nodes)
        if part is None or tensor not in part.expected:
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
