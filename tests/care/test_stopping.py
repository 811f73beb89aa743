from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from care import stopping
from care.distributed import World
from care.stopping import Wishes
from pipeline.core.signals import Ended
from tests.care.processes import run_apart

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _nothing_is_ignored() -> Iterator[None]:
    """Shells let SIGINT be ignored by what runs in the background, and nohup SIGHUP."""
    plain: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_without_a_wish_a_run_goes_on() -> None:
    with Wishes(ALONE, 0).heard() as wishes:
        assert wishes.agreed() == (False, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_asks_to_save_and_end(number: int) -> None:
    before = signal.getsignal(number)
    with Wishes(ALONE, 0).heard() as wishes:
        send(number)
        assert wishes.agreed() == (True, number)
    assert signal.getsignal(number) is before


def test_a_slot_that_ends_asks_to_save_alone() -> None:
    with Wishes(ALONE, 0).heard() as wishes:
        send(signal.SIGUSR1)
        assert wishes.agreed() == (True, 0)
        wishes.saved()
        assert wishes.agreed() == (False, 0)


def test_the_clock_asks_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("care.stopping.time.monotonic", lambda: now)
    wishes = Wishes(ALONE, 60)
    now += 59
    assert wishes.agreed() == (False, 0)
    now += 1
    assert wishes.agreed() == (True, 0)
    wishes.saved()
    assert wishes.agreed() == (False, 0)
    assert Wishes(ALONE, 0).agreed() == (False, 0)


def test_where_nothing_is_lost_a_signal_ends_at_once() -> None:
    with Wishes(ALONE, 0).heard() as wishes, pytest.raises(Ended), wishes.interruptible():
        send(signal.SIGTERM)
    with Wishes(ALONE, 0).heard() as wishes:
        send(signal.SIGHUP)
        with pytest.raises(Ended) as caught, wishes.interruptible():
            pytest.fail("a signal that came before has to end it on the way in")
        assert caught.value.exit_code == 129


def test_the_end_waits_for_no_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_CHECK", 5.0)
    look, woken = select.select, []

    def looked(*arguments: Any) -> Any:
        found = look(*arguments)
        woken.append(bool(found[0]))
        return found

    monkeypatch.setattr("care.stopping.select.select", looked)
    with Wishes(ALONE, 0).heard():
        pass
    assert woken in ([], [True])  # it may end before it looks for the first time
    with Wishes(ALONE, 0).heard() as wishes:
        send(signal.SIGTERM)
        assert wishes.agreed() == (True, signal.SIGTERM)
    assert all(woken)


def test_the_same_event_may_come_twice_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Wishes(ALONE, 0).heard() as wishes:
        send(signal.SIGINT)
        send(signal.SIGTERM)  # as torchrun sends on what the terminal sent
        assert wishes.agreed() == (True, signal.SIGINT)
        monkeypatch.setattr(stopping, "_SAME", 0.0)
        with pytest.raises(Ended):
            send(signal.SIGTERM)


def test_what_is_to_be_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Wishes(ALONE, 0).heard() as wishes:
            send(signal.SIGHUP)
            assert wishes.agreed() == (False, 0)
    finally:
        signal.signal(signal.SIGHUP, before)


BLOCKED = """
import ctypes, os, signal, torch
from care import stopping
from care.distributed import World
stopping.GRACE = 0.2
source, target = os.pipe()
with stopping.Wishes(World(3, 4, torch.device("cpu")), 0).heard():
    signal.siginterrupt(signal.SIGTERM, False)  # a call that no signal interrupts, like gloo's
    print("ready", flush=True)
    ctypes.CDLL(None).read(source, ctypes.create_string_buffer(1), 1)
"""


def test_a_process_that_cannot_answer_ends_all_the_same() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 143
    assert "process 3 could not save" in error


def ask(rank: int, folder: str) -> None:
    """One of two processes; the second is told to end after its third step."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), rank, dist.group.WORLD)
    with Wishes(world, 0).heard() as wishes:
        for step in range(100):
            if (rank, step) == (1, 3):
                send(signal.SIGTERM)
            saves, signum = wishes.agreed()
            if signum:
                break
        wishes.finish()
    Path(folder, str(rank)).write_text(f"{step} {saves} {signum}")
    dist.destroy_process_group()


def test_processes_agree_on_the_step_after_which_they_save(tmp_path: Path) -> None:
    assert run_apart(ask, [(rank, str(tmp_path)) for rank in range(2)]) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4 True 15"] * 2
