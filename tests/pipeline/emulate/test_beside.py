from __future__ import annotations

import threading
import time

import pytest
import torch

from pipeline.core.threads import SMALL
from pipeline.emulate.beside import Beside, even_parts, is_beside, side_by_side


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


@pytest.mark.parametrize(("count", "threads", "each"), [(2, 2, 1), (2, 5, 2), (3, 2, 1)])
def test_threads_side_by_side_share_those_of_torch(count: int, threads: int, each: int) -> None:
    torch.set_num_threads(threads)
    meet = threading.Barrier(count)

    def job(number: int) -> tuple[int, int, bool]:
        meet.wait(10)
        return number, torch.get_num_threads(), is_beside()

    try:
        with side_by_side(count) as pool:
            assert list(pool.map(job, range(count))) == [(n, each, True) for n in range(count)]
        assert torch.get_num_threads() == threads
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [threads]
    finally:
        torch.set_num_threads(1)
    assert not is_beside()
    assert not others()


def test_an_error_side_by_side_drops_what_waits() -> None:
    done: list[int] = []
    gate = threading.Event()

    def job(number: int) -> None:
        gate.wait(10)
        done.append(number)

    with pytest.raises(KeyboardInterrupt), side_by_side(1) as pool:  # noqa: PT012
        for number in range(5):
            pool.submit(job, number)
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert done == [0]
    assert not others()


def test_small_pictures_are_not_divided_into_few() -> None:
    def sizes(images: int, threads: int) -> list[int]:
        found = even_parts(images, 8, threads, SMALL - 1)
        return [part.stop - part.start for part in found]

    assert sizes(7, 2) == [7]
    assert sizes(8, 2) == [4, 4]
    assert sizes(8, 9) == [4, 4]
    assert sizes(3, 9) == [3]


@pytest.mark.parametrize(
    ("images", "most", "threads", "sizes"),
    [
        (8, 8, 1, [8]),
        (8, 8, 2, [4, 4]),
        (8, 7, 1, [4, 4]),
        (64, 8, 2, [8] * 8),
        (10, 4, 1, [3, 3, 4]),
        (3, 8, 2, [3]),  # of one image, torch computes with other kernels
        (5, 8, 4, [2, 3]),
        (0, 8, 2, [0]),
        (1, 0, 1, [1]),
    ],
)
def test_images_in_even_parts(images: int, most: int, threads: int, sizes: list[int]) -> None:
    found = even_parts(images, most, threads)
    assert [part.stop - part.start for part in found] == sizes
    assert [number for part in found for number in range(part.start, part.stop)] == [*range(images)]
