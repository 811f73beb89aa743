from __future__ import annotations

import threading
import time

import pytest

from pipeline.emulate.beside import Beside


def others() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("beside")]


def test_calls_come_in_order_in_one_other_thread() -> None:
    seen: list[tuple[int, int]] = []
    with Beside() as beside:
        for number in range(50):
            beside.call(lambda n: seen.append((n, threading.get_ident())), number)
    assert [number for number, _ in seen] == list(range(50))
    (thread,) = {thread for _, thread in seen}
    assert thread != threading.get_ident()
    assert not others()


def fail(message: str) -> None:
    raise ValueError(message)


def test_what_a_call_raises_is_raised_by_a_later_call() -> None:
    with pytest.raises(ValueError, match="the third"), Beside(waiting=2) as beside:  # noqa: PT012
        beside.call(time.sleep, 0)
        beside.call(time.sleep, 0)
        beside.call(fail, "the third")
        for _ in range(2):
            beside.call(time.sleep, 0)
        pytest.fail("it went on")
    assert not others()


def test_what_the_last_call_raises_is_raised_at_the_end() -> None:
    with pytest.raises(ValueError, match="the last"), Beside() as beside:
        beside.call(fail, "the last")
    assert not others()


def test_few_calls_wait() -> None:
    done: list[float] = []

    def slow(seconds: float) -> None:
        time.sleep(seconds)
        done.append(seconds)

    with Beside(waiting=3) as beside:
        for given in range(1, 13):
            beside.call(slow, 0.002)
            assert given - len(done) <= 3
    assert len(done) == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupt_ends_the_thread_and_drops_what_waits(error: type[BaseException]) -> None:
    done: list[str] = []
    started, gate = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        gate.wait(10)
        done.append("first")

    release = threading.Timer(0.1, gate.set)
    with pytest.raises(error, match="stop"), Beside(waiting=4) as beside:  # noqa: PT012
        beside.call(first)
        beside.call(done.append, "second")
        beside.call(fail, "what failed beside does not hide the interrupt")
        started.wait(10)
        release.start()
        raise error("stop")
    assert done == ["first"]
    assert not others()
