"""Tuning that was killed goes on with the next comparison."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration.kept import MARK, Kept
from calibration.sensitivity import Outcome
from pipeline.core import machine
from pipeline.core.network import Images
from pipeline.targets.ort import tune
from pipeline.targets.ort.session import Settings, runtime
from pipeline.targets.ort.tune import Candidate, Choice, Trial, choose, interleave
from tests.pipeline.targets.ort.small import build, save

IMAGES = np.zeros((1, 1, 1, 2), np.float32)
WAYS = {"a": Candidate("a.onnx", Settings()), "b": Candidate("b.onnx", Settings())}
TIMES: Mapping[str, list[float]] = {
    "a": [2.0, 2.1, 2.2] * 20,
    "b": [1.0, 1.0 + 1 / 3, 1.1] * 20,
}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The comparisons that are measured, by their candidates; two models lie in the folder."""
    save(tmp_path / "a.onnx", 1.0)
    save(tmp_path / "b.onnx", 2.0)
    found: list[tuple[str, ...]] = []

    def times(
        sessions: Mapping[str, Any], images: Images, seconds: float
    ) -> dict[str, list[float]]:
        found.append(tuple(sessions))
        return {name: TIMES[name] for name in sessions}

    monkeypatch.setattr(tune, "interleave", times)
    return found


def chosen(folder: Path, **changes: Any) -> Choice:
    """A choice between two ways, with what an earlier one kept."""
    asked: dict[str, Any] = {"candidates": WAYS, "threads": 1, "images": IMAGES, "seconds": 1.0}
    margin = changes.pop("margin", 0.0)
    trial = Trial(folder, **{**asked, **changes})
    return choose(trial, margin, Kept(folder / "kept.jsonl"))


def test_a_finished_comparison_is_not_measured_again(
    tmp_path: Path, measured: list[tuple[str, ...]]
) -> None:
    first = chosen(tmp_path)
    assert (first.name, first.samples, first.fastest) == ("b", 60, "b")
    assert chosen(tmp_path) == first
    assert measured == [("a", "b")]


def test_a_choice_is_made_anew_from_what_was_measured(
    tmp_path: Path, measured: list[tuple[str, ...]]
) -> None:
    assert chosen(tmp_path).name == "b"
    assert chosen(tmp_path, margin=0.9).name == "a"
    assert measured == [("a", "b")]


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2},
        {"seconds": 2.0},
        {"images": IMAGES + 1},
        {"images": np.zeros((2, 1, 1, 2), np.float32)},
        {"candidates": {**WAYS, "b": Candidate("b.onnx", Settings(level="basic"))}},
        {"candidates": dict(reversed(WAYS.items()))},
        {"candidates": {"a": WAYS["a"]}},
    ],
)
def test_another_comparison_is_measured(
    tmp_path: Path, measured: list[tuple[str, ...]], changes: dict[str, Any]
) -> None:
    chosen(tmp_path)
    chosen(tmp_path, **changes)
    assert measured == [("a", "b"), tuple(changes.get("candidates", WAYS))]


def test_another_graph_machine_runtime_or_number_of_calls_is_measured(
    tmp_path: Path, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(tmp_path)
    save(tmp_path / "b.onnx", 3.0)
    chosen(tmp_path)
    monkeypatch.setattr(tune, "cpu_class", lambda: {"cpu": "another"})
    chosen(tmp_path)
    monkeypatch.setattr(runtime(), "__version__", "1.99.0")
    chosen(tmp_path)
    monkeypatch.setattr(tune, "MOST_CALLS", 30)
    chosen(tmp_path)
    monkeypatch.setattr(tune, "SETTLED", 0.01)
    chosen(tmp_path)
    assert len(measured) == 6
    chosen(tmp_path)
    assert len(measured) == 6


def test_what_was_cut_off_is_measured_again(
    tmp_path: Path, measured: list[tuple[str, ...]]
) -> None:
    first = chosen(tmp_path)
    path = tmp_path / "kept.jsonl"
    path.write_text(path.read_text()[:-9])
    assert chosen(tmp_path) == first
    assert len(measured) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"samples": 60', '"samples": "many"'),
        lambda text: text.replace('"samples": 60', '"more": 1, "samples": 60'),
        lambda text: text.replace('{"a": 2.1, "b": 1.1}', '{"a": 2.1}'),
        lambda text: text.replace('{"a": 2.1, "b": 1.1}', "5"),
    ],
)
def test_what_is_no_comparison_is_measured_again(
    tmp_path: Path, measured: list[tuple[str, ...]], change: Callable[[str], str]
) -> None:
    first = chosen(tmp_path)
    path = tmp_path / "kept.jsonl"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    assert chosen(tmp_path) == first
    assert len(measured) == 2


def test_outcomes_lie_beside_comparisons(tmp_path: Path, measured: list[tuple[str, ...]]) -> None:
    chosen(tmp_path)
    path = tmp_path / "kept.jsonl"
    Kept(path).outcome("a graph", lambda: Outcome(0.5, 0.6, 0.7))
    chosen(tmp_path)
    assert measured == [("a", "b")]
    found = Kept(path).outcome("a graph", lambda: pytest.fail("it is known"))
    assert found == Outcome(0.5, 0.6, 0.7)
    assert path.read_text().splitlines()[0] == MARK


class Session:
    """Answers at once, and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image")]

    def run(self, outputs: None, feeds: Mapping[str, Images]) -> None:
        self.calls += 1


def test_a_comparison_ends_with_enough_calls_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "settle", lambda call: call())
    monkeypatch.setattr(tune, "MOST_CALLS", 30)
    times = interleave({"a": Session(), "b": Session()}, IMAGES, seconds=1e6)
    assert [len(each) for each in times.values()] == [30, 30]


@pytest.mark.parametrize(("settled", "calls"), [(1e9, 66), (1e-9, 90)])
def test_a_comparison_ends_once_all_medians_are_settled(
    monkeypatch: pytest.MonkeyPatch, settled: float, calls: int
) -> None:
    monkeypatch.setattr(tune, "settle", lambda call: call())
    monkeypatch.setattr(tune, "SETTLED", settled)
    times = interleave({"a": Session(), "b": Session()}, IMAGES, seconds=1e6)
    assert [len(each) for each in times.values()] == [calls, calls]


def test_a_comparison_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "settle", lambda call: call())
    session = Session()
    times = interleave({"a": session}, IMAGES, seconds=0.0)
    assert len(times["a"]) == tune.MIN_ROUNDS * 3
    assert session.calls == tune.WARMUP + tune.MIN_ROUNDS * 4  # one of each round does not count


KILLED = """\
import os, signal, sys
from pathlib import Path
from pipeline.targets.ort import tune
from tests.pipeline.targets.ort.small import build

interleave, calls = tune.interleave, []

def second_is_killed(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return interleave(*arguments)

tune.interleave = second_is_killed
build(Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_build_that_was_killed_goes_on_with_the_next_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.onnx", 1.0)
    root = Path(__file__).parents[4]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _, line = (tmp_path / "kept" / "build.jsonl").read_text().splitlines()
    measured: list[tuple[str, ...]] = []
    interleave = tune.interleave

    def counted(sessions: Any, images: Images, seconds: float) -> dict[str, list[float]]:
        measured.append(tuple(sessions))
        return interleave(sessions, images, seconds)

    monkeypatch.setattr(tune, "interleave", counted)
    tuning = build(tmp_path)["tuning"]
    assert set(tuning) == {"files", "chosen", "settings"}
    assert measured == [tuple(tuning["settings"]["candidates"])]
    medians = {name: way["p50_ms"] for name, way in tuning["files"]["candidates"].items()}
    assert medians == {name: round(ms, 4) for name, ms in json.loads(line)["medians"].items()}


@pytest.mark.parametrize(("calls", "best"), [(5, "a"), (6, "b")])
def test_few_samples_prove_nothing(
    tmp_path: Path,
    measured: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    best: str,
) -> None:
    """A single one has an interval without any width."""
    monkeypatch.setattr(tune, "interleave", lambda *_: {"a": [2.0] * calls, "b": [1.0] * calls})
    choice = chosen(tmp_path)
    assert (choice.name, choice.fastest, choice.samples) == (best, "b", calls)
    slow = {name: [time] * 9 * calls for name, time in (("a", 2.0), ("b", 1.0))}
    monkeypatch.setattr(tune, "interleave", lambda *_: slow)
    assert chosen(tmp_path, rivals=1).name == best


@pytest.mark.parametrize(("others", "best"), [(1.0, "b"), (1.1, "a")])
def test_a_busy_machine_chooses_nothing(
    tmp_path: Path,
    measured: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    others: float,
    best: str,
) -> None:
    monkeypatch.setattr(machine, "granted", lambda: 2)
    monkeypatch.setattr(machine.Watch, "others", lambda self: others)
    choice = chosen(tmp_path)
    assert (choice.name, choice.fastest) == (best, "b")
    told = {} if best == "b" else {"invalid": "other processes kept 1.1 of 2 CPUs busy"}
    assert {k: v for k, v in choice.to_dict().items() if k == "invalid"} == told
    # What was kept of it is in doubt as well.
    monkeypatch.setattr(machine.Watch, "others", lambda self: 0.0)
    assert chosen(tmp_path) == choice
    assert measured == [("a", "b")]


def test_one_call_in_nine_that_waits_long_is_seen(
    tmp_path: Path, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sometimes = [1.0] * 8 + [10.0]
    monkeypatch.setattr(tune, "interleave", lambda *_: {"a": sometimes * 10, "b": [1.5] * 90})
    assert chosen(tmp_path).name == "a"
    beside = chosen(tmp_path, rivals=1)
    assert beside.name == "b"
    assert beside.medians == {"a": 2.0, "b": 1.5}
    assert beside.samples == 10


def test_times_left_over_belong_to_no_mean() -> None:
    assert tune.means([1.0] * 9 + [3.0] * 9 + [100.0] * 8) == [1.0, 3.0]
    assert tune.means([2.0, 4.0]) == [3.0]
