"""A long validation in shards: however it was cut, and whoever computed it, the same is found."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Numerics
from pipeline.stages import shards
from pipeline.stages.names import LOGITS
from pipeline.stages.shards import (
    NOTED,
    ShardStep,
    forget,
    kept_in,
    place_of_shards,
    size_of,
)
from pipeline.stages.validate import ReferenceStep, ValidateStep
from pipeline.steps.artifact import MANIFEST, Artifact
from pipeline.steps.folders import EVALUATIONS, artifact_folders
from tests.pipeline.stages.test_validate import IMAGES, Steps, Toy, ToyTarget, built


class Killed(BaseException):
    """What a signal raises."""


class Noting(Toy):
    """Adds up all that it sees, and is killed at a call."""

    def __init__(self, killed_at: int | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.killed_at, self.total, self.went_on_at = killed_at, 0.0, 0
        self.began: list[int] = []

    def __call__(self, images: Images) -> Logits:
        if len(self.seen) == self.killed_at:
            raise Killed
        self.total += float(images.sum(dtype=np.float64))
        return super().__call__(images)

    def noted(self) -> Any:
        return {"total": self.total}

    def begin(self, images: int) -> None:
        self.began.append(images)
        self.total = 0.0

    def joined(self, noted: Any) -> Any:
        return {"total": sum(part["total"] for part in noted)}

    def go_on(self, images: int, noted: Any) -> None:
        self.total, self.went_on_at = float(noted["total"]), images

    def numerics(self) -> Numerics:
        return Numerics(more={"total": round(self.total, 6)})


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    made = Steps(tmp_path)
    made.context.config.validation.shard = 2
    return made


def whole_of(steps: Steps, folder: Path, **toy: Any) -> tuple[Any, bytes]:
    """What is found without shards."""
    settings = steps.context.config.validation
    before, settings.shard = settings.shard, 1000
    found = built(steps.validate(ToyTarget(Noting(**toy), None)), folder)
    settings.shard = before
    return found, (folder / LOGITS).read_bytes()


def interrupted(steps: Steps, folder: Path, killed_at: int = 2) -> Path:
    """A validation that is killed; returns where its shards lie."""
    step = steps.validate(ToyTarget(Noting(killed_at), None))
    with pytest.raises(Killed):
        built(step, folder)
    return steps.folder / place_of_shards(step)


@pytest.mark.parametrize(
    "toy", [{}, {"largest": 1}, {"smallest": 3}, {"smallest": 4}, {"divides": 2}]
)
@pytest.mark.parametrize("shard", [1, 2, 3, 4])
def test_what_is_joined_does_not_depend_on_shards(
    steps: Steps, tmp_path: Path, shard: int, toy: dict[str, int]
) -> None:
    """Shards are whole batches of what the runner takes; of large batches some are empty."""
    whole, logits = whole_of(steps, tmp_path / "whole", **toy)
    steps.context.config.validation.shard = shard
    one, other = Noting(**toy), Noting(**toy)
    alone = built(steps.validate(ToyTarget(one, None)), tmp_path / "alone")
    forget(tmp_path / place_of_shards(steps.validate(ToyTarget(one, None))))
    parts = steps.validate(ToyTarget(other, None)).shards()
    assert len(parts) == {1: 3, 2: 3, 3: 2, 4: 2}[shard], "at least a batch of two each"
    for part in reversed(parts):  # as if each were another worker's
        part.run()
    last = Noting(**toy)
    joined = built(steps.validate(ToyTarget(last, None)), tmp_path / "joined")
    assert last.seen == [], "nothing is computed again"
    assert last.went_on_at == IMAGES
    assert alone == joined == whole
    assert (tmp_path / "alone" / LOGITS).read_bytes() == logits
    assert (tmp_path / "joined" / LOGITS).read_bytes() == logits


def test_shards_are_whole_batches() -> None:
    def size(batch: int) -> int:
        validation = SimpleNamespace(batch=batch, shard=1000)
        return size_of(cast(Any, SimpleNamespace(validation=validation)))

    assert [size(batch) for batch in (1, 64, 1000, 1024)] == [1000, 1024, 1000, 1024]


def test_few_images_have_no_shards(steps: Steps, tmp_path: Path) -> None:
    steps.context.config.validation.shard = IMAGES
    step = steps.validate(ToyTarget(Noting(), None))
    assert step.shards() == []
    built(step, tmp_path / "new")
    assert not (tmp_path / EVALUATIONS).exists()


def test_a_killed_validation_goes_on(steps: Steps, tmp_path: Path) -> None:
    whole, logits = whole_of(steps, tmp_path / "whole")
    place = interrupted(steps, tmp_path / "killed")
    assert sorted(path.name for path in place.iterdir()) == ["00000", "00001"]
    runner = Noting()
    found = built(steps.validate(ToyTarget(runner, None)), tmp_path / "again")
    assert (runner.began, runner.seen) == ([4], [1])
    assert found == whole
    assert (tmp_path / "again" / LOGITS).read_bytes() == logits
    assert not any(EVALUATIONS in name for name, _ in artifact_folders(tmp_path))


def test_shards_go_when_the_whole_is_there(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = interrupted(steps, tmp_path / "killed")
    left = place / ".making-00001-0a1b2c3d"
    left.mkdir()
    (left / "made-by-care-deploy").write_text("00001")
    (left / "new").mkdir()
    step = steps.validate(ToyTarget(Noting(), None))
    monkeypatch.setattr(ValidateStep, "parts", lambda self: {key: {} for key in PARTS})
    step.make(step.build)
    assert not (tmp_path / EVALUATIONS).exists(), "the work is done"


PARTS = ("made_from", "inputs", "tools", "code")


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
    shard = ReferenceStep(context, steps.samples).shards()[0]
    assert shard.made_from()["checkpoint"] == "c0ffee"


@pytest.mark.parametrize("damage", ["bytes", "gone", "manifest", "noted", "size", "batch"])
def test_damaged_and_other_shards_are_computed_again(
    steps: Steps, tmp_path: Path, damage: str
) -> None:
    whole, _ = whole_of(steps, tmp_path / "whole")
    place = interrupted(steps, tmp_path / "killed")
    if damage == "bytes":
        data = (place / "00001" / LOGITS).read_bytes()
        (place / "00001" / LOGITS).write_bytes(data[:-1] + b"x")
    elif damage == "gone":
        (place / "00000" / LOGITS).unlink()
    elif damage == "manifest":
        (place / "00000" / MANIFEST).write_text('{"format": ')
    elif damage == "noted":
        (place / "00000" / NOTED).write_text("[]")
    elif damage == "size":
        steps.context.config.validation.shard = 4
    else:
        steps.context.config.validation.batch = 1
    runner = Noting()
    assert built(steps.validate(ToyTarget(runner, None)), tmp_path / "again") == whole
    assert sum(runner.seen) == (IMAGES if damage in ("size", "batch") else 3)


@pytest.mark.parametrize("changed", ["the artifact", "the machine", "what it lacks"])
def test_shards_of_something_else_are_not_joined(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    interrupted(steps, tmp_path / "killed")
    runner = Noting()
    target = ToyTarget(runner, "no such device" if changed == "what it lacks" else None)
    step = steps.validate(target, *(("other",) if changed == "the artifact" else ()))
    if changed == "the machine":
        monkeypatch.setattr(ValidateStep, "machine", lambda self: {"vendor": "another"})
    built(step, tmp_path / "again")
    assert sum(runner.seen) == IMAGES


def test_measured_shards_tell_their_machine(steps: Steps) -> None:
    """Emulation is the same on all that have the same tools; kernels differ by CPU and GPU."""
    measured = steps.validate(ToyTarget(Noting(), None)).shards()[0].inputs()
    emulated = steps.validate(ToyTarget(Noting(), "no such device")).shards()[0].inputs()
    assert "instructions" in measured["machine"]
    assert "machine" not in emulated


def test_an_audit_takes_no_shard_of_the_first(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = interrupted(steps, tmp_path / "killed")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    monkeypatch.setattr(ValidateStep, "parts", lambda self: {key: {} for key in PARTS})
    runner = Noting()
    step = steps.validate(ToyTarget(runner, None))
    made = step.again(tmp_path / "again")
    assert sum(runner.seen) == IMAGES
    assert made.digest == step.make(step.build).digest
    assert made.folder == tmp_path / "again"
    assert before, "they stay until the whole is there"
    assert step.shards() != []


@pytest.mark.parametrize(
    ("resource", "lacking", "why"),
    [
        ("rtx", None, "measured on a device"),
        ("rtx", "no GPU", ""),
        ("cpu", None, ""),
    ],
)
def test_what_devices_measured_may_differ(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, resource: str, lacking: str | None, why: str
) -> None:
    monkeypatch.setattr(ToyTarget, "resource", resource, raising=False)
    monkeypatch.setattr(ValidateStep, "parts", lambda self: {key: {} for key in PARTS})
    step = steps.validate(ToyTarget(Noting(), lacking))
    step.make(step.build)
    assert step.differs() == why


def test_a_measure_of_the_users_own_changes_no_shard(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.validate.metrics_inputs", lambda named: {"own": named})
    for step in (
        steps.validate(ToyTarget(Noting(), None)),
        ReferenceStep(steps.context, steps.samples),  # type: ignore[arg-type]
    ):
        assert "own" in step.inputs()
        assert "own" not in step.shards()[0].inputs()


def test_a_shard_that_nothing_can_run_says_so(steps: Steps) -> None:
    shard = steps.validate(ToyTarget(None, "no such device")).shards()[1]
    with pytest.raises(UnavailableError, match="validate/toy-fp8: nothing here can run or emulate"):
        shard.run()


def test_what_is_somebody_elses_stays(steps: Steps, tmp_path: Path) -> None:
    place = interrupted(steps, tmp_path / "killed")
    (place / "mine").mkdir()
    (place / "00007").mkdir()
    (place / "00007" / "letter").touch()
    (place.parent / "others").symlink_to(place)
    assert kept_in(place.parent) == [place]
    forget(place.parent / "others")
    assert (place / "00000" / LOGITS).exists(), "no link is followed"
    forget(place)
    assert sorted(path.name for path in place.iterdir()) == ["00007", "mine"]


def test_what_cannot_be_kept_ends_nothing(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: ShardStep) -> Artifact:
        shard.build(tmp_path / "room")
        raise ArtifactError("No space left on device")

    (tmp_path / "room").mkdir()
    monkeypatch.setattr(ShardStep, "run", full)
    runner = Noting()
    built(steps.validate(ToyTarget(runner, None)), tmp_path / "new")
    assert sum(runner.seen) == IMAGES


def test_what_the_runner_refuses_is_told(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged(Noting):
        def __call__(self, images: Images) -> Logits:
            raise ArtifactError("the engine is damaged")

    with pytest.raises(ArtifactError, match="the engine is damaged"):
        built(steps.validate(ToyTarget(Damaged(), None)), tmp_path / "new")


def test_a_shard_notes_what_its_images_took(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.zeros((2, 2), np.float32)
    monkeypatch.setattr(shards, "logits_of", lambda *more: (logits, 7.0))
    step = steps.validate(ToyTarget(Noting(), None))
    first, second, third = step.shards()
    first.run()
    assert first.artifact().made().images_seconds == 7.0
    assert json.loads(first.artifact().path(NOTED).read_text()) == {"total": 0.0}
    step.answers(Noting())
    assert step.beside["images_seconds"] == 21.0, "of all, whoever computed them"
    assert (second.name, third.name) == tuple(
        f"{EVALUATIONS}/validate-toy-fp8/0000{number}" for number in (1, 2)
    )
