"""Threads wait actively where that costs little beside others, then briefly, then not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import machine
from pipeline.core.figures import Ratio
from pipeline.core.network import Images
from pipeline.targets.ort import tune, waiting
from pipeline.targets.ort.session import LONG_SPIN_US, SPIN_US, Settings, limits_spinning, runtime
from pipeline.targets.ort.tune import Candidate, Choice, Trial
from pipeline.targets.ort.waiting import other_waits
from tests.pipeline.targets.ort.small import build, save

LONG, BRIEF, ASLEEP = LONG_SPIN_US, SPIN_US, 0
QUIET: Mapping[int, float] = {LONG: 1.0, BRIEF: 1.05, ASLEEP: 1.2}
ENDS = {LONG: ", spinning long", BRIEF: "", ASLEEP: ", no spinning"}

needs_duration = pytest.mark.skipif(
    not limits_spinning(runtime().__version__), reason="this ONNX Runtime knows no duration"
)


def waited(session: Any) -> int:
    """For how many microseconds the threads of a session wait actively."""
    options = session.get_session_options()
    if options.get_session_config_entry("session.intra_op.allow_spinning") == "0":
        return ASLEEP
    if not limits_spinning(runtime().__version__):
        return BRIEF
    return int(options.get_session_config_entry("session.intra_op.spin_duration_us"))


def built(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: Mapping[int, float],
    beside: Mapping[int, float],
    doubt: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """What a build says that calls take so long, by how long threads wait actively.

    Args:
        folder: An empty one.
        monkeypatch: Pytest's.
        quiet: Milliseconds on a quiet machine.
        beside: And beside other processes.
        doubt: By how much times differ there, in turn.
        options: Of the target.
    """
    save(folder / "a.onnx", 1.0)
    beside_others: list[int] = []

    @contextmanager
    def contended(count: int) -> Iterator[None]:
        beside_others.append(count)
        yield
        beside_others.pop()

    def times(
        sessions: Mapping[str, Any], images: Images, seconds: float
    ) -> dict[str, list[float]]:
        busy = beside_others[-1] > 0
        swing = doubt if busy else 0.0
        return {
            name: [
                (beside if busy else quiet)[waited(session)] + swing * (group % 3 - 1)
                for group in range(10)
                for _ in range(9)
            ]
            for name, session in sessions.items()
        }

    monkeypatch.setattr(machine, "granted", lambda: 2)
    monkeypatch.setattr(tune, "contended", contended)
    monkeypatch.setattr(tune, "interleave", times)
    return build(folder, threads=2, **options)


def waits(facts: Mapping[str, Any]) -> int:
    """What a build chose."""
    session = facts["session"]
    return int(session["spin_us"]) if session["spinning"] else ASLEEP


@needs_duration
@pytest.mark.parametrize(
    ("beside", "doubt", "chosen", "tried"),
    [
        pytest.param({LONG: 1.9, BRIEF: 1.5}, 0.0, LONG, 1, id="less than twice as long"),
        pytest.param({LONG: 2.1, BRIEF: 1.5}, 0.0, BRIEF, 1, id="little more than twice as long"),
        pytest.param({LONG: 2.1, BRIEF: 1.5}, 0.2, LONG, 1, id="perhaps more than twice as long"),
        pytest.param({LONG: 3.0, BRIEF: 1.9}, 0.0, BRIEF, 1, id="briefly keeps the limit"),
        pytest.param({LONG: 3.0, BRIEF: 2.1, ASLEEP: 1.9}, 0.0, ASLEEP, 2, id="asleep alone does"),
        pytest.param({LONG: 3.0, BRIEF: 2.2, ASLEEP: 2.1}, 0.0, BRIEF, 2, id="none keeps it"),
        pytest.param({LONG: 3.0, BRIEF: 2.2, ASLEEP: 2.6}, 0.0, BRIEF, 2, id="asleep gains less"),
        pytest.param({LONG: 3.0, BRIEF: 2.9, ASLEEP: 2.4}, 0.0, ASLEEP, 2, id="briefly does not"),
        pytest.param({LONG: 3.0, BRIEF: 2.9, ASLEEP: 2.9}, 0.5, LONG, 2, id="in doubt"),
        pytest.param({LONG: 3.0, BRIEF: 3.5, ASLEEP: 3.5}, 0.0, LONG, 2, id="all take longer"),
    ],
)
def test_threads_wait_as_actively_as_others_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beside: Mapping[int, float],
    doubt: float,
    chosen: int,
    tried: int,
) -> None:
    facts = built(tmp_path, monkeypatch, QUIET, beside, doubt)
    assert waits(facts) == chosen
    tuning = facts["tuning"]
    file = tuning["files"]["chosen"] if "files" in tuning else "portable"
    names = [f"{file}{end}" for end in ENDS.values()]
    assert set(names) == set(tuning["settings"]["candidates"]) - {"portable, openvino"}
    found = tuning["contended"]
    assert [list(one["candidates"]) for one in found] == [
        [names[0], name] for name in names[1 : 1 + tried]
    ]
    assert [one["costs_when_quiet"] for one in found] == [1.05, 1.2][:tried]
    assert {one["times_the_quiet"] for one in found} == {beside[LONG]}
    assert {one["rivals"] for one in found} == {1}
    assert tuning["chosen"] == found[-1]["chosen"] == f"{file}{ENDS[chosen]}"


@needs_duration
@pytest.mark.parametrize(("asleep", "chosen"), [(1.25, ASLEEP), (1.3, LONG)])
def test_what_costs_too_much_on_a_quiet_machine_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asleep: float, chosen: int
) -> None:
    beside = {LONG: 3.0, BRIEF: 2.95, ASLEEP: 1.5}
    assert waits(built(tmp_path, monkeypatch, {**QUIET, ASLEEP: asleep}, beside)) == chosen


def test_threads_wait_for_a_moment_unless_another_way_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = dict.fromkeys(ENDS, 1.0)
    facts = built(tmp_path, monkeypatch, same, same)
    assert waits(facts) == BRIEF
    (found,) = facts["tuning"]["contended"]
    assert (found["times_the_quiet"], found["costs_when_quiet"]) == (1.0, 1.0)


def test_an_older_runtime_is_asked_for_sleep_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "limits_spinning", lambda version: False)
    facts = built(tmp_path, monkeypatch, QUIET, {BRIEF: 3.0, ASLEEP: 1.5})
    assert waits(facts) == ASLEEP
    asked = facts["tuning"]["settings"]["chosen"]
    (found,) = facts["tuning"]["contended"]
    assert list(found["candidates"]) == [asked, f"{asked}, no spinning"]
    assert found["costs_when_quiet"] == round(1.2 / 1.05, 4)


@needs_duration
@pytest.mark.parametrize(
    ("quiet", "first", "cost"),
    [
        pytest.param({LONG: 1.0, BRIEF: 1.1, ASLEEP: 1.6}, LONG, 1.1, id="long is fastest"),
        pytest.param({LONG: 1.1, BRIEF: 1.0, ASLEEP: 1.6}, BRIEF, 1.6, id="a moment is"),
    ],
)
def test_threads_that_were_asked_to_sleep_wait_actively_where_that_is_faster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: Mapping[int, float],
    first: int,
    cost: float,
) -> None:
    facts = built(tmp_path, monkeypatch, quiet, dict.fromkeys(ENDS, 1.5), allow_spinning=False)
    assert waits(facts) == first
    (found,) = facts["tuning"]["contended"]
    assert found["costs_when_quiet"] == cost


def test_threads_are_left_as_asked_for_on_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.Watch, "others", lambda self: 1.5)
    times = {LONG: 1.0, BRIEF: 2.0, ASLEEP: 1.0}
    facts = built(tmp_path, monkeypatch, times, {LONG: 1.0, BRIEF: 9.0, ASLEEP: 1.0})
    assert waits(facts) == BRIEF
    assert "contended" not in facts["tuning"]
    assert facts["tuning"]["settings"]["invalid"] == "other processes kept 1.5 of 2 CPUs busy"


def test_what_others_take_beside_rivals_leaves_threads_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = tune.Trial.measure

    def measured(trial: Trial) -> tune.Comparison:
        return replace(measure(trial), others=1.5 if trial.rivals else 0.0)

    monkeypatch.setattr(tune.Trial, "measure", measured)
    facts = built(tmp_path, monkeypatch, QUIET, {LONG: 9.0, BRIEF: 1.0, ASLEEP: 1.0})
    assert waits(facts) == LONG
    assert all("invalid" in one for one in facts["tuning"]["contended"])


def test_there_is_time_for_enough_samples_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: dict[int, set[float]] = {0: set(), 1: set()}
    measure = tune.Trial.measure

    def noted(trial: Trial) -> tune.Comparison:
        seconds[trial.rivals].add(trial.seconds)
        return measure(trial)

    monkeypatch.setattr(tune.Trial, "measure", noted)
    built(tmp_path, monkeypatch, QUIET, {LONG: 3.0, BRIEF: 1.0, ASLEEP: 1.0})
    (alone,), (beside,) = seconds[0], seconds[1]
    assert beside == 8 * alone


def test_what_sleeps_when_quiet_is_not_asked_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {LONG: 2.0, BRIEF: 2.0, ASLEEP: 1.0}
    facts = built(tmp_path, monkeypatch, times, {LONG: 1.0, BRIEF: 1.0, ASLEEP: 9.0})
    assert waits(facts) == ASLEEP
    assert "contended" not in facts["tuning"]


@needs_duration
def test_what_is_set_beside_waiting_costs_nothing_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros for denormals are faster alone; threads that wait otherwise are compared with them."""
    asked = Candidate("a.onnx", Settings())
    flush = replace(asked, settings=replace(asked.settings, entries={"flush": "1"}))
    ways = {"a": asked, **other_waits("a", asked), "a, flush": flush}
    ratios = {name: Ratio(1.5 if "no" in name else 1.1, (1.0, 2.0)) for name in ways}
    quiet = Choice("a, flush", dict.fromkeys(ways, 1.0), ratios, 9, "a, flush")
    asleep = replace(flush, settings=replace(flush.settings, spinning=False))
    assert waiting._cost_when_quiet(quiet, ways, asleep) == ratios["a, no spinning"]
    # What others took beside the first is known from it already.
    longer = replace(quiet, name="a, spinning long")
    assert waiting._cost_when_quiet(longer, ways, asked) == ratios["a, spinning long"].inverse
    product = ratios["a, no spinning"].times(ratios["a, spinning long"].inverse)
    assert waiting._cost_when_quiet(longer, ways, asleep) == product
    compared: list[Mapping[str, Candidate]] = []

    def found(trial: Trial, kept: object) -> Choice:
        compared.append(trial.candidates)
        same = Ratio(1.0, (1.0, 1.0))
        names = list(trial.candidates)
        return Choice(names[0], dict.fromkeys(names, 9.0), dict.fromkeys(names, same), 9, names[0])

    monkeypatch.setattr(waiting, "choose", found)
    trial = Trial(tmp_path, ways, 2, (), 1.0, 1)  # type: ignore[arg-type]
    name, way, _ = waiting.choose_beside_others(trial, quiet, lambda line: None)
    assert (name, way) == ("a, flush", flush)
    assert all(one["a, flush"] == flush for one in compared)
    assert compared[-1]["a, flush, no spinning"] == asleep
