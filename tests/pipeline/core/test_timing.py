"""Turns, rests and limits of measurements, by a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import BenchConfig
from pipeline.core import timing
from pipeline.core.answers import FEWEST_AUDITED
from pipeline.core.figures import Latency
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Runner, Timed

IMAGES = np.zeros((1, 3, 2, 2), np.float32)


def test_settings_state_a_protocol() -> None:
    stated = BenchConfig(warmup=7, samples=80, max_seconds=9.0, settled=0.25)
    assert timing.Protocol.of(stated) == timing.Protocol(7, 80, 9.0, 0.25)


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

    def timed(self, images: Images) -> Timed:
        self.clock.events.append(f"{self.name} timed")
        self.clock.now += self.seconds
        return Timed(images[:, :2, 0, 0], {timing.ENGINE: 1e3 * self.seconds})

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
    found = timing.interleaved(runners, [IMAGES], protocol, ticks.append)
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


def test_a_call_that_takes_just_that_time_settles_once(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        clock.now += timing.WARM_S

    timing.settle(call)
    assert len(calls) == 1


def test_the_time_limit_ends_after_a_whole_round(clock: Clock) -> None:
    runners = {name: Fake(clock, name, 1.0) for name in ("a", "b")}
    found = timing.interleaved(runners, [IMAGES], timing.Protocol(1, 300, 5.0))
    counts = {len(phases[timing.ENGINE].samples) for phases in found.values()}
    assert counts == {3}


def test_every_sample_counts(clock: Clock) -> None:
    found = timing.interleaved({"a": Fake(clock, "a", 0.25)}, [IMAGES], timing.Protocol(1, 4, 100))
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
    clock.now = 1000.0  # whatever the clock shows by then

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
    found = timing.interleaved({"a": Fake(clock, "a", 0.5)}, [IMAGES], protocol, ticks.append)
    assert ticks == [3, 6, 7]
    assert len(found["a"][timing.ENGINE].samples) == 7
    # One call that does not count after each rest, for such a slow runner; none before.
    assert clock.events == ["rest", "a", *["a timed"] * 3] * 2 + ["rest", "a", "a timed"]


def test_the_time_limit_begins_after_the_warm_up_and_is_met_exactly(clock: Clock) -> None:
    # A round of one runner of a second takes 4 s and a rest of 10 ms.
    for limit, rounds in ((4.0, 1), (4.01, 2), (8.0, 2), (9.0, 3)):
        runner = Fake(clock, "a", 1.0)
        found = timing.interleaved({"a": runner}, [IMAGES], timing.Protocol(5, 300, limit))
        assert len(found["a"][timing.ENGINE].samples) == rounds * timing.CALLS


def test_nothing_is_told_where_nobody_asks(clock: Clock) -> None:
    assert timing.interleaved({}, [IMAGES], timing.Protocol(1, 3, 1.0)) == {}


def test_every_phase_is_kept(clock: Clock) -> None:
    class Phases(Fake):
        def timed(self, images: Images) -> Timed:
            known = super().timed(images)
            return Timed(known.logits, {**known.phases, "copies": 7.0})

    found = timing.interleaved({"a": Phases(clock, "a", 0.1)}, [IMAGES], timing.Protocol(0, 2, 9.0))
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


def batches(count: int) -> list[Images]:
    """Batches that the answers tell apart: the number of each is its first logit."""
    return [np.full((1, 3, 2, 2), float(number), np.float32) for number in range(count)]


def test_timed_calls_take_one_batch_after_the_other_and_tell_their_answers(clock: Clock) -> None:
    heard: list[tuple[str, int, float]] = []

    def hear(name: str, batch: int, logits: Logits) -> None:
        heard.append((name, batch, float(logits[0, 0])))

    runners = {name: Fake(clock, name, 0.5) for name in ("a", "b")}
    timing.interleaved(runners, batches(4), timing.Protocol(0, 6, 100), hear=hear)
    order = [0, 1, 2, 3, 0, 1]
    for name in runners:
        assert [(batch, value) for who, batch, value in heard if who == name] == [
            (number, float(number)) for number in order
        ]


def test_calls_that_do_not_count_are_given_distinct_batches_too(clock: Clock) -> None:
    given: list[float] = []

    class Keeping(Fake):
        def __call__(self, images: Images) -> Logits:
            given.append(float(images.flat[0]))
            return super().__call__(images)

    timing.interleaved({"a": Keeping(clock, "a", 1.0)}, batches(3), timing.Protocol(2, 6, 100))
    assert given == [0, 1, 2, 0]  # two to warm up, then one before each of two turns


class Remembering(Fake):
    """Answers at once what it was asked before."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, "a", 1.0)
        self.last = -1.0

    def timed(self, images: Images) -> Timed:
        self.seconds = 0.25 if images.flat[0] == self.last else 1.0
        self.last = float(images.flat[0])
        return super().timed(images)


def test_what_remembers_answers_is_faster_with_one_image(clock: Clock) -> None:
    audit = timing.repeated(Remembering(clock), batches(5), timing.Protocol(1, 300, 4000.0))
    assert audit is not None
    assert audit.calls == timing.AUDIT_CALLS
    assert audit.ratio.value == 0.25
    assert "takes 0.25 of the time of distinct ones: answers are remembered" in audit.problem


def test_what_computes_takes_as_long_with_one_image(clock: Clock) -> None:
    audit = timing.repeated(Fake(clock, "a", 0.5), batches(5), timing.Protocol(1, 300, 4000.0))
    assert audit is not None
    assert (audit.ratio.value, audit.problem) == (1.0, "")


def test_an_audit_takes_a_part_of_the_time_and_needs_two_batches(clock: Clock) -> None:
    runner = Fake(clock, "a", 1.0)
    assert timing.repeated(runner, batches(1), timing.Protocol(1, 300, 100.0)) is None
    assert clock.now == 0
    audit = timing.repeated(runner, batches(2), timing.Protocol(0, 300, 40.0))
    assert audit is not None
    # A turn of both takes 8 s and two rests; 10 of 40 s are over after the second.
    assert audit.calls == 6


def test_an_audit_ends_once_it_can_tell_and_warms_nothing_up(clock: Clock) -> None:
    protocol = timing.Protocol(20, 300, 4000.0, settled=0.03)
    audit = timing.repeated(Fake(clock, "a", 0.5), batches(5), protocol)
    assert audit is not None
    assert audit.calls == FEWEST_AUDITED
    assert clock.events[0] == "rest"
    changing = timing.repeated(Changing(clock, "a", 10**6), batches(5), protocol)
    assert changing is not None
    assert changing.calls == timing.AUDIT_CALLS


def test_one_image_again_and_again_is_always_the_first(clock: Clock) -> None:
    first, second = batches(2)
    same = timing.Repeating(Fake(clock, "a", 1.0), first)
    assert same.input_of(second) is first
    assert same.timed(same.input_of(second)).phases == {timing.ENGINE: 1000.0}
    assert same(first).shape == (1, 2)
    assert same.device == "a"


def test_calls_without_a_rest_go_on_until_the_time_is_over(clock: Clock) -> None:
    heard: list[tuple[int, float]] = []
    ticks: list[float] = []

    def hear(batch: int, logits: Logits) -> None:
        heard.append((batch, float(logits[0, 0])))

    found = timing.sustained(Fake(clock, "a", 0.5), batches(3), 2.2, 4, ticks.append, hear)
    assert found.samples == (500.0,) * 5  # the call under way counts
    assert found.seconds == pytest.approx(2.5)
    assert clock.events == ["a"] * 4 + ["a timed"] * 5  # no rest
    assert heard == [(0, 0.0), (1, 1.0), (2, 2.0), (0, 0.0), (1, 1.0)]
    assert ticks == pytest.approx([1.0, 2.0])


class Changing(Fake):
    """Takes longer from call to call, and after some of them always as long."""

    def __init__(self, clock: Clock, name: str, until: int) -> None:
        super().__init__(clock, name, 1.0)
        self.until, self.calls = until, 0

    def timed(self, images: Images) -> Timed:
        self.calls += 1
        self.seconds = min(self.calls, self.until) / self.until
        return super().timed(images)


def test_what_takes_turns_ends_together_once_all_medians_are_settled(clock: Clock) -> None:
    protocol = timing.Protocol(1, 300, 1e6, settled=0.03)
    steady = {name: Fake(clock, name, 0.5) for name in ("a", "b")}
    found = timing.interleaved(steady, [IMAGES], protocol)
    # The first look is after 64 calls; a turn has three.
    assert {len(phases[timing.ENGINE].samples) for phases in found.values()} == {66}
    mixed = {"a": Fake(clock, "a", 0.5), "b": Changing(clock, "b", 80)}
    found = timing.interleaved(mixed, [IMAGES], protocol)
    assert {len(phases[timing.ENGINE].samples) for phases in found.values()} == {225}


def test_what_is_there_for_comparison_alone_has_every_second_turn(clock: Clock) -> None:
    runners = {"a": Fake(clock, "a", 0.5), "b": Changing(clock, "b", 80)}
    heard: list[tuple[str, int]] = []
    protocol = timing.Protocol(1, 300, 1e6, settled=0.03)
    found = timing.interleaved(
        runners,
        [IMAGES] * 6,
        protocol,
        hear=lambda name, batch, logits: heard.append((name, batch)),
        seldom={"b"},
    )
    # Nobody waits until its median is settled, and it has one batch after the other all the same.
    calls = {name: len(phases[timing.ENGINE].samples) for name, phases in found.items()}
    assert calls == {"a": 66, "b": 33}
    assert turns(clock.events)[:5] == ["a", "b", "a", "a", "b"]
    assert [batch for name, batch in heard if name == "b"][:7] == [0, 1, 2, 3, 4, 5, 0]


def test_all_samples_are_taken_where_none_shall_settle(clock: Clock) -> None:
    found = timing.interleaved({"a": Fake(clock, "a", 0.5)}, [IMAGES], timing.Protocol(1, 120, 1e6))
    assert len(found["a"][timing.ENGINE].samples) == 120
    whole = timing.end_to_end(Fake(clock, "a", 0.5), lambda: IMAGES, timing.Protocol(1, 120, 1e6))
    assert len(whole.samples) == 120


def test_end_to_end_ends_once_its_median_is_settled(clock: Clock) -> None:
    protocol = timing.Protocol(2, 300, 1e6, settled=0.03)
    found = timing.end_to_end(Fake(clock, "a", 0.5), lambda: IMAGES, protocol)
    assert len(found.samples) == 64
