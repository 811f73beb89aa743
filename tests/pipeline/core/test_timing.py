"""Turns, rests and limits of measurements, by a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core import timing
from pipeline.core.figures import Latency
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Runner

IMAGES = np.zeros((1, 3, 2, 2), np.float32)


class Clock:
    """Time passes only while something sleeps or runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.events.append("rest")
        self.now += seconds

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.sleep", clock.sleep)
    monkeypatch.setattr("time.perf_counter", clock.read)
    monkeypatch.setattr("time.monotonic", clock.read)
    return clock


class Fake(Runner):
    def __init__(self, clock: Clock, name: str, seconds: float) -> None:
        self.clock, self.name, self.seconds, self.device = clock, name, seconds, name
        self.closed = False

    def __call__(self, images: Images) -> Logits:
        self.clock.events.append(self.name)
        self.clock.now += self.seconds
        return np.zeros((len(images), 2), np.float32)

    def timed(self, images: Images) -> dict[str, float]:
        self.clock.events.append(f"{self.name} timed")
        self.clock.now += self.seconds
        return {timing.ENGINE: 1e3 * self.seconds}

    def close(self) -> None:
        self.closed = True


def turns(events: list[str]) -> list[str]:
    """The runner of each timed turn: a rest, then calls of one runner alone."""
    found: list[str] = []
    for part in " | ".join(events).split("rest | ")[1:]:
        names = {event.split(" ")[0] for event in part.split(" | ") if event}
        assert len(names) == 1, part
        assert part.count("timed") == timing.CALLS
        found += names
    return found


def test_runners_take_turns_and_rest_before_each(clock: Clock) -> None:
    runners = {name: Fake(clock, name, 0.001) for name in ("a", "b")}
    protocol = timing.Protocol(warmup=2, samples=6, max_seconds=100)
    ticks: list[int] = []
    found = timing.interleaved(runners, IMAGES, protocol, ticks.append)
    assert clock.events[:4] == ["a", "a", "b", "b"]  # warm-up, before any rest
    assert turns(clock.events) == ["a", "b", "a", "b"]
    assert {name: len(phases[timing.ENGINE].samples) for name, phases in found.items()} == {
        "a": 6,
        "b": 6,
    }
    assert ticks == [3, 6]


def test_calls_settle_before_they_count(clock: Clock) -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(clock.now)
        clock.now += 0.002

    timing.settle(call)
    assert calls[0] == pytest.approx(timing.PAUSE_S)  # a rest first
    assert clock.now >= timing.PAUSE_S + timing.WARM_S
    assert len(calls) == 3


def test_a_slow_call_settles_once(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        clock.now += 1

    timing.settle(call)
    assert len(calls) == 1


def test_the_time_limit_ends_after_a_whole_round(clock: Clock) -> None:
    runners = {name: Fake(clock, name, 1.0) for name in ("a", "b")}
    found = timing.interleaved(runners, IMAGES, timing.Protocol(1, 300, 5.0))
    counts = {len(phases[timing.ENGINE].samples) for phases in found.values()}
    assert counts == {3}


def test_every_sample_counts(clock: Clock) -> None:
    found = timing.interleaved({"a": Fake(clock, "a", 0.25)}, IMAGES, timing.Protocol(1, 4, 100))
    assert found["a"][timing.ENGINE].samples == (250.0,) * 4


def test_end_to_end_includes_what_prepares(clock: Clock) -> None:
    def prepare() -> Images:
        clock.now += 0.5
        return IMAGES

    found = timing.end_to_end(Fake(clock, "a", 0.25), prepare, timing.Protocol(2, 3, 100))
    assert found.samples == pytest.approx((750.0,) * 3)


def test_end_to_end_has_a_sample_even_past_its_limit(clock: Clock) -> None:
    found = timing.end_to_end(Fake(clock, "a", 9.0), lambda: IMAGES, timing.Protocol(1, 5, 1.0))
    assert len(found.samples) == 1


def test_a_cold_start_is_opening_and_the_first_answer(clock: Clock) -> None:
    def opened() -> Runner:
        clock.now += 2
        return Fake(clock, "a", 0.5)

    runner, milliseconds = timing.cold_start(opened, IMAGES)
    assert milliseconds == pytest.approx(2500)
    assert isinstance(runner, Fake)
    assert not runner.closed


def test_a_runner_that_fails_at_first_is_closed(clock: Clock) -> None:
    class Broken(Fake):
        def __call__(self, images: Images) -> Logits:
            raise ValueError("no")

    runner = Broken(clock, "a", 0.5)
    with pytest.raises(ValueError, match="no"):
        timing.cold_start(lambda: runner, IMAGES)
    assert runner.closed


def test_ratios_are_of_the_engines_time_to_the_baseline() -> None:
    timed = {
        name: {timing.ENGINE: Latency((milliseconds,) * 10)}
        for name, milliseconds in {"a": 2.0, "base": 4.0}.items()
    }
    found = timing.ratios(timed, "base")
    assert list(found) == ["a"]
    assert found["a"].value == 0.5


def test_a_round_of_what_is_left_is_shorter(clock: Clock) -> None:
    ticks: list[int] = []
    protocol = timing.Protocol(warmup=0, samples=7, max_seconds=100)
    found = timing.interleaved({"a": Fake(clock, "a", 0.5)}, IMAGES, protocol, ticks.append)
    assert ticks == [3, 6, 7]
    assert len(found["a"][timing.ENGINE].samples) == 7
    # One call that does not count after each rest, for such a slow runner; none before.
    assert clock.events == ["rest", "a", *["a timed"] * 3] * 2 + ["rest", "a", "a timed"]


def test_the_time_limit_begins_after_the_warm_up_and_is_met_exactly(clock: Clock) -> None:
    # A round of one runner of a second takes 4 s and a rest of 10 ms.
    for limit, rounds in ((4.0, 1), (4.01, 2), (8.0, 2), (9.0, 3)):
        runner = Fake(clock, "a", 1.0)
        found = timing.interleaved({"a": runner}, IMAGES, timing.Protocol(5, 300, limit))
        assert len(found["a"][timing.ENGINE].samples) == rounds * timing.CALLS


def test_nothing_is_told_where_nobody_asks(clock: Clock) -> None:
    assert timing.interleaved({}, IMAGES, timing.Protocol(1, 3, 1.0)) == {}


def test_every_phase_is_kept(clock: Clock) -> None:
    class Phases(Fake):
        def timed(self, images: Images) -> dict[str, float]:
            return {**super().timed(images), "copies": 7.0}

    found = timing.interleaved({"a": Phases(clock, "a", 0.1)}, IMAGES, timing.Protocol(0, 2, 9.0))
    assert found["a"]["copies"] == Latency((7.0, 7.0))
    assert found["a"][timing.ENGINE].samples == (100.0, 100.0)


def test_end_to_end_ends_with_its_time_and_counts_no_warm_up(clock: Clock) -> None:
    for limit, samples in ((3.0, 2), (2.9, 1), (50.0, 4)):
        runner = Fake(clock, "a", 1.0)
        found = timing.end_to_end(runner, lambda: IMAGES, timing.Protocol(2, 4, limit))
        assert found.samples == pytest.approx((1000.0,) * samples)


def test_settling_calls_until_the_time_is_over(clock: Clock) -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(clock.now)
        clock.now += timing.WARM_S / 2

    timing.settle(call)
    assert len(calls) == 2
    assert (timing.PAUSE_S, timing.WARM_S, timing.CALLS) == (0.01, 0.005, 3)


def test_a_runner_that_fails_at_once_is_closed(clock: Clock) -> None:
    class Failing(Fake):
        def __call__(self, images: Images) -> Logits:
            raise KeyboardInterrupt

    runner = Failing(clock, "a", 1.0)
    with pytest.raises(KeyboardInterrupt):
        timing.cold_start(lambda: runner, IMAGES)
    assert runner.closed
