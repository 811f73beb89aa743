from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.scheduler import execute
from pipeline.store import upkeep
from tests.pipeline.store.toys import SIZE, Machine, Unsteady, entries, planned, run, shared

OLD = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A store with three artifacts of two files each, and one object that nothing names."""
    monkeypatch.setattr(execute, "plan", planned)
    found: dict[str, Any] = {}
    machine = Machine(tmp_path / "one")
    run(machine, shared(machine, Unsteady(found)))
    entries(Unsteady(found)).objects.write("objects/ab/abandoned", b"12345")
    return found


def one(content: dict[str, Any], part: str) -> str:
    return next(name for name in sorted(content) if part in name)


def test_status(content: dict[str, Any]) -> None:
    found = upkeep.status(entries(Unsteady(content)))
    assert (found.artifacts, found.objects, found.unnamed, found.unnamed_size) == (3, 6, 1, 5)
    assert found.size == 3 * SIZE + len("exportort/fp32bench/ort")
    assert found.problems == ()


def test_status_tells_what_is_missing_and_damaged(content: dict[str, Any]) -> None:
    big = next(n for n in content if content[n].getbuffer().nbytes == SIZE)
    del content[big]
    entry = content[one(content, "steps/")]
    entry.seek(20)
    entry.write(b"#")
    problems = upkeep.status(entries(Unsteady(content))).problems
    assert len(problems) in (1, 2)
    assert any("is damaged" in text for text in problems)


def test_verify_reads_every_object(content: dict[str, Any]) -> None:
    big = next(n for n in content if content[n].getbuffer().nbytes == SIZE)
    content[big].seek(SIZE // 2)
    content[big].write(b"\0\1\2\3\4\5\6\7")
    store = entries(Unsteady(content))
    assert upkeep.status(store).problems == ()
    problems = upkeep.verify(store).problems
    assert f"memory://host{big} is damaged" in problems
    assert len(problems) == 2, "the object that is called abandoned is none either"


def test_new_files_are_kept(content: dict[str, Any]) -> None:
    before = set(content)
    assert upkeep.collect(entries(Unsteady(content))) == (0, 0)
    assert set(content) == before


def test_old_files_that_nobody_names_go(content: dict[str, Any]) -> None:
    before = set(content)
    for file in content.values():
        file.created = OLD
        file.modified = OLD
    assert upkeep.collect(entries(Unsteady(content))) == (1, 5)
    assert before - set(content) == {"/store/objects/ab/abandoned"}


def test_artifacts_go_after_their_days(content: dict[str, Any]) -> None:
    kept = one(content, "steps/")
    for name, file in content.items():
        if name != kept:
            file.created = file.modified = OLD
    assert upkeep.collect(entries(Unsteady(content)), days=30)[0] == 2 + 4 + 1
    found = upkeep.status(entries(Unsteady(content)))
    assert (found.artifacts, found.objects, found.unnamed, found.problems) == (1, 2, 0, ())
