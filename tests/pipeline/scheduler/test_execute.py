from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.commands.console import JsonConsole, QuietConsole, RichConsole
from pipeline.config import from_mapping
from pipeline.core import signals
from pipeline.core.errors import ArtifactError, BuildError, InputError, LockedError
from pipeline.scheduler import execute
from pipeline.scheduler.execute import Outcome
from pipeline.scheduler.plan import Selection, make_context
from pipeline.stages.context import RunContext
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import locked
from pipeline.steps.library import Library
from pipeline.steps.log import Log
from pipeline.steps.stated import Stated
from pipeline.steps.step import StageResult, State, Step
from tests.pipeline.conftest import EMBEDDED
from tests.pipeline.steps import making

Settings = dict[str, Any]


class Hashes:
    def save(self) -> None:
        pass


class Toy:
    """Stands for configuration and source: two steps of one chain, and a target beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes = Hashes()
        self.settings: Settings = {"export": 1, "build": 1, "bench": 1}
        self.fail: Exception | None = None
        self.ran: list[str] = []


class ToyStep(Step):
    def inputs(self) -> Mapping[str, Any]:
        return {"setting": self.toy.settings[self.stage]}

    @property
    def toy(self) -> Toy:
        return cast(Toy, self.context.config)

    def build(self, folder: Path) -> Mapping[str, Any]:
        self.toy.ran.append(self.name)
        if self.stage == "build" and self.toy.fail:
            raise self.toy.fail
        value = self.toy.settings.get("content", "same")
        (folder / "file").write_text(f"{self.name} {value}")
        return {"told": self.toy.settings[self.stage]}


class Export(ToyStep):
    stage = "export"


class Build(ToyStep):
    stage = "build"


class Bench(ToyStep):
    stage = "bench"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy(tmp_path)

    def plan(context: RunContext) -> list[Step]:
        export = Export(context, "export")
        build = Build(context, "ort/fp32", [export], "ort")
        bench = Bench(context, "bench/ort", [build], "ort")
        other = Export(context, "other", target="trt")
        return [export, build, bench, other]

    monkeypatch.setattr(execute, "plan", plan)
    return toy


class Recorder(QuietConsole):
    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.reasons: dict[str, str] = {}

    def started(self, step: Step, why: str) -> None:
        self.reasons[step.name] = why


def execute_toy(toy: Toy, selection: Selection | None = None) -> tuple[Outcome, Recorder]:
    recorder = Recorder()
    toy.ran.clear()
    return execute.execute(context(toy), selection or Selection(), recorder), recorder


def context(toy: Toy) -> RunContext:
    anything: Any = toy
    quiet = QuietConsole(sys.stderr).progress
    return RunContext(config=anything, source=anything, log=lambda line: None, progress=quiet)


def states(outcome: Outcome) -> list[str]:
    return [str(result.state) for result in outcome.results]


ALL = ["export", "ort/fp32", "bench/ort", "other"]


def test_a_second_run_does_nothing(toy: Toy) -> None:
    first, recorder = execute_toy(toy)
    assert states(first) == ["done"] * 4
    assert recorder.reasons == dict.fromkeys(ALL, "not built yet")
    second, _ = execute_toy(toy)
    assert states(second) == ["up to date"] * 4
    assert toy.ran == []


def test_only_what_depends_on_a_change_runs(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings["bench"] = 2
    _, recorder = execute_toy(toy)
    assert recorder.reasons == {"bench/ort": "changed: setting"}


def test_an_input_that_comes_out_the_same_stops_the_change(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings["export"] = 2
    execute_toy(toy)
    assert toy.ran == ["export", "other"]


def test_an_input_that_differs_reaches_what_is_made_from_it(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings |= {"export": 2, "content": "new"}
    _, recorder = execute_toy(toy)
    assert toy.ran == ALL
    assert recorder.reasons["ort/fp32"] == "changed: export"


def seals(toy: Toy) -> dict[str, str]:
    return {name: Artifact.read(toy.folder / name).seal for name in ALL}


def problems(toy: Toy) -> list[str]:
    library = Library(toy.folder)
    found = []
    for name in library.places:
        try:
            library.check(name)
        except ArtifactError as error:
            found.append(str(error))
    return found


def reported(toy: Toy) -> None:
    """What the report does after a run."""
    making.state(toy.folder)
    Stated(toy.folder).is_reported()


@pytest.mark.parametrize("with_report", [True, False])
def test_seals_that_changed_are_stated_anew_and_nothing_runs(toy: Toy, with_report: bool) -> None:
    execute_toy(toy)
    before, digests = seals(toy), [Artifact.read(toy.folder / name).digest for name in ALL]
    if with_report:
        reported(toy)
    toy.settings["export"] = 2  # comes out the same, and tells something else
    outcome, _ = execute_toy(toy)
    assert toy.ran == ["export", "other"]
    assert states(outcome) == ["done", "up to date", "up to date", "done"]
    after = seals(toy)
    assert all(before[name] != after[name] for name in ALL)
    for name, source in (("ort/fp32", "export"), ("bench/ort", "ort/fp32")):
        assert Artifact.read(toy.folder / name).seals == {source: after[source]}
    assert [Artifact.read(toy.folder / name).digest for name in ALL] == digests
    assert problems(toy) == []
    reported(toy)
    assert problems(toy) == []
    execute_toy(toy)
    assert toy.ran == []
    assert seals(toy) == after


def test_a_partial_run_leaves_nothing_that_check_calls_damaged(toy: Toy) -> None:
    execute_toy(toy)
    reported(toy)
    toy.settings["export"] = 2
    execute_toy(toy, Selection(only=("export",)))
    assert problems(toy) == []
    reported(toy)
    assert problems(toy) == []
    execute_toy(toy)
    assert (toy.ran, problems(toy)) == ([], [])
    exported = Artifact.read(toy.folder / "export").seal
    assert Artifact.read(toy.folder / "ort/fp32").seals == {"export": exported}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("killed", [True, False])
def test_edited_facts_are_made_again(toy: Toy, name: str, killed: bool) -> None:
    execute_toy(toy)
    if not killed:
        reported(toy)
    before = seals(toy)
    making.other_fact(toy.folder / name)
    assert problems(toy) != []
    _, recorder = execute_toy(toy)
    assert toy.ran == [name]
    assert recorder.reasons[name].startswith("damaged: ")
    assert seals(toy) == before
    assert problems(toy) == []


def test_without_a_report_edited_facts_are_found_by_what_others_state(toy: Toy) -> None:
    execute_toy(toy)
    before = seals(toy)
    Stated(toy.folder).is_reported()  # and there is no results.json
    making.other_fact(toy.folder / "ort/fp32")
    execute_toy(toy)
    assert toy.ran == ["ort/fp32"]
    assert seals(toy) == before


def test_nothing_is_made_from_what_is_damaged(toy: Toy) -> None:
    execute_toy(toy)
    reported(toy)
    making.other_fact(toy.folder / "export")
    toy.settings["build"] = 2
    outcome, _ = execute_toy(toy, Selection(only=("build",)))
    assert states(outcome) == ["failed"]
    assert "export is damaged (" in outcome.results[0].why
    assert "and not selected: run it as well" in outcome.results[0].why
    assert toy.ran == []
    execute_toy(toy)
    assert toy.ran == ["export", "ort/fp32"]


def test_what_was_edited_is_not_agreed_with(toy: Toy) -> None:
    execute_toy(toy)
    reported(toy)
    before = Artifact.read(toy.folder / "ort/fp32")
    making.other_fact(toy.folder / "export")
    execute_toy(toy, Selection(only=("build",)))
    assert Artifact.read(toy.folder / "ort/fp32") == before
    assert len(problems(toy)) == 2


def test_what_a_killed_run_made_is_not_made_again(toy: Toy) -> None:
    execute_toy(toy)
    reported(toy)
    toy.settings["build"] = 2
    execute_toy(toy, Selection(only=("build",)))  # and no report is written
    assert problems(toy) == []
    execute_toy(toy)
    assert toy.ran == []


def test_a_build_that_fails_leaves_what_there_was_as_it_was(toy: Toy) -> None:
    execute_toy(toy)
    reported(toy)
    toy.fail = BuildError("no")
    toy.settings["build"] = 2
    execute_toy(toy)
    assert problems(toy) == []


def test_an_artifact_of_an_earlier_version_is_made_again(toy: Toy) -> None:
    execute_toy(toy)
    path = toy.folder / "ort/fp32" / MANIFEST
    values = json.loads(path.read_text())
    old = {key: value for key, value in values.items() if key not in ("seal", "seals")}
    path.write_text(json.dumps({**old, "format": 1}))
    _, recorder = execute_toy(toy)
    assert toy.ran == ["ort/fp32"]
    assert "has no seal: made by an older version" in recorder.reasons["ort/fp32"]
    assert not list(toy.folder.rglob("*.before-*"))


def test_manifests_are_read_once_in_a_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    execute_toy(toy)
    reported(toy)
    read: list[Path] = []
    original = Artifact.read

    def counted(folder: Path) -> Artifact:
        read.append(folder)
        return original(folder)

    monkeypatch.setattr(Artifact, "read", counted)
    execute_toy(toy)
    assert sorted(read) == sorted(toy.folder / name for name in ALL)


def test_touched_files_change_nothing(toy: Toy) -> None:
    execute_toy(toy)
    for path in toy.folder.rglob("*"):
        os.utime(path, (1, 1))
    execute_toy(toy)
    assert toy.ran == []


def test_damage_is_mended(toy: Toy) -> None:
    execute_toy(toy)
    (toy.folder / "ort/fp32/file").write_text("damage")
    (toy.folder / "other" / MANIFEST).write_text("{")
    _, recorder = execute_toy(toy)
    assert toy.ran == ["ort/fp32", "other"]
    assert recorder.reasons["ort/fp32"].startswith("damaged: ")
    Artifact.read(toy.folder / "ort/fp32").verify()


def test_a_failure_stops_only_what_needs_it(toy: Toy) -> None:
    toy.fail = BuildError("the runtime refused")
    outcome, _ = execute_toy(toy)
    assert states(outcome) == ["done", "failed", "skipped", "done"]
    assert outcome.results[1].why == "the runtime refused"
    assert outcome.results[2].why == "ort/fp32 failed"
    assert outcome.exit_code == 3
    toy.fail = None
    outcome, _ = execute_toy(toy)
    assert states(outcome) == ["up to date", "done", "done", "up to date"]


class Tolerant(Bench):
    """Does without all but its first requirement, as a bench does without a precision."""

    def do_without(self, missing: Sequence[Step]) -> bool:
        if self.requires[0] in missing:
            return False
        self.requires = tuple(step for step in self.requires if step not in missing)
        return True


def test_a_step_may_do_without_what_failed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(context: RunContext) -> list[Step]:
        good = Export(context, "ort/fp32")
        bad = Build(context, "ort/int8")
        bench = Tolerant(context, "bench/ort", [good, bad])
        blocked = Tolerant(context, "bench/trt", [bad, good])
        return [good, bad, bench, blocked]

    monkeypatch.setattr(execute, "plan", plan)
    toy.fail = BuildError("no calibration")
    outcome, _ = execute_toy(toy)
    assert states(outcome) == ["done", "failed", "done", "skipped"]
    assert outcome.results[3].why == "ort/int8 failed"
    assert list(Artifact.read(toy.folder / "bench/ort").made_from) == ["ort/fp32"]
    toy.fail = None
    outcome, recorder = execute_toy(toy)
    assert states(outcome) == ["up to date", "done", "done", "done"]
    assert recorder.reasons["bench/ort"] == "changed: ort/int8"


def test_running_out_of_memory_is_a_failed_build(toy: Toy) -> None:
    toy.fail = MemoryError("8 GiB")
    outcome, _ = execute_toy(toy)
    assert outcome.exit_code == 3
    assert "ort/fp32: out of memory: MemoryError: 8 GiB; free some" in outcome.results[1].why


def test_errors_that_nobody_expected_fail_their_step_alone(toy: Toy) -> None:
    toy.fail = ZeroDivisionError("by nothing")
    lines: list[str] = []
    anything: Any = toy
    quiet = QuietConsole(sys.stderr).progress
    spoken = RunContext(config=anything, source=anything, log=lines.append, progress=quiet)
    outcome = execute.execute(spoken, Selection(), Recorder())
    assert states(outcome) == ["done", "failed", "skipped", "done"]
    assert outcome.exit_code == 70
    assert "ort/fp32: an unforeseen fault: ZeroDivisionError: by nothing" in outcome.results[1].why
    assert any("Traceback" in line for line in lines), "the log says where"


def test_a_step_that_fails_by_a_signal_that_got_lost_ends_the_run(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(folder: Path) -> dict[str, Any]:
        with contextlib.suppress(signals.Ended):
            signal.raise_signal(signal.SIGTERM)
        raise BuildError("a library is missing")

    monkeypatch.setattr(Build, "build", lambda self, folder: lose(folder))
    with pytest.raises(signals.Ended), signals.raised():
        execute_toy(toy)
    assert toy.ran == ["export"]


def test_a_signal_that_got_lost_is_noticed_where_a_step_says_how_far_it_is(
    tmp_path: Path,
) -> None:
    config = from_mapping({**EMBEDDED, "output": str(tmp_path)}).config
    told: list[int] = []

    def progress(done: int, total: int | None = None, what: str = "") -> None:
        told.append(done)

    made = make_context(config, lambda line: None, progress)
    made.progress(1)

    @signals.raised()
    def lose(say: Callable[[int], None]) -> None:
        with contextlib.suppress(signals.Ended):
            signal.raise_signal(signal.SIGTERM)
        say(2)

    assert made.source.progress is not None
    for say in (made.progress, made.source.progress):
        with pytest.raises(signals.Ended):
            lose(say)
    assert told == [1]


def test_exit_codes() -> None:
    bad = StageResult("build", "a", State.FAILED, error=InputError("x"))
    broken = StageResult("build", "b", State.FAILED, error=BuildError("x"))
    assert Outcome().exit_code == 0
    assert Outcome([bad]).exit_code == 2
    assert Outcome([bad, broken]).exit_code == 3


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(force=True), ALL),
        (Selection(start="build"), ["ort/fp32", "bench/ort"]),
        (Selection(only=("bench",), force=True), ["bench/ort"]),
        (Selection(targets=("ort",), force=True), ["export", "ort/fp32", "bench/ort"]),
        (Selection(only=("bench",)), []),
    ],
)
def test_selection(toy: Toy, selection: Selection, expected: list[str]) -> None:
    execute_toy(toy)
    execute_toy(toy, selection)
    assert toy.ran == expected


def test_what_was_not_selected_is_told(toy: Toy) -> None:
    outcome, _ = execute_toy(toy, Selection(only=("build",)))
    assert [result.name for result in outcome.results] == ["ort/fp32"]
    assert outcome.not_selected == ["export", "bench/ort", "other"]
    outcome, _ = execute_toy(toy)
    assert outcome.not_selected == []


def test_a_target_runs_only_what_it_is_made_from(toy: Toy) -> None:
    shared = Export(context(toy), "shared")
    form = Export(context(toy), "form", [shared])
    steps: list[Step] = [
        shared,
        form,
        Build(context(toy), "trt/int8", [form], "trt"),
        Build(context(toy), "ort/fp32", [shared], "ort"),
    ]
    selected = Selection(targets=("ort",)).select(steps)
    assert [step.name for step in selected] == ["shared", "ort/fp32"]
    assert Selection().select(steps) == steps


def test_a_selected_step_without_its_inputs_is_skipped(toy: Toy) -> None:
    outcome, _ = execute_toy(toy, Selection(only=("build",)))
    assert states(outcome) == ["skipped"]
    assert outcome.results[0].why == "export is not built and not selected"


def test_dry_run_tells_why_and_writes_nothing(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings["export"] = 2
    before = sorted(path for path in toy.folder.rglob("*"))
    plan = {step.name: why for step, why in execute.dry_run(context(toy), Selection())}
    assert plan == {
        "export": "changed: setting",
        "ort/fp32": "may run: made from export, which runs",
        "bench/ort": "may run: made from ort/fp32, which may run",
        "other": "changed: setting",
    }
    assert sorted(path for path in toy.folder.rglob("*")) == before


def planned(toy: Toy) -> dict[str, str | None]:
    return {step.name: why for step, why in execute.dry_run(context(toy), Selection())}


def test_dry_run_does_not_promise_what_depends_on_a_result(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings["build"] = 2
    assert planned(toy)["bench/ort"] == "may run: made from ort/fp32, which runs"
    execute_toy(toy)
    assert "bench/ort" not in toy.ran, "it came out the same"


def test_dry_run_is_certain_of_what_runs_in_any_case(toy: Toy) -> None:
    execute_toy(toy)
    toy.settings.update(build=2, bench=2)
    assert planned(toy)["bench/ort"] == "changed: setting"
    shutil.rmtree(toy.folder / "bench/ort")
    assert planned(toy)["bench/ort"] == "made from ort/fp32, which runs"
    shutil.rmtree(toy.folder / "ort/fp32")
    execute_toy(toy, Selection(only=("export",)))
    assert planned(toy)["bench/ort"] == "made from ort/fp32, which runs"


def test_dry_run_needs_nothing_of_what_is_gone(toy: Toy) -> None:
    execute_toy(toy)
    shutil.rmtree(toy.folder / "ort/fp32")
    assert planned(toy)["bench/ort"] == "may run: made from ort/fp32, which runs"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.steps.folders import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(LockedError, match="another run works on"), locked(tmp_path):
            pass
        # Waiting helps, once the other ends; that it was killed does not matter.
        threading.Timer(0.2, other.kill).start()
        with locked(tmp_path, wait_s=30):
            pass


def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"^cannot write \S+/file/run/\.lock: Not a directory"),
        locked(tmp_path / "file" / "run"),
    ):
        pass


def shown(look: Callable[[Any], QuietConsole], toy: Toy) -> str:
    import io

    screen = io.StringIO()
    toy.fail = BuildError("the [runtime] refused")
    with look(screen) as console:
        execute.execute(context(toy), Selection(), console)
    return screen.getvalue()


def test_consoles(toy: Toy) -> None:
    assert shown(QuietConsole, toy) == "ort/fp32 failed: the [runtime] refused\n"
    rich = shown(RichConsole, toy)
    for name in ALL:
        assert name in rich
    assert "the [runtime] refused" in rich
    events = [json.loads(line) for line in shown(JsonConsole, toy).splitlines()]
    assert [e["name"] for e in events if e["event"] == "started"] == ["ort/fp32"]
    assert {e["name"]: e["state"] for e in events if e["event"] == "finished"} == {
        "export": "up to date",
        "ort/fp32": "failed",
        "bench/ort": "skipped",
        "other": "up to date",
    }


@pytest.mark.parametrize("look", [RichConsole, QuietConsole, JsonConsole])
def test_names_of_other_people_reach_no_terminal(
    look: Callable[[Any], QuietConsole], toy: Toy
) -> None:
    import io

    odd = "x[red]y[/z] \x1b[2J\udcff"
    screen = io.StringIO()
    step = Export(context(toy), odd)
    with look(screen) as console:
        console.planned([step])
        console.started(step, odd)
        console.progress(1, 2, odd)
        console.finished(StageResult("export", odd, State.FAILED, odd))
    shown = screen.getvalue().replace("\n", "").replace("\\\\", "\\")
    assert "x[red]y[/z]" in shown
    assert shown.isprintable()
    assert "\udcff" not in shown


def test_the_log_takes_every_name_and_no_terminal_obeys_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "run.log")
    log("x\x1b[2J\udcff")
    with log.captured():
        print("y\udcff")
    log.close()
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.endswith(" x\\x1b[2J\\udcff\ny\\udcff\n")


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, name: str, error: int = errno.EACCES) -> None:
    """Let the system refuse a file of that name, as it does a user who is not root."""
    real, below = Path.open, os.open

    def open_other(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == name:
            raise OSError(error, os.strerror(error), str(self))
        return real(self, *arguments, **keywords)

    def open_below(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(str(path)).name == name:
            raise OSError(error, os.strerror(error), str(path))
        return below(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_other)
    monkeypatch.setattr(os, "open", open_below)


def test_a_log_that_cannot_be_written_is_said_or_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(monkeypatch, "run.log")
    with pytest.raises(ArtifactError, match=r"cannot write .*run\.log: Permission denied; make"):
        Log(tmp_path / "run.log")
    log = Log(tmp_path / "run.log", required=False)
    log("goes nowhere")
    with log.captured() as screen:
        print("so does this")
        assert screen.fileno() != log.stream.fileno()
    log.close()
    assert not (tmp_path / "run.log").exists()


def test_what_goes_wrong_under_a_lock_is_not_called_a_matter_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing"), locked(tmp_path):
        (tmp_path / "nothing").read_bytes()
    with locked(tmp_path):
        pass


def test_an_artifact_that_cannot_be_read_is_made_again(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_toy(toy)
    toy.ran.clear()
    with monkeypatch.context() as changed:
        refuse_to_open(changed, "file", errno.EIO)
        reasons = {step.name: why for step, why in execute.dry_run(context(toy), Selection())}
    assert reasons["export"] is not None
    assert "damaged: cannot read" in reasons["export"]
    assert "export/file: Input/output error" in reasons["export"]
