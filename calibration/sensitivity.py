"""Which parts of a network must stay in float for an accuracy limit to hold.

    found = search(blocks, evaluate, baseline=baseline, limits=Limits(max_top1_drop=0.003))
    build(excluded=found.excluded)

Every group is quantized alone and ranked by its harm. The least number of groups from the top of
the ranking that must stay in float is found by bisection; then groups that may have been excluded
needlessly are tried again. The search knows nothing of runtimes: it calls `evaluate` and remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core.errors import ConfigError, GateFailedError

Groups = frozenset[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a network does with some of its groups quantized.

    Attributes:
        top1: Share of images with the right class, 0 to 1.
        agreement: Share of images with the float network's class, 0 to 1.
        logit_error: Distance of the logits from the float network's, relative to their norm.
    """

    top1: float
    agreement: float
    logit_error: float

    @property
    def finite(self) -> bool:
        """No figure is NaN or infinite."""
        return all(math.isfinite(x) for x in (self.top1, self.agreement, self.logit_error))


@dataclass(frozen=True, slots=True)
class Limits:
    """What must hold.

    Attributes:
        max_top1_drop: Most top-1 accuracy that may be lost, as a share: 0.003 is 0.3 points.
        min_agreement: Least share of images with the float network's class. On few images it
            tells more than accuracy, in which wrong answers that become right hide others.
        max_error: Largest error of the logits; None for any.

    Raises:
        ConfigError: A share is not between 0 and 1, or the error is below 0.
    """

    max_top1_drop: float
    min_agreement: float = 0.0
    max_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_top1_drop", "min_agreement"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, not {value}")
        if self.max_error is not None and not self.max_error >= 0:
            raise ConfigError(f"max_error is not below 0, as {self.max_error} is")

    def hold(self, outcome: Outcome, baseline: Outcome) -> bool:
        """Whether an outcome is good enough; one that is not finite never is."""
        # Shares of whole images: without a margin, rounding would decide about equality.
        drop = baseline.top1 - outcome.top1
        return (
            outcome.finite
            and drop <= self.max_top1_drop + 1e-9
            and outcome.agreement >= self.min_agreement - 1e-9
            and (self.max_error is None or outcome.logit_error <= self.max_error)
        )

    def to_dict(self) -> dict[str, float]:
        """Plain values; a limit that is none is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Alone:
    """What quantizing a single group does.

    Attributes:
        group: Its name.
        outcome: With this group quantized and all others in float.
        top1_drop: Lost top-1 accuracy, as a share.
        benefit: What quantizing it is worth, as given to the search.
        harm: Squared logit error by benefit; the ranking goes from the largest.
    """

    group: str
    outcome: Outcome
    top1_drop: float
    benefit: float
    harm: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of `evaluate` and whether the limits held."""

    excluded: Groups
    outcome: Outcome
    holds: bool


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        excluded: The groups that stay in float.
        outcome: With them excluded.
        baseline: Of the float network.
        limits: What was asked for.
        holds: The limits hold.
        ranking: Every group alone, the most harmful first; empty where no ranking was needed.
        evaluations: Everything that was evaluated, in order.
    """

    excluded: Groups
    outcome: Outcome
    baseline: Outcome
    limits: Limits
    holds: bool
    ranking: tuple[Alone, ...]
    evaluations: tuple[Evaluation, ...]

    def require(self) -> None:
        """Raise GateFailedError if the limits do not hold."""
        if not self.holds:
            drop = 100 * (self.baseline.top1 - self.outcome.top1)
            raise GateFailedError(
                f"the quantized network loses {drop:.2f} points of top-1 and agrees on "
                f"{self.outcome.agreement:.1%} of images even with {len(self.excluded)} groups in "
                f"float, where {100 * self.limits.max_top1_drop:.2f} points and "
                f"{self.limits.min_agreement:.1%} are allowed: use a wider precision"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        return {
            "excluded": sorted(self.excluded),
            "outcome": _plain(self.outcome),
            "baseline": _plain(self.baseline),
            "limits": self.limits.to_dict(),
            "holds": self.holds,
            "ranking": [
                {
                    "group": alone.group,
                    **_plain(alone.outcome),
                    "top1_drop": _finite(alone.top1_drop),
                    "benefit": alone.benefit,
                }
                for alone in self.ranking
            ],
            "evaluations": [
                {"excluded": sorted(e.excluded), **_plain(e.outcome), "holds": e.holds}
                for e in self.evaluations
            ],
        }


def _plain(outcome: Outcome) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in asdict(outcome).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class _Memory:
    """Evaluates each set of excluded groups once."""

    evaluate: Callable[[Groups], Outcome]
    limits: Limits
    baseline: Outcome
    seen: dict[Groups, Evaluation] = field(default_factory=dict)

    def __call__(self, excluded: Groups) -> Evaluation:
        if excluded not in self.seen:
            outcome = self.evaluate(excluded)
            holds = self.limits.hold(outcome, self.baseline)
            self.seen[excluded] = Evaluation(excluded, outcome, holds)
        return self.seen[excluded]


def search(
    groups: Sequence[str],
    evaluate: Callable[[Groups], Outcome],
    *,
    baseline: Outcome,
    limits: Limits,
    benefit: Mapping[str, float] | None = None,
    always_rank: bool = True,
    refinements: int = 8,
) -> Search:
    """Find a small set of groups that must stay in float for the limits to hold.

    It takes one evaluation for everything quantized, one for each group, about log2(groups) for
    the bisection and at most `refinements` more. The bisection takes for granted that a longer
    part of the ranking is no worse than a shorter one; what it returns was evaluated in any case.

    Args:
        groups: Names of layers or blocks, in the order of the network.
        evaluate: Gives the outcome with these groups excluded, on images of the training split.
        baseline: Outcome of the float network on the same images.
        limits: What must hold.
        benefit: What quantizing a group is worth, such as saved milliseconds; 1 where not given.
            Of two groups with equal error the less useful one is excluded first.
        always_rank: Measure every group even where nothing needs to be excluded, for the report.
        refinements: Most evaluations that try to quantize an excluded group after all.

    Raises:
        ConfigError: There are no groups, a name occurs twice, or a benefit is not positive.
    """
    worth = _benefits(groups, benefit or {})
    remember = _Memory(evaluate, limits, baseline)
    everything = remember(frozenset())
    ranking: tuple[Alone, ...] = ()
    best = everything
    if always_rank or not everything.holds:
        ranking = _rank(groups, remember, worth)
    if not everything.holds:
        order = [alone.group for alone in ranking]
        best = _bisect(order, remember)
        if best.holds:
            best = _refine(best, order, remember, refinements)
    return Search(
        best.excluded,
        best.outcome,
        baseline,
        limits,
        best.holds,
        ranking,
        tuple(remember.seen.values()),
    )


def _benefits(groups: Sequence[str], benefit: Mapping[str, float]) -> dict[str, float]:
    if not groups:
        raise ConfigError("there are no groups of layers to choose from: name at least one")
    if len(set(groups)) != len(groups):
        twice = next(group for group in groups if groups.count(group) > 1)
        raise ConfigError(f"the group {twice} occurs twice: name every group once")
    worth = {group: float(benefit.get(group, 1.0)) for group in groups}
    for group, value in worth.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"the benefit of {group} is {value}: leave out what is of no use")
    return worth


def _rank(
    groups: Sequence[str], remember: _Memory, worth: Mapping[str, float]
) -> tuple[Alone, ...]:
    everything = frozenset(groups)
    table = []
    for group in groups:
        outcome = remember(everything - {group}).outcome
        drop = remember.baseline.top1 - outcome.top1
        # Errors of independent groups add up in squares, so harm is the square.
        harm = outcome.logit_error**2 / worth[group] if outcome.finite else math.inf
        table.append(Alone(group, outcome, drop, worth[group], harm))
    return tuple(sorted(table, key=lambda alone: -alone.harm))


def _bisect(order: Sequence[str], remember: _Memory) -> Evaluation:
    """Exclude the shortest part of the ranking with which the limits hold."""
    fails, holds = 0, len(order)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if remember(frozenset(order[:middle])).holds:
            holds = middle
        else:
            fails = middle
    return remember(frozenset(order[:holds]))


def _refine(
    best: Evaluation, order: Sequence[str], remember: _Memory, refinements: int
) -> Evaluation:
    """Quantize excluded groups after all where the limits still hold, the least harmful first."""
    tried = 0
    for group in reversed([name for name in order if name in best.excluded]):
        candidate = best.excluded - {group}
        if candidate not in remember.seen:
            if tried == refinements:
                break
            tried += 1
        if (evaluation := remember(candidate)).holds:
            best = evaluation
    return best
