"""What counts as a fault of a run that was ended; the script itself takes half an hour."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import kill_and_continue
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LEAVE_A_CHILD = (
    "import subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "stdout=subprocess.DEVNULL); print(child.pid)"
)


def test_a_child_that_lives_on_is_found() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE_A_CHILD],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        child = int(run.communicate()[0])
    assert kill_and_continue.orphans(run.pid, grace_s=0) == [child]
    subprocess.run(["kill", "-KILL", str(child)], check=True)
    assert kill_and_continue.orphans(run.pid) == []


def test_a_run_is_ended_and_its_status_is_the_shells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program, number, expected in (
        ("import time; time.sleep(600)", 9, 137),
        ("import time; time.sleep(600)", 15, 143),
        ("pass", 1, None),
        ("raise SystemExit(3)", 1, 3),
    ):
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(kill_and_continue, "command", lambda config, c=command: c)
        moment = 30 if expected in (None, 3) else 0.01
        assert kill_and_continue.ended(tmp_path, tmp_path, number, moment) == (expected, [])


def test_a_run_that_goes_on_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(kill_and_continue, "command", lambda config: command)
    monkeypatch.setattr(kill_and_continue, "_answer_signals", ignore)
    found = kill_and_continue.ended(tmp_path, tmp_path, signal.SIGTERM, 0.01, patience_s=0.1)
    assert found == (137, [])
    assert len(kill_and_continue.problems("SIGTERM", *found, [])) == 1


def test_nohup_hides_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run goes on, as it should under nohup, and nothing is tried."""
    command = [sys.executable, "-c", "import time; time.sleep(5)"]
    monkeypatch.setattr(kill_and_continue, "command", lambda config: command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        found = kill_and_continue.ended(tmp_path, tmp_path, signal.SIGHUP, 0.01)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == (129, [])


@pytest.mark.parametrize(
    ("name", "status", "lived_on", "left", "count"),
    [
        ("SIGTERM", 143, [], [], 0),
        ("SIGKILL", 137, [], ["x/.making-a"], 0),
        ("SIGHUP", None, [], [], 0),
        ("SIGHUP", 0, [], [], 1),
        ("SIGTERM", 1, [], [], 1),
        ("SIGHUP", 143, [], [], 1),
        ("SIGKILL", 137, [5], [], 1),
        ("SIGTERM", 143, [5], ["x/.making-a"], 2),
    ],
)
def test_what_is_wrong_with_an_end(
    name: str, status: int | None, lived_on: list[int], left: list[str], count: int
) -> None:
    assert len(kill_and_continue.problems(name, status, lived_on, left)) == count


def test_what_is_left_over(tmp_path: Path) -> None:
    output, temporary = tmp_path / "engines", tmp_path / "tmp"
    for folder in (output / "trial" / "export", temporary):
        folder.mkdir(parents=True)
    assert kill_and_continue.left_over(output, temporary) == []
    (output / "trial" / "ort" / ".making-fp32-abcdefgh").mkdir(parents=True)
    (temporary / "tmpx").touch()
    assert len(kill_and_continue.left_over(output, temporary)) == 2
    # What an undisturbed run leaves there as well is no trace of a signal.
    assert len(kill_and_continue.left_over(output, temporary, {"tmpx"})) == 1
    kill_and_continue.emptied(temporary)
    assert list(temporary.iterdir()) == []
