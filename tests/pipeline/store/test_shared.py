from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import StoreError
from pipeline.scheduler import execute
from pipeline.scheduler.plan import Selection
from pipeline.steps.artifact import Artifact
from pipeline.steps.step import State
from pipeline.store.entries import entry_name
from pipeline.store.shared import Shared
from tests.pipeline.store.toys import (
    FAULTS,
    NAMES,
    Machine,
    Unsteady,
    context_of,
    digests,
    entries,
    planned,
    run,
    shared,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _toy_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "plan", planned)


@pytest.fixture
def first(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "second")


def test_a_second_machine_builds_nothing(first: Machine, second: Machine) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    assert first.built == list(NAMES)
    outcome = run(second, shared(second, Unsteady(content)))
    assert second.built == []
    assert [result.why for result in outcome.results] == ["not built yet; taken from the store"] * 3
    assert digests(second) == digests(first)
    for name in NAMES:
        one, other = (Artifact.read(machine.folder / name) for machine in (first, second))
        assert one.seal == other.seal
    again = run(second, shared(second, Unsteady(content)))
    assert {result.state for result in again.results} == {State.UP_TO_DATE}


def test_what_was_timed_elsewhere_is_built_anew(first: Machine, tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    server = Machine(tmp_path / "server", "server")
    run(server, shared(server, Unsteady(content)))
    assert server.built == ["bench/ort"]


def test_only_with_push_is_something_given(first: Machine) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content), push=False))
    assert content == {}


def test_what_is_forced_is_built_here(first: Machine, second: Machine) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    before = {name: bytes(file.getvalue()) for name, file in content.items()}
    run(second, shared(second, Unsteady(content)), Selection(force=True))
    assert second.built == list(NAMES)
    assert {name: bytes(file.getvalue()) for name, file in content.items()} == before


@pytest.mark.parametrize("change", ["truncate", "other", "gone", "empty"])
def test_damage_is_reported_never_used_and_mended(
    first: Machine, second: Machine, tmp_path: Path, change: str
) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    for name in list(content):
        data = content[name].getvalue()
        if change == "gone" and "objects" in name:
            del content[name]
        elif change != "gone":
            content[name].seek(0)
            content[name].truncate()
            spoilt = {"truncate": data[:-1], "other": data[:-9] + b"x" + data[-8:], "empty": b""}
            content[name].write(spoilt[change])
    run(second, shared(second, Unsteady(content)))
    assert second.built == list(NAMES)
    assert digests(second) == digests(first)
    assert [text for text in second.said if ": not used" in text]
    third = Machine(tmp_path / "third")
    run(third, shared(third, Unsteady(content)))
    assert third.built == []
    assert digests(third) == digests(first)


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_change_no_result_and_lose_nothing(
    first: Machine, second: Machine, tmp_path: Path, seed: int
) -> None:
    """Two machines with an unsteady store, then a third with a steady one."""
    draw = random.Random(seed)
    content: dict[str, Any] = {}
    plain = Machine(tmp_path / "plain")
    run(plain, None)
    for machine in (first, second):
        places = draw.sample(range(1, 45), 10)
        files = Unsteady(content, {place: draw.choice(FAULTS) for place in places})
        outcome = run(machine, shared(machine, files))
        assert {result.state for result in outcome.results} == {State.DONE}
        assert digests(machine) == digests(plain)
        assert files.met, "no fault was met"
        assert not [text for text in machine.said if "topsecret" in text]
    third = Machine(tmp_path / "third")
    outcome = run(third, shared(third, Unsteady(content)))
    assert digests(third) == digests(plain)
    # What was spoilt is mended by now: nothing of it is left for a fourth.
    fourth = Machine(tmp_path / "fourth")
    run(fourth, shared(fourth, Unsteady(content)))
    assert fourth.built == []
    assert digests(fourth) == digests(plain)


def test_a_store_that_hangs_is_left_alone(first: Machine) -> None:
    stuck = Unsteady({}, dict.fromkeys(range(1, 4), "stuck"))
    outcome = run(first, shared(first, stuck, limit_s=0.05))
    assert {result.state for result in outcome.results} == {State.DONE}
    assert "does not answer within 0.05 s" in " ".join(first.said)
    assert first.said[-1] == "the store failed 3 times: this run goes on without it" or any(
        "goes on without it" in text for text in first.said
    )


def test_a_store_where_no_folder_can_be_made_costs_a_warning(
    first: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Unsteady, path: str, exist_ok: bool = False) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(Unsteady, "makedirs", refuse)
    outcome = run(first, shared(first, Unsteady({})))
    assert {result.state for result in outcome.results} == {State.DONE}
    assert any("the store memory://host/store loses what" in text for text in first.said)


def test_whether_a_store_holds_an_artifact(first: Machine, second: Machine) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    step = planned(context_of(second))[0]
    assert shared(second, Unsteady(content)).holds(step)
    assert not shared(second, Unsteady({})).holds(step)
    for file in content.values():
        file.seek(0)
        file.truncate()
    assert not shared(second, Unsteady(content)).holds(step)
    assert not shared(second, Unsteady(content, {1: "cut"})).holds(step)
    assert second.said == []  # who takes it says what is wrong
    with pytest.raises(StoreError, match="cannot be read"):
        shared(second, Unsteady(content, {1: "cut"}), required=True).holds(step)


def test_a_required_store_that_fails_is_an_error_of_the_step(first: Machine) -> None:
    outcome = run(first, shared(first, Unsteady({}, {1: "cut"}), required=True))
    assert outcome.exit_code == 4
    assert outcome.results[0].state is State.FAILED
    assert "memory://host/store cannot be read: ConnectionResetError" in outcome.results[0].why
    assert "topsecret" not in outcome.results[0].why
    assert first.built == []


def test_an_unreachable_store_warns_or_ends_the_run(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    said: list[str] = []
    address = f"sftp://user:topsecret@localhost:1/{place}"
    store = Shared.open(address, push=True, required=False, warn=said.append)
    assert store.entries is None
    assert len(said) == 1
    assert "this run goes on without it" in said[0]
    assert "topsecret" not in said[0]
    with pytest.raises(StoreError, match=r"store\.required: false") as caught:
        Shared.open(address, push=True, required=True, warn=said.append)
    assert "topsecret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_folder_is_a_store(first: Machine, second: Machine, tmp_path: Path) -> None:
    place = tmp_path / "store"

    def opened(machine: Machine) -> Shared:
        return Shared.open(str(place), push=True, required=True, warn=machine.said.append)

    run(first, opened(first))
    run(second, opened(second))
    assert second.built == []
    assert digests(second) == digests(first)
    assert not [path for path in place.rglob("*") if path.name.startswith(".new-")]
    key = Artifact.read(first.folder / "export").key
    assert (place / entry_name(key)).is_file()


WARM = """
import sys
from pathlib import Path
from pipeline.scheduler import execute
from pipeline.store.shared import Shared
from tests.pipeline.store.toys import Machine, planned, run
execute.plan = planned
machine = Machine(Path(sys.argv[1]))
run(machine, Shared.open(sys.argv[2], push=False, required=True, warn=print))
assert machine.built == [], machine.built
assert "torch" not in sys.modules
"""


def test_a_warm_clone_loads_no_torch(first: Machine, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(first, Shared.open(str(store), push=True, required=True, warn=print))
    command = [sys.executable, "-c", WARM, str(tmp_path / "clone"), str(store)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_entry_of_another_step_is_not_used(first: Machine, second: Machine) -> None:
    content: dict[str, Any] = {}
    run(first, shared(first, Unsteady(content)))
    place, other = (
        f"/store/{entry_name(Artifact.read(first.folder / name).key)}" for name in NAMES[:2]
    )
    content[place] = content[other]
    run(second, shared(second, Unsteady(content)))
    assert "export" in second.built
    assert digests(second) == digests(first)


def test_what_does_not_arrive_whole_is_told(tmp_path: Path) -> None:
    # Which of the calls opens the file depends on fsspec: older versions look first what is there.
    objects = entries(Unsteady({}, dict.fromkeys(range(1, 9), "truncated"))).objects
    with pytest.raises(StoreError, match="did not arrive whole"):
        objects.write("steps/x", b"0123456789")
