"""A validation that is killed goes on where it was, and finds the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.network import Images, Logits
from pipeline.core.runner import Numerics
from pipeline.stages import shards
from pipeline.stages.names import LOGITS
from pipeline.stages.shards import STATE, Shards, size_of
from pipeline.stages.validate import ReferenceStep, place_of_shards
from pipeline.steps.folders import EVALUATIONS
from tests.pipeline.stages.test_validate import IMAGES, Steps, Toy, ToyTarget, built


class Killed(BaseException):
    """What a signal raises."""


class Noting(Toy):
    """Adds up all that it sees, and is killed at a call."""

    def __init__(self, killed_at: int | None = None) -> None:
        super().__init__()
        self.killed_at, self.total, self.went_on_at = killed_at, 0.0, 0

    def __call__(self, images: Images) -> Logits:
        if len(self.seen) == self.killed_at:
            raise Killed
        self.total += float(images.sum(dtype=np.float64))
        return super().__call__(images)

    def noted(self) -> Any:
        return {"total": self.total}

    def go_on(self, images: int, noted: Any) -> None:
        self.total, self.went_on_at = float(noted["total"]), images

    def numerics(self) -> Numerics:
        return Numerics(more={"total": self.total})


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    made = Steps(tmp_path)
    made.context.config.validation.shard = 1  # rounded up to a batch of two
    return made


def interrupted(steps: Steps, folder: Path, killed_at: int = 2) -> Path:
    """A validation that is killed; returns where its shards lie."""
    step = steps.validate(ToyTarget(Noting(killed_at), None))
    with pytest.raises(Killed):
        built(step, folder)
    return place_of_shards(step)


def test_shards_are_whole_batches() -> None:
    assert [size_of(1000, batch) for batch in (1, 64, 1000, 1024)] == [1000, 1024, 1000, 1024]


def test_a_killed_validation_goes_on(steps: Steps, tmp_path: Path) -> None:
    whole = built(steps.validate(ToyTarget(Noting(), None)), tmp_path / "whole")
    place = interrupted(steps, tmp_path / "killed")
    assert sorted(path.name for path in place.iterdir()) == ["0.npy", "1.npy", STATE]
    left = place / ".making-shards.json-0a1b2c3d"
    left.mkdir()
    (left / "made-by-care-deploy").write_text("shards.json")
    (left / "new").write_text("half")
    runner = Noting()
    found = built(steps.validate(ToyTarget(runner, None)), tmp_path / "again")
    assert (runner.went_on_at, runner.seen) == (4, [1])
    assert found == whole
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert files == {path.name for path in (tmp_path / "whole").iterdir()} == {LOGITS}
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / EVALUATIONS).exists(), "the work is done"


def test_the_reference_goes_on_as_well(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.targets import pytorch

    class Dying(pytorch.TorchRunner):
        calls = 0

        def __call__(self, images: Images) -> Logits:
            Dying.calls += 1
            if Dying.calls == 2:
                raise Killed
            return super().__call__(images)

    monkeypatch.setattr(pytorch, "TorchRunner", Dying)
    monkeypatch.setattr(pytorch, "range_of", lambda module, images: {})
    context: Any = steps.context
    for name in ("killed", "again"):
        (tmp_path / name).mkdir()
    with pytest.raises(Killed):
        ReferenceStep(context, steps.samples).build(tmp_path / "killed")
    ReferenceStep(context, steps.samples).build(tmp_path / "again")
    assert Dying.calls == 4, "two of three batches were computed again"
    assert len(np.load(tmp_path / "again" / LOGITS)) == IMAGES


@pytest.mark.parametrize("damage", ["bytes", "gone", "state", "mark", "noted", "size", "batch"])
def test_damaged_shards_are_computed_again(steps: Steps, tmp_path: Path, damage: str) -> None:
    whole = built(steps.validate(ToyTarget(Noting(), None)), tmp_path / "whole")
    place = interrupted(steps, tmp_path / "killed")
    state = json.loads((place / STATE).read_text())
    if damage == "bytes":
        data = (place / "1.npy").read_bytes()
        (place / "1.npy").write_bytes(data[:-1] + b"x")
    elif damage == "gone":
        (place / "0.npy").unlink()
    elif damage == "state":
        (place / STATE).write_text('{"mark": ')
    elif damage == "mark":
        (place / STATE).write_text(json.dumps({**state, "mark": "another"}))
    elif damage == "noted":
        (place / STATE).write_text(json.dumps({**state, "noted": None}))
    elif damage == "size":
        steps.context.config.validation.shard = 4  # shards of another size
    else:
        steps.context.config.validation.batch = 1
        steps.context.config.validation.shard = 2  # as before, of other batches
    runner = Noting()
    assert built(steps.validate(ToyTarget(runner, None)), tmp_path / "again") == whole
    assert sum(runner.seen) == IMAGES


def test_shards_of_another_key_go(steps: Steps, tmp_path: Path) -> None:
    place = interrupted(steps, tmp_path / "killed")
    older = place.with_name(f"{place.name.rpartition('-')[0]}-0123")
    place.rename(older)
    others = place.with_name("validate-toy-fp8-x-0123")
    others.mkdir()
    (others / STATE).touch()
    mine = place.with_name(f"{place.name.rpartition('-')[0]}-mine")
    mine.mkdir()
    (mine / "letter").touch()
    runner = Noting()
    built(steps.validate(ToyTarget(runner, None)), tmp_path / "again")
    assert runner.went_on_at == 0
    assert not older.exists()
    assert (others / STATE).exists()
    assert (mine / "letter").exists(), "it is somebody else's"


def test_what_cannot_be_kept_ends_nothing(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_atomically", full)
    runner = Noting()
    built(steps.validate(ToyTarget(runner, None)), tmp_path / "new")
    assert sum(runner.seen) == IMAGES


def test_few_images_are_kept_nowhere(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.context.config.validation.shard = 1000

    def never(self: Shards, *more: Any) -> None:
        raise AssertionError("it was kept")

    monkeypatch.setattr(Shards, "keep", never)
    built(steps.validate(ToyTarget(Noting(), None)), tmp_path / "new")
