from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from care import checkpoint, history
from care.history import History, verify, write_sealed
from pipeline.core.checkpoints import METADATA_KEY
from pipeline.core.errors import CheckpointError


def state(steps: int) -> dict[str, Any]:
    return {"steps": steps, "model": {"weight": torch.full((50,), float(steps))}}


def fill(folder: Path, keep: int = 3, steps: int = 5) -> History:
    found = History(folder, keep)
    for number in range(1, steps + 1):
        found.save(state(number), {"facts": {"images": 3}})
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("keep", "older"), [(1, []), (2, [4]), (3, [3, 4])])
def test_the_newest_and_some_before_it_are_kept(
    tmp_path: Path, keep: int, older: list[int]
) -> None:
    fill(tmp_path, keep)
    assert names(tmp_path) == ["last.pt", *(f"step-{n:08d}.pt" for n in older)]
    found = History(tmp_path, keep).read(pytest.fail)
    assert found is not None
    assert found["steps"] == 5
    assert found[METADATA_KEY]["facts"] == {"images": 3}


def test_a_step_that_is_saved_twice_is_there_once(tmp_path: Path) -> None:
    found = fill(tmp_path, steps=1)
    found.save(state(1), {})
    assert names(tmp_path) == ["last.pt"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_sealed(path, {"weight": torch.randn(4)})
    verify(path)
    torch.load(path, weights_only=True)
    data = path.read_bytes()
    bits = random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bits.randrange(8)
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=r"x\.pt is damaged"):
            verify(path)


@pytest.mark.parametrize("length", [0, 10, 70, 300, -1])
def test_truncated_files_are_found(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.pt"
    write_sealed(path, {"weight": torch.randn(4)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path)


def test_a_file_without_a_seal_is_judged_by_its_records(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"weight": torch.zeros(1000)})
    verify(path)
    damage(path)
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path)


def test_the_newest_whole_checkpoint_is_read_and_that_is_said(tmp_path: Path) -> None:
    fill(tmp_path)
    damage(tmp_path / "last.pt")
    damage(tmp_path / "step-00000004.pt")
    said: list[str] = []
    found = History(tmp_path, 3)
    saved = found.read(said.append)
    assert saved is not None
    assert saved["steps"] == 3
    assert len(said) == 2
    assert "last.pt is damaged" in said[0]
    assert "step-00000003.pt" in said[0]
    # What is damaged does not take the place of what is whole.
    found.save(state(4), {})
    damage(tmp_path / "last.pt")
    assert (History(tmp_path, 3).read(said.append) or {})["steps"] == 3


def test_a_save_that_was_killed_between_its_moves_is_gone_on_from(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "last.pt").rename(tmp_path / "step-00000005.pt")
    found = History(tmp_path, 3)
    assert (found.read(pytest.fail) or {})["steps"] == 5
    found.save(state(6), {})
    assert names(tmp_path) == ["last.pt", "step-00000004.pt", "step-00000005.pt"]


def test_nothing_whole_is_an_error(tmp_path: Path) -> None:
    assert History(tmp_path, 3).read(pytest.fail) is None
    fill(tmp_path, steps=1)
    damage(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*--overwrite"):
        History(tmp_path, 3).read(pytest.fail)


def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is always full stands in for the new file."""
    found = fill(tmp_path, steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    original = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "wb":
            original(path, mode).close()
            return original(Path("/dev/full"), mode, *rest, **more)
        return original(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"the disk is full, .* MB are free"):
        found.save(state(3), {})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(history, "write_sealed", fail)
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be written: Read-only"):
        History(tmp_path, 3).save(state(1), {})
