"""The parts of a key have names, so that a stale step says what changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.steps import keys
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.step import Context, Step, flat, what_changed
from tests.pipeline.steps.making import other_fact


def test_nested_values_have_one_name_each() -> None:
    assert flat(
        {"settings export": {"opset": 20, "deep": {"x": None}}, "labels": ["a"], "n": {}}
    ) == {
        "settings export.opset": 20,
        "settings export.deep.x": None,
        "labels": ["a"],
        "n": {},
    }


def test_long_values_are_their_hashes() -> None:
    one, other = (flat({"labels": [f"{name} {i}" for i in range(99)]}) for name in "ab")
    assert one != other
    assert one["labels"].startswith("sha256:")


PARTS: Mapping[str, Mapping[str, Any]] = {
    "made_from": {"export": "d"},
    "inputs": {"settings export.opset": 20, "sizes": (1, 2)},
    "tools": {"torch": "2.14"},
    "code": {"care/checkpoint.py": "h"},
}


@pytest.mark.parametrize(
    ("kind", "now", "expected"),
    [
        ("made_from", {"export": "e"}, "changed: export"),
        (
            "inputs",
            {"settings export.opset": 21, "sizes": (1, 2)},
            "changed: settings export.opset",
        ),
        ("inputs", {"settings export.opset": 20}, "changed: sizes"),
        ("inputs", {**PARTS["inputs"], "new": 1}, "changed: new"),
        ("tools", {"torch": "2.15"}, "changed: torch 2.14 -> 2.15"),
        ("tools", {}, "changed: torch 2.14 -> none"),
        ("code", {"care/checkpoint.py": "i"}, "changed: care/checkpoint.py"),
        ("code", {f"care/{i}.py": "i" for i in range(4)}, "care/3.py and 1 more"),
        ("code", PARTS["code"], "changed: its name"),
    ],
)
def test_what_changed_is_named(kind: str, now: Mapping[str, Any], expected: str) -> None:
    existing = Artifact(
        folder=Path(),
        kind="build",
        name="x",
        key="k",
        files={},
        made_from=PARTS["made_from"],
        tools=PARTS["tools"],
        facts={},
        inputs={"settings export.opset": 20, "sizes": [1, 2]},
        code=PARTS["code"],
    )
    assert what_changed(existing, {**PARTS, kind: now}).endswith(expected)
    untold = dataclasses.replace(existing, inputs=None)
    assert what_changed(untold, PARTS) == "changed: settings export.opset, sizes"


class Other(Step):
    """A step that others are made from."""

    stage = "export"

    def inputs(self) -> Mapping[str, Any]:
        return {}

    def build(self, folder: Path) -> Mapping[str, Any]:
        (folder / "graph").write_text("graph")
        return {}


class Toy(Step):
    """A step of which every part of the key can be changed."""

    stage = "build"

    def __init__(self, context: Context, requires: Sequence[Step] = ()) -> None:
        super().__init__(context, "toy/plain", requires, "toy")
        self.settings: dict[str, Any] = {"settings": {"size": 1}}
        self.versions = {"torch": "2"}

    def inputs(self) -> Mapping[str, Any]:
        return self.settings

    def tools(self) -> dict[str, str]:
        return self.versions

    def build(self, folder: Path) -> Mapping[str, Any]:
        (folder / "file").write_text("content")
        return {"told": 1}


class Modules(keys.Code):
    """Stands for the code: remembers of which modules it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.found = {"pipeline/toy.py": "one"}

    def hashes(self, roots: Sequence[str], **options: Any) -> dict[str, str]:
        self.asked.append(list(roots))
        return dict(self.found)


Make = Callable[[], Toy]


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, logged: list[str]) -> Make:
    """Makes the step as another run would: of what lies there."""

    def made() -> Toy:
        context = Context(
            config=SimpleNamespace(folder=tmp_path),
            log=logged.append,
            progress=lambda *told: None,
            code=Modules(),
        )
        other = Other(context, "export")
        if other.stale():
            other.run()
        return Toy(context, [other])

    return made


def test_a_step_knows_what_it_was_made_with(make: Make, tmp_path: Path) -> None:
    step = make()
    made = step.run()
    assert step.artifact() == made == Artifact.read(tmp_path / "toy/plain")
    assert (made.kind, made.name, made.key) == ("build", "toy/plain", step.key())
    assert made.made_from == {"export": step.requires[0].artifact().digest}
    assert made.seals == {"export": step.requires[0].artifact().seal}
    assert made.inputs == {"settings.size": 1}
    assert made.tools == {"torch": "2"}
    assert made.code == {"pipeline/toy.py": "one"}
    assert made.facts["told"] == 1
    assert step.target == "toy"
    assert isinstance(step.context.code, Modules)
    assert step.context.code.asked[-1] == [Toy.__module__]


def test_seconds_of_a_step_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make()
    monkeypatch.setattr("time.monotonic", iter([10.0, 12.34567]).__next__)
    made = step.run()
    assert made.facts == {"told": 1}
    assert made.made().seconds == 2.346


def test_a_finished_step_need_not_run(make: Make) -> None:
    assert make().stale() == "not built yet"
    make().run()
    assert make().stale() is None
    with pytest.raises(ArtifactError, match="nothing was built there"):
        Other(make().context, "none").artifact()


def test_a_look_without_hashing_sees_all_but_damage(make: Make) -> None:
    made = make().run()
    next(path for path in made.folder.iterdir() if path.name in made.files).write_text("other")
    assert make().stale(verify=False) is None
    assert (make().stale() or "").startswith("damaged: ")
    step = make()
    step.settings.update(more=2)
    assert step.stale(verify=False) == "changed: more"


def test_a_step_looks_anew_at_what_it_read_before(make: Make, tmp_path: Path) -> None:
    step = make()
    step.run()
    (tmp_path / "toy/plain" / MANIFEST).write_text("{")
    assert (step.stale(verify=False) or "").startswith("damaged: ")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda step: step.settings.update(more=2), "changed: more"),
        (lambda step: step.versions.update(torch="3"), "changed: torch 2 -> 3"),
        (
            lambda step: step.context.code.found.update({"pipeline/toy.py": "two"}),
            "changed: pipeline/toy.py",
        ),
        (lambda step: setattr(step, "requires", ()), "changed: export"),
        (lambda step: setattr(type(step), "stage", "bench"), "changed: its name"),
    ],
)
def test_each_part_of_the_key_makes_a_step_run(
    change: Callable[[Any], object], why: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "stage", "build")
    make().run()
    step = make()
    before = step.key()
    change(step)
    assert step.key() != before
    assert step.stale() == why


def test_what_it_is_made_from_counts_by_content(make: Make) -> None:
    make().run()
    step = make()
    step.requires[0].run()
    assert step.stale() is None

    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "graph").write_text("other graph")
        return {}

    step.requires[0].make(build)
    assert step.stale() == "changed: export"


def test_a_source_that_came_out_the_same_is_stated_by_its_new_seal(
    make: Make, logged: list[str]
) -> None:
    step = make()
    before = step.run()

    def build(folder: Path) -> Mapping[str, Any]:
        return {**Other.build(cast(Any, step.requires[0]), folder), "told": "something else"}

    source = step.requires[0].make(build)
    step.restate()
    now = Artifact.read(step.folder)
    assert (now.seals, now.key) == ({"export": source.seal}, before.key)
    assert now.seal != before.seal
    assert make().stale() is None, "its own new seal is stated as well"
    assert logged == ["toy/plain: states the seals of export anew"]


def test_a_source_that_somebody_else_changed_is_not_agreed_with(make: Make, tmp_path: Path) -> None:
    step = make()
    before = step.run()
    other_fact(tmp_path / "export")
    step.context.artifacts.clear()  # as a run does that starts now
    step.restate()
    assert Artifact.read(step.folder) == before


def test_damage_makes_a_step_run(make: Make, tmp_path: Path) -> None:
    make().run()
    (tmp_path / "toy/plain/file").write_text("damagE!")
    why = make().stale()
    assert why is not None
    assert why.startswith("damaged: ")
    assert why.endswith("file has changed since it was written")


def test_what_was_set_aside_is_noted_and_logged(
    make: Make, tmp_path: Path, logged: list[str]
) -> None:
    make().run()
    (tmp_path / "toy/plain/notes.txt").write_text("mine")
    step = make()
    step.run()
    (note,) = step.notes
    assert note.startswith("what was there was set aside as ")
    assert logged == [f"toy/plain: {note}"]


def test_values_are_short_up_to_eighty_characters() -> None:
    fits, long = "x" * 78, "x" * 79  # and two quotes
    assert flat({"a": fits}) == {"a": fits}
    assert flat({"a": long})["a"].startswith("sha256:")
