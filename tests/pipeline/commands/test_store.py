"""The commands that look after a store, over toy steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.commands import store as command
from pipeline.core.errors import InputError, StoreError
from pipeline.stages.context import RunContext
from pipeline.steps.step import Step
from tests.pipeline.store.toys import NAMES, Machine, ToyStep, digests, run


def planned(context: RunContext) -> list[Step]:
    return [ToyStep(context, name) for name in NAMES]


@pytest.fixture(autouse=True)
def _toy_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.api import results
    from pipeline.scheduler import execute

    monkeypatch.setattr(ToyStep, "build", untold)
    for module in (execute, results, command):
        monkeypatch.setattr(module, "plan", planned)


def untold(self: ToyStep, folder: Path) -> dict[str, Any]:
    (folder / "file").write_text(self.name)
    return {"name": self.name}


def configured(folder: Path, store: Path | None) -> config.Config:
    return config.from_mapping(
        {
            "name": "mine",
            "output": str(folder),
            "model": {"name": "care_tiny", "checkpoint": "embedded"},
            "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
            "targets": {"ort": {"precisions": ["fp32"]}},
            "store": {"address": str(store)} if store else None,
        }
    ).config


def test_push_and_pull(tmp_path: Path) -> None:
    first = configured(tmp_path / "first", tmp_path / "store")
    second = configured(tmp_path / "second", tmp_path / "store")
    run(Machine(first.folder), None)
    assert command.pull(second) == f"took 0 artifacts; it lacks {', '.join(NAMES)}"
    assert command.push(first) == "gave 3 artifacts; 0 were there"
    assert command.push(first) == "gave 0 artifacts; 3 were there"
    assert command.pull(second) == "took 3 artifacts"
    assert command.pull(second) == "took 0 artifacts"
    assert digests(Machine(second.folder)) == digests(Machine(first.folder))
    assert command.status(first).startswith("3 artifacts of 3 objects, 0.0 MB\n0 objects")
    assert command.collect(first, None) == "removed 0 files, 0.0 MB"


def test_verify_tells_of_damage(tmp_path: Path) -> None:
    first = configured(tmp_path / "first", tmp_path / "store")
    run(Machine(first.folder), None)
    command.push(first)
    assert command.verify(first)[1] == 0
    one = next(path for path in (tmp_path / "store" / "objects").rglob("*") if path.is_file())
    one.write_bytes(b"x" * one.stat().st_size)
    text, code = command.verify(first)
    assert (code, text.splitlines()[-1]) == (1, f"{one} is damaged")


def test_a_damaged_artifact_is_not_given(tmp_path: Path) -> None:
    first = configured(tmp_path / "first", tmp_path / "store")
    run(Machine(first.folder), None)
    (first.folder / "export" / "file").write_text("another")
    assert command.push(first) == "gave 2 artifacts; 0 were there"


def test_without_a_store_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no store"):
        command.status(configured(tmp_path, None))
    (tmp_path / "file").write_text("")
    blocked = configured(tmp_path / "first", tmp_path / "file" / "store")
    run(Machine(blocked.folder), None)
    with pytest.raises(StoreError, match=r"cannot be (read|written): NotADirectoryError"):
        command.push(blocked)
