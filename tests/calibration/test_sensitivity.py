"""The exclusion search, on networks whose best answer is known."""

import json
import math
from collections.abc import Callable, Iterable

import pytest

from calibration.sensitivity import Limits, Outcome, search
from pipeline.core.errors import ConfigError, GateFailedError

BASELINE = Outcome(0.9, 1.0, 0.0)
LIMITS = Limits(max_top1_drop=0.01)


class Network:
    """Each quantized group costs accuracy; errors add up in squares."""

    def __init__(self, drops: dict[str, float], errors: dict[str, float] | None = None) -> None:
        self.drops = drops
        self.errors = errors or drops
        self.calls: list[frozenset[str]] = []

    def __call__(self, excluded: frozenset[str]) -> Outcome:
        self.calls.append(excluded)
        quantized = [group for group in self.drops if group not in excluded]
        drop = sum(self.drops[group] for group in quantized)
        error = math.sqrt(sum(self.errors[group] ** 2 for group in quantized))
        return Outcome(0.9 - drop, 1 - drop, error)


def test_nothing_is_excluded_where_everything_holds() -> None:
    network = Network({"a": 0.001, "b": 0.002})
    found = search(["a", "b"], network, baseline=BASELINE, limits=LIMITS, always_rank=False)
    assert found.excluded == frozenset()
    assert found.holds
    assert found.ranking == ()
    assert len(network.calls) == 1


def test_the_table_is_full_even_where_everything_holds() -> None:
    network = Network({"a": 0.001, "b": 0.002})
    found = search(["a", "b"], network, baseline=BASELINE, limits=LIMITS)
    assert [alone.group for alone in found.ranking] == ["b", "a"]
    assert found.ranking[0].top1_drop == pytest.approx(0.002)
    assert found.ranking[0].outcome.top1 == pytest.approx(0.898)


def test_the_harmful_groups_are_excluded() -> None:
    drops = {f"block{i}": 0.0001 for i in range(30)} | {"stem": 0.05, "head": 0.03}
    found = search(list(drops), Network(drops), baseline=BASELINE, limits=LIMITS)
    assert found.excluded == {"stem", "head"}
    assert found.holds
    assert found.outcome.top1 == pytest.approx(0.897)


def test_few_evaluations_are_enough() -> None:
    drops = {f"block{i}": 0.001 * (i + 1) for i in range(64)}
    network = Network(drops)
    found = search(list(drops), network, baseline=BASELINE, limits=LIMITS, refinements=5)
    assert found.holds
    assert len(network.calls) == len(set(network.calls)) == len(found.evaluations)
    assert len(network.calls) <= 1 + 64 + 7 + 5


def test_a_limit_that_is_met_exactly_holds() -> None:
    drops = {"a": 0.01, "b": 0.5}
    found = search(["a", "b"], Network(drops), baseline=BASELINE, limits=LIMITS)
    assert found.excluded == {"b"}


def test_refinement_gives_back_what_was_excluded_needlessly() -> None:
    # By logit error, "loud" comes first, but it costs no accuracy.
    drops = {"loud": 0.0, "bad": 0.05, "fine": 0.001}
    errors = {"loud": 0.9, "bad": 0.5, "fine": 0.1}
    found = search(list(drops), Network(drops, errors), baseline=BASELINE, limits=LIMITS)
    assert found.excluded == {"bad"}
    none = search(
        list(drops), Network(drops, errors), baseline=BASELINE, limits=LIMITS, refinements=0
    )
    assert none.excluded == {"loud", "bad"}


def test_of_equally_harmful_groups_the_less_useful_is_excluded() -> None:
    drops = {"slow": 0.008, "fast": 0.008}
    found = search(
        list(drops), Network(drops), baseline=BASELINE, limits=LIMITS, benefit={"slow": 3.0}
    )
    assert found.excluded == {"fast"}


def test_agreement_may_be_limited_too() -> None:
    limits = Limits(max_top1_drop=1.0, min_agreement=0.98)
    drops = {"a": 0.015, "b": 0.03}
    found = search(list(drops), Network(drops), baseline=BASELINE, limits=limits)
    assert found.excluded == {"b"}


def test_a_group_that_gives_nan_is_excluded_first() -> None:
    network = Network({"a": 0.004, "b": 0.005, "nan": 0.0})

    def evaluate(excluded: frozenset[str]) -> Outcome:
        outcome = network(excluded)
        return outcome if "nan" in excluded else Outcome(outcome.top1, 0.1, math.nan)

    found = search(["a", "b", "nan"], evaluate, baseline=BASELINE, limits=LIMITS)
    assert found.ranking[0].group == "nan"
    assert found.excluded == {"nan"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_limits_that_cannot_hold_are_reported() -> None:
    def bad(excluded: Iterable[str]) -> Outcome:
        return Outcome(0.5, 0.5, 1.0)

    found = search(["a", "b"], bad, baseline=BASELINE, limits=LIMITS)
    assert not found.holds
    assert found.excluded == {"a", "b"}
    with pytest.raises(GateFailedError, match=r"loses 40\.00 points .* even with 2 groups"):
        found.require()


def test_require_accepts_what_holds() -> None:
    search(["a"], Network({"a": 0.0}), baseline=BASELINE, limits=LIMITS).require()


def test_the_result_is_plain_and_deterministic() -> None:
    drops = {f"g{i}": 0.004 for i in range(5)}

    def once() -> str:
        found = search(list(drops), Network(drops), baseline=BASELINE, limits=LIMITS)
        return json.dumps(found.to_dict())

    assert once() == once()
    plain = json.loads(once())
    assert plain["holds"] is True
    assert len(plain["excluded"]) == 3
    assert [row["group"] for row in plain["ranking"]] == list(drops)
    assert plain["evaluations"][0]["excluded"] == []


def test_what_was_returned_was_evaluated() -> None:
    # Not monotone: a longer part of the ranking may be worse. The answer still holds.
    def evaluate(excluded: frozenset[str]) -> Outcome:
        good = len(excluded) in (1, 4, 5)
        return Outcome(0.9 if good else 0.5, 1.0, 1.0 / (1 + len(excluded)))

    found = search(list("abcde"), evaluate, baseline=BASELINE, limits=LIMITS)
    assert found.holds
    assert evaluate(found.excluded).top1 == 0.9


@pytest.mark.parametrize(
    ("groups", "benefit", "reason"),
    [
        ([], {}, "no groups"),
        (["a", "a"], {}, "occurs twice"),
        (["a"], {"a": 0.0}, "of no use"),
        (["a"], {"a": math.nan}, "of no use"),
    ],
)
def test_bad_questions(groups: list[str], benefit: dict[str, float], reason: str) -> None:
    evaluate: Callable[[frozenset[str]], Outcome] = Network({"a": 0.0})
    with pytest.raises(ConfigError, match=reason):
        search(groups, evaluate, baseline=BASELINE, limits=LIMITS, benefit=benefit)


@pytest.mark.parametrize(("drop", "agreement"), [(-0.1, 0), (1.5, 0), (0.1, 2), (math.nan, 0)])
def test_bad_limits(drop: float, agreement: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Limits(drop, agreement)


def test_an_error_may_be_limited_too() -> None:
    limits = Limits(max_top1_drop=1.0, max_error=0.1)
    assert limits.hold(Outcome(0.9, 1.0, 0.1), BASELINE)
    assert not limits.hold(Outcome(0.9, 1.0, 0.11), BASELINE)
    assert not limits.hold(Outcome(0.9, 1.0, math.nan), BASELINE)
    assert limits.to_dict() == {"max_top1_drop": 1.0, "min_agreement": 0.0, "max_error": 0.1}
    assert Limits(max_top1_drop=1.0).to_dict() == {"max_top1_drop": 1.0, "min_agreement": 0.0}
    with pytest.raises(ConfigError, match="max_error is not below 0"):
        Limits(max_top1_drop=1.0, max_error=math.nan)
