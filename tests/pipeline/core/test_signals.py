"""Signals end a program cleanly: temporaries go, children go, the exit code says why."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.core import signals
from pipeline.core.signals import Ended

ROOT = Path(__file__).parents[3]

PROGRAM = """
import subprocess, sys, time
from pathlib import Path
import click
from pipeline.core.commandline import Command
from pipeline.core.replacing import workspace

@click.command(cls=Command)
@click.argument("place", type=Path)
def main(place):
    with workspace(place) as new:
        code = ("import os, sys, time; from pipeline.core.signals import die_with_parent; "
                "die_with_parent(); print(os.getpid(), flush=True); time.sleep(600)")
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        print(child.stdout.readline().strip(), flush=True)
        try:
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise

main()
"""


def gone(pid: int) -> bool:
    """Whether a process ended; waits for it as long as a busy machine may take."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def _as_from_a_terminal() -> None:
    """This suite may run in the background, or by nohup: both have children ignore a signal."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(folder: Path, **how: object) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder / "made")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=_as_from_a_terminal,
    )
    assert run.stdout is not None
    return run, int(run.stdout.readline())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM: what was finished stays"),
        (signal.SIGHUP, 129, "ended by SIGHUP: what was finished stays"),
        (signal.SIGINT, 130, "interrupted: what was finished stays"),
    ],
)
def test_a_signal_ends_program_child_and_temporaries(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    run, child = started(tmp_path)
    run.send_signal(number)
    _, error = run.communicate()
    assert run.returncode == code, error
    assert said in error
    assert "Traceback" not in error
    assert gone(child)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    run, child = started(tmp_path)
    run.kill()
    run.communicate()
    assert gone(child)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_before_at_the_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Ended) as caught, signals.raised():
        signal.raise_signal(signal.SIGTERM)
    assert (caught.value.name, caught.value.exit_code) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_without_handlers_runs_all_the_same() -> None:
    found: list[bool] = []

    def work() -> None:
        with signals.raised():
            found.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


class Dropping:
    """Python drops what is raised in a destructor."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def dropped(number: int) -> None:
    """A signal that arrives where nothing that is raised gets out."""
    Dropping(number)


def caught_by_a_library(number: int) -> None:
    """A signal that arrives while a library looks whether another is there."""
    with suppress(BaseException):
        signal.raise_signal(number)


LOSING = (caught_by_a_library, dropped)
ENDS = (
    (signal.SIGTERM, Ended),
    (signal.SIGHUP, Ended),
    (signal.SIGINT, KeyboardInterrupt),
)


@pytest.fixture
def usual() -> Iterator[None]:
    """Whoever began this may ignore signals, as nohup does."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize(("number", "kind"), ENDS)
@pytest.mark.parametrize("lose", LOSING)
def test_a_signal_that_got_lost_is_raised_again(
    number: signal.Signals, kind: type[BaseException], lose: Callable[[int], None]
) -> None:
    @signals.raised()
    def work() -> None:
        lose(number)
        signals.raise_received()
        pytest.fail("it went on")

    with pytest.raises(kind) as caught:
        work()
    assert getattr(caught.value, "signum", number) == number
    signals.raise_received()  # it is over


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_a_signal_that_got_lost_is_raised_at_the_end(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    with pytest.raises(kind), signals.raised():
        caught_by_a_library(number)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("error", [ValueError("torch is missing"), SystemExit(3)])
def test_what_fails_after_a_signal_fails_by_it(error: BaseException) -> None:
    @signals.raised()
    def work() -> None:
        caught_by_a_library(signal.SIGTERM)
        raise error

    with pytest.raises(Ended) as caught:
        work()
    assert caught.value.__cause__ is error


@pytest.mark.usefixtures("usual")
def test_without_a_signal_nothing_is_raised() -> None:
    with signals.raised():
        signals.raise_received()
    with pytest.raises(SystemExit), signals.raised():
        raise SystemExit(3)


@pytest.mark.usefixtures("usual")
def test_an_inner_block_forgets_nothing() -> None:
    @signals.raised()
    def work() -> None:
        with suppress(Ended), signals.raised():
            caught_by_a_library(signal.SIGTERM)
        signals.raise_received()
        pytest.fail("it went on")

    with pytest.raises(Ended):
        work()


@pytest.mark.usefixtures("usual")
def test_other_threads_go_on() -> None:
    found: list[bool] = []

    def other() -> None:
        signals.raise_received()
        found.append(True)

    @signals.raised()
    def work() -> None:
        caught_by_a_library(signal.SIGTERM)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with pytest.raises(Ended):
        work()
    assert found == [True]


LOADED = """
import signal, sys, time
signal.raise_signal({number})
time.sleep({pause})
finished = True
"""


@pytest.fixture
def load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: None
) -> Iterator[Callable[..., None]]:
    """Loads a module that a signal reaches while it is loaded."""
    monkeypatch.syspath_prepend(tmp_path)

    def loading(number: int, pause: float = 0.0, more: str = "") -> None:
        (tmp_path / "interrupted_module.py").write_text(
            LOADED.format(number=int(number), pause=pause) + more
        )
        importlib.import_module("interrupted_module")

    yield loading
    sys.modules.pop("interrupted_module", None)


@pytest.mark.parametrize(("number", "kind"), ENDS)
@pytest.mark.parametrize("pause", [0.0, 4 * signals._PAUSE])
def test_a_module_that_is_being_loaded_is_finished_first(
    load: Callable[..., None], number: signal.Signals, kind: type[BaseException], pause: float
) -> None:
    done: list[str] = []

    @signals.raised()
    def work() -> None:
        load(number, pause)
        done.append("loaded")
        time.sleep(10)
        done.append("went on")

    with pytest.raises(kind):
        work()
    assert done == ["loaded"]
    assert sys.modules["interrupted_module"].finished


def in_peace() -> None:
    """What a program does at its end takes longer than until a signal is sent again."""
    time.sleep(3 * signals._PAUSE)


def test_a_second_signal_does_not_wait_for_a_module(load: Callable[..., None]) -> None:
    @signals.raised()
    def work() -> None:
        try:
            load(signal.SIGTERM, more=f"signal.raise_signal({int(signal.SIGTERM)})\n")
        finally:
            in_peace()

    with pytest.raises(Ended):
        work()
    assert "interrupted_module" not in sys.modules


def looks() -> None:
    try:
        signals.raise_received()
    finally:
        in_peace()


def fails() -> None:
    raise ValueError("the module was half made")


@pytest.mark.parametrize("then", [looks, fails, lambda: None], ids=["looks", "fails", "ends"])
def test_what_was_raised_for_a_module_is_not_sent_again(
    load: Callable[..., None], then: Callable[[], None]
) -> None:
    @signals.raised()
    def work() -> None:
        load(signal.SIGTERM)
        then()

    with pytest.raises(Ended) as caught:
        work()
    assert not isinstance(caught.value.__context__, Ended)
    again: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: again.append(number))
    in_peace()
    assert not again


def loading(folder: Path, command: str, answer: Callable[[], None]) -> tuple[int, str]:
    """Status and words of a command that is interrupted while it loads its first library."""
    (folder / "click.py").write_text(LOADED.format(number=int(signal.SIGINT), pause=0.1))
    run = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        preexec_fn=answer,
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize("module", ["train", "evaluate", "profile", "imagenet"])
def test_an_interrupt_while_a_command_loads_ends_it_in_a_word(tmp_path: Path, module: str) -> None:
    found = loading(tmp_path, f"care.{module}", _as_from_a_terminal)
    assert found == (130, "interrupted\n")


def _as_in_the_background() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_an_interrupt_that_is_ignored_stays_so_while_a_command_loads(tmp_path: Path) -> None:
    status, said = loading(tmp_path, "care.imagenet", _as_in_the_background)
    # It went on, and missed what the library should have.
    assert (status, "module 'click' has no attribute" in said) == (1, True)


def test_a_program_that_has_loaded_tidies_up_first(
    monkeypatch: pytest.MonkeyPatch, usual: None
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    signals.leave_while_loading()
    with pytest.raises(KeyboardInterrupt), signals.raised():
        signal.raise_signal(signal.SIGINT)
    assert not left
    signal.raise_signal(signal.SIGINT)
    assert left == [130]
