from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.commands.console import QuietConsole
from pipeline.core.errors import BuildError
from pipeline.scheduler import execute
from pipeline.scheduler.execute import Outcome
from pipeline.scheduler.plan import Selection
from pipeline.scheduler.processes import Job, Processes, described
from pipeline.scheduler.side_by_side import Local
from pipeline.steps.artifact import Artifact
from pipeline.steps.folders import LOG_FILE
from pipeline.steps.stated import Stated
from pipeline.steps.step import State
from tests.pipeline.scheduler.toys import Settings, context_of, planner, steps_of

ROOT = Path(__file__).parents[3]
NAMES = ["first", "meet0", "meet1", "meet2", "bench", "bench2", "last"]


@pytest.fixture(autouse=True)
def _toy_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "plan", steps_of)


def run(settings: Settings, jobs: int) -> Outcome:
    console = QuietConsole(sys.stderr)
    if jobs == 1:
        return execute.execute(context_of(settings), Selection(), console)
    with Processes(jobs) as executor:
        text = settings.text()
        running = Local(executor, jobs, lambda name, missing: Job(name, text, planner, missing))
        return execute.execute(context_of(settings), Selection(), console, None, running)


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in NAMES:
        artifact = Artifact.read(folder / name)
        artifact.verify()
        found[name] = artifact.seal
    return found


def test_three_processes_make_what_one_makes(tmp_path: Path) -> None:
    plain = Settings(tmp_path / "one" / "run")
    plain.folder.mkdir(parents=True)
    run(plain, 1)
    together = Settings(tmp_path / "three" / "run", meet=["meet0", "meet1", "meet2"])
    together.folder.mkdir(parents=True)
    outcome = run(together, 3)
    assert [result.name for result in outcome.results] == NAMES
    assert {result.state for result in outcome.results} == {State.DONE}
    assert digests(together.folder) == digests(plain.folder)
    # Every process announced its seals, and none overwrote another's.
    assert set(Stated(together.folder).made_since) == set(NAMES)
    assert str(os.getpid()) not in " ".join(result.why for result in outcome.results)
    for name in ("bench", "bench2"):
        beside = json.loads(Artifact.read(together.folder / name).made().data)
        assert beside == [], f"{name} measured beside others"
    again = run(together, 3)
    assert {result.state for result in again.results} == {State.UP_TO_DATE}


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(("times", "state"), [(1, State.DONE), (2, State.FAILED)])
def test_a_killed_process_is_tried_once_more(tmp_path: Path, times: int, state: State) -> None:
    settings = Settings(tmp_path / "run", killed="meet1", times=times)
    settings.folder.mkdir()
    outcome = run(settings, 2)
    found = {result.name: result for result in outcome.results}
    assert found["meet1"].state is state
    assert found["meet0"].state is found["meet2"].state is State.DONE
    if state is State.FAILED:
        assert "its process was killed 2 times" in found["meet1"].why
        assert found["last"].state is State.SKIPPED
        assert outcome.exit_code == 3


@pytest.mark.usefixtures("forked_processes")
def test_failures_come_back_as_they_are(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run", refused="meet0", odd="meet1", full="bench2")
    settings.folder.mkdir()
    outcome = run(settings, 2)
    found = {result.name: result for result in outcome.results}
    assert found["meet0"].why == "the runtime refused"
    assert "an unforeseen fault: ZeroDivisionError: by nothing" in found["meet1"].why
    assert isinstance(found["bench2"].error, BuildError)
    assert "bench2: out of memory: MemoryError: 8 GiB" in found["bench2"].why
    assert found["bench"].state is State.SKIPPED
    assert "Traceback" in (settings.folder / LOG_FILE).read_text()
    assert found["meet2"].state is State.DONE
    assert outcome.exit_code == 70


def test_a_configuration_travels_without_its_store() -> None:
    values: dict[str, Any] = {
        "name": "mine",
        "model": {"name": "care_tiny", "checkpoint": "embedded"},
        "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
        "targets": {"ort": {"precisions": ["fp32"]}},
        "store": {"address": "s3://user:topsecret@bucket/x"},
    }
    read = config.from_mapping(values).config
    text = described(read)
    assert "topsecret" not in text
    assert "bucket" not in text
    assert config.from_mapping(json.loads(text)).config == read.model_copy(update={"store": None})


class Waiting(Executor):
    """Lets nothing end."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


def test_what_measures_is_alone(tmp_path: Path) -> None:
    steps = {step.name: step for step in steps_of(context_of(Settings(tmp_path)))}

    def running(*names: str) -> Local:
        made = Local(Waiting(), 2, lambda name, missing: Job(name, "", planner, missing))
        for name in names:
            made.begin(steps[name], "", ())
        return made

    assert running().has_room(steps["bench"])
    assert not running("meet0").has_room(steps["bench"])
    assert running("meet0").has_room(steps["meet1"])
    assert not running("bench").has_room(steps["meet1"])
    assert not running("meet0", "meet1").has_room(steps["meet2"])


PARENT = """
import sys
from pathlib import Path
from pipeline.core import signals
from tests.pipeline.scheduler.test_side_by_side import run, execute, steps_of
from tests.pipeline.scheduler.toys import Settings
if __name__ == "__main__":
    execute.plan = steps_of
    with signals.raised():
        run(Settings(Path(sys.argv[1]), waits="meet0"), 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_run(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(program), str(folder)], env=environment) as parent:
        end = time.monotonic() + 120
        while not (found := list((tmp_path / "marks").glob("meet0-*"))):
            assert time.monotonic() < end, "the step never began"
            assert parent.poll() is None
            time.sleep(0.02)
        worker = int(found[0].name.rpartition("-")[2])
        parent.send_signal(number)
        assert parent.wait(60) != 0
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.02)
    if number is signal.SIGTERM:
        assert not list(folder.glob(".making-*")), "it cleaned up"


def test_a_run_with_one_step_at_a_time_loads_nothing_for_processes() -> None:
    code = "import sys, pipeline.commands.run; print('multiprocessing' in sys.modules)"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
