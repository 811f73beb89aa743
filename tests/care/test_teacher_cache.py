"""A teacher's answers are kept: exact, bounded, and only if they are about these very images."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from care.teacher_cache import CachedTeacher, Store, digest_of
from pipeline.core.errors import ConfigError

BATCH, CLASSES = 4, 3


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1).float())  # type: ignore[no-any-return]


def store(folder: Path, *, hard: bool = False, most: float = 1e9, **key: object) -> Store:
    answers = 4 * BATCH * (1 if hard else CLASSES)
    return Store(folder, key, records=6, answers=answers, most=most)


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BATCH, 3, 2, 2), generator=generator, dtype=torch.uint8)


def ask(cached: CachedTeacher, step: int, part: int, pixels: Tensor) -> Tensor:
    cached.expect(step, part, pixels)
    return cached(pixels)  # type: ignore[no-any-return]


@pytest.mark.parametrize("hard", [True, False])
def test_a_second_run_gets_the_same_answers_without_asking(tmp_path: Path, hard: bool) -> None:
    teacher = Teacher()
    first = CachedTeacher(teacher, store(tmp_path, hard=hard), parts=2, hard=hard)
    places = [(step, part) for step in range(7) for part in range(2)]  # into a third epoch
    asked = [ask(first, *place, batch(n)) for n, place in enumerate(places)]
    assert (first.asked, first.known) == (14, 0)
    other = CachedTeacher(nn.Identity(), store(tmp_path, hard=hard), parts=2, hard=hard)
    read = [ask(other, *place, batch(n)) for n, place in enumerate(places)]
    assert (other.asked, other.known) == (0, 14)
    for n, (before, after) in enumerate(zip(asked, read, strict=True)):
        logits = teacher(batch(n))
        assert torch.equal(before, after)
        assert torch.equal(after, logits.argmax(1) if hard else logits)


def test_other_pixels_at_the_same_place_are_asked_for(tmp_path: Path) -> None:
    cached = CachedTeacher(Teacher(), store(tmp_path), parts=1, hard=False)
    ask(cached, 0, 0, batch(0))
    assert torch.equal(ask(cached, 0, 0, batch(1)), cached.teacher(batch(1)))
    assert (cached.asked, cached.known) == (2, 0)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    cached = CachedTeacher(Teacher(), store(tmp_path), parts=1, hard=False)
    expected = ask(cached, 0, 0, batch(0))
    (path,) = tmp_path.glob("*/epoch-0000.bin")
    whole = path.read_bytes()
    for place in range(cached.store.size):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        again = CachedTeacher(cached.teacher, store(tmp_path), parts=1, hard=False)
        assert torch.equal(ask(again, 0, 0, batch(0)), expected)
        assert again.asked == 1


def test_what_decides_the_answers_has_folders_of_its_own(tmp_path: Path) -> None:
    assert store(tmp_path, seed=1).folder == store(tmp_path, seed=1).folder
    assert store(tmp_path, seed=1).folder != store(tmp_path, seed=2).folder
    assert digest_of(Teacher()) != digest_of(Teacher())


def test_it_does_not_grow_beyond_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = 6 * (8 + 4 * BATCH * CLASSES)
    cached = CachedTeacher(Teacher(), store(tmp_path, most=2.5 * epoch), parts=1, hard=False)
    for step in range(24):
        assert torch.equal(ask(cached, step, 0, batch(step)), cached.teacher(batch(step)))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.bin")) == 2 * epoch
    assert capsys.readouterr().err.count("further answers of the teacher are not kept") == 1
    cached.asked = cached.known = 0
    for step in range(24):
        ask(cached, step, 0, batch(step))
    assert (cached.asked, cached.known) == (12, 12)


def test_a_full_disk_keeps_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cached = CachedTeacher(Teacher(), store(tmp_path), parts=1, hard=False)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert torch.equal(ask(cached, 0, 0, batch(0)), cached.teacher(batch(0)))
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*/*")] == ["what.json"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--teacher-cache: .* cannot be written"):
        store(tmp_path / "file")
