"""What is remembered of files and datasets: a hash may cost time, but may never be an old one."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import hashes
from pipeline.core.errors import DataError
from pipeline.core.files import file_hash
from pipeline.core.hashes import HashCache, Identity, Kind, identify
from pipeline.core.listing import Files, list_folder

NAMES = ("ant/a.jpg", "ant/b.jpg", "ant/deep/c.jpg", "bee/d.jpg")


@pytest.fixture
def cache(tmp_path: Path) -> HashCache:
    return HashCache(tmp_path / ".hashes.sqlite")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"image {name}")
    return root


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose content was read."""
    files: list[Path] = []

    def hash_and_tell(path: Path) -> str:
        files.append(path)
        return file_hash(path)

    monkeypatch.setattr(hashes, "file_hash", hash_and_tell)
    return files


def identity_of(root: Path, cache: HashCache) -> Identity:
    return identify(list_folder(str(root), "validation"), cache)


def again(cache: HashCache) -> HashCache:
    """What another run finds."""
    return HashCache(cache.path)


def test_a_file_is_hashed_once(tmp_path: Path, cache: HashCache, read: list[Path]) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    expected = file_hash(file)
    assert [cache.hash(file), cache.hash(file)] == [expected, expected]
    cache.save()
    assert again(cache).hash(file) == expected
    assert read == [file]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("contenT"),
        lambda file: file.write_text("longer content"),
        lambda file: os.utime(file, ns=(5, 5)),
    ],
)
def test_a_file_that_may_have_changed_is_hashed_again(
    change: Callable[[Path], object], tmp_path: Path, cache: HashCache, read: list[Path]
) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    os.utime(file, ns=(1, 1))
    cache.hash(file)
    cache.save()
    change(file)
    assert again(cache).hash(file) == file_hash(file)
    assert len(read) == 2


def test_a_file_that_was_replaced_is_hashed_again(tmp_path: Path, cache: HashCache) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    for path, content in ((file, "content"), (other, "changed")):
        path.write_text(content)
        os.utime(path, ns=(1, 1))
    cache.hash(file)
    other.replace(file)
    assert cache.hash(file) == file_hash(file)


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0 but damaged" * 99])
def test_a_damaged_memory_only_costs_time(content: bytes, tmp_path: Path, images: Path) -> None:
    whole = identity_of(images, HashCache(tmp_path / "whole"))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    assert identity_of(images, HashCache(path)) == whole
    with sqlite3.connect(path) as connection:  # it is whole again
        assert connection.execute("SELECT count(*) FROM folders").fetchone() == (3,)
    connection.close()


def test_a_damaged_memory_that_another_run_removed_is_begun_anew(
    images: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cache.hash(images / NAMES[0])
    cache.path.write_bytes(b"no database")
    real = sqlite3.connect

    def connect(path: Path) -> sqlite3.Connection:
        if path.exists():
            path.unlink()  # as the other run does that sees the damage first
            raise sqlite3.DatabaseError("file is not a database")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", connect)
        cache.save()
    assert again(cache).known(images / NAMES[0]) == found


def test_nothing_is_written_where_there_is_no_folder(tmp_path: Path, images: Path) -> None:
    cache = HashCache(tmp_path / "none" / ".hashes.sqlite")
    identity_of(images, cache)
    cache.hash(images / NAMES[0])
    cache.save()
    assert not (tmp_path / "none").exists()


def test_what_another_run_holds_is_left_alone(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HashCache(tmp_path / ".hashes.sqlite")
    cache.hash(images / NAMES[1])
    whole = identity_of(images, cache)
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path: real(path, timeout=0))
    holder = real(cache.path)
    holder.execute("BEGIN EXCLUSIVE")
    (images / NAMES[0]).write_text("changed")
    other = again(cache)
    assert identity_of(images, other) != whole
    holder.close()
    other.save()  # not lost: it is written with the next save
    assert identity_of(images, again(cache)) != whole
    assert again(cache).known(images / NAMES[1]) is not None, "what it held is there still"


def test_a_known_dataset_is_not_read(images: Path, cache: HashCache, read: list[Path]) -> None:
    first = identity_of(images, cache)
    assert first.files == len(NAMES)
    assert first.kind == "content"
    assert sorted(read) == sorted(images / name for name in NAMES)
    read.clear()
    assert identity_of(images, again(cache)) == first
    assert read == []


def test_only_what_changed_is_read(images: Path, cache: HashCache, read: list[Path]) -> None:
    first = identity_of(images, cache)
    (images / "ant/b.jpg").write_text("other")
    os.utime(images / "bee/d.jpg")
    read.clear()
    assert identity_of(images, again(cache)) != first
    assert read == [images / "ant/b.jpg", images / "bee/d.jpg"]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "ant/a.jpg").write_text("image ant/A.jpg"),
        lambda root: (root / "ant/a.jpg").rename(root / "ant/e.jpg"),
        # In the same place among the others: contents in order are the same.
        lambda root: (root / "ant/b.jpg").rename(root / "ant/c.jpg"),
        lambda root: (root / "ant/a.jpg").rename(root / "bee/a.jpg"),
        lambda root: (root / "ant/a.jpg").unlink(),
        lambda root: shutil.copy(root / "ant/a.jpg", root / "ant/e.jpg"),
        lambda root: (root / "ant").rename(root / "emu"),
        lambda root: (root / "ant/deep").rename(root / "ant/low"),
        lambda root: shutil.copytree(root / "bee", root / "cat"),
    ],
)
def test_another_content_is_another_dataset(
    change: Callable[[Path], object], images: Path, cache: HashCache
) -> None:
    first = identity_of(images, cache)
    change(images)
    assert identity_of(images, again(cache)) != first


def test_a_dataset_may_lie_elsewhere(images: Path, cache: HashCache, tmp_path: Path) -> None:
    first = identity_of(images, cache)
    shutil.copytree(images, tmp_path / "copy")
    assert identity_of(tmp_path / "copy", again(cache)) == first
    (tmp_path / "link").symlink_to(images)
    assert identity_of(tmp_path / "link", cache) == first
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ant", "bee"):
        (linked / name).symlink_to(images / name)
    assert identity_of(linked, cache) == first


def test_what_a_link_leads_to_counts(images: Path, cache: HashCache, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    first = identity_of(tmp_path / "link", cache)
    (images / NAMES[0]).write_text("other")
    assert identity_of(tmp_path / "link", again(cache)) != first


def test_hidden_files_do_not_count(images: Path, cache: HashCache) -> None:
    first = identity_of(images, cache)
    (images / "ant/.DS_Store").write_text("x")
    assert identity_of(images, cache) == first


def test_odd_names_are_told_apart(images: Path, cache: HashCache) -> None:
    first = identity_of(images, cache)
    odd = os.fsdecode(b"new\nline \xff.jpg")
    (images / "ant" / odd).write_text("x")
    second = identity_of(images, again(cache))
    assert second.files == first.files + 1
    assert identity_of(images, again(cache)) == second


def test_an_interrupted_hashing_goes_on(
    images: Path, cache: HashCache, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == len(NAMES)
        if done == 1:
            raise KeyboardInterrupt

    split = list_folder(str(images), "validation")
    with pytest.raises(KeyboardInterrupt):
        identify(split, cache, progress=interrupt)
    assert read == [images / "ant/a.jpg", images / "ant/b.jpg"]
    read.clear()
    found = identify(split, again(cache))
    assert read == [images / "ant/deep/c.jpg", images / "bee/d.jpg"]
    assert found == identify(split, HashCache(cache.path.with_name("other")))


def test_a_killed_hashing_lost_only_seconds(
    images: Path, cache: HashCache, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "KEEP_SECONDS", 0.0)
    kept = cache.path.with_name("kept")

    def kill(done: int, total: int) -> None:
        if done == 1:  # what a kill would leave: all that is written by now
            shutil.copy(cache.path, kept)

    split = list_folder(str(images), "validation")
    identify(split, cache, progress=kill)
    read.clear()
    identify(split, HashCache(kept))
    assert images / "ant/a.jpg" not in read


def test_progress_tells_of_what_is_left_to_hash(images: Path, cache: HashCache) -> None:
    told: list[tuple[int, int]] = []
    split = list_folder(str(images), "validation")
    identify(split, cache, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    told.clear()
    (images / "bee/d.jpg").write_text("other")
    identify(split, again(cache), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 1)]


def test_files_that_cannot_be_read_are_named(images: Path, cache: HashCache) -> None:
    (images / "ant/a.jpg").unlink()
    (images / "ant/a.jpg").symlink_to(images / "gone.jpg")
    with pytest.raises(DataError, match=r"a\.jpg cannot be read .*check that it is still there"):
        identity_of(images, cache)


def test_a_fingerprint_sees_names_sizes_and_some_contents(
    images: Path, cache: HashCache, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SAMPLED", 3)
    split = list_folder(str(images), "validation")
    first = identify(split, cache, "fingerprint")
    assert first.kind == "fingerprint"
    assert first.files == len(NAMES)
    assert first != identify(split, cache)
    read.clear()
    sampled = identify(split, HashCache(cache.path.with_name("other")), "fingerprint")
    assert sampled == first
    assert len(read) == 3  # one of each folder
    seen = read[0]
    (unseen,) = ({images / "ant/a.jpg", images / "ant/b.jpg"}) - set(read)
    content = unseen.read_text()
    unseen.write_text(content.upper())
    assert identify(split, cache, "fingerprint") == first
    unseen.write_text(f"{content} longer")
    assert identify(split, cache, "fingerprint") != first
    unseen.write_text(content)
    seen.write_text(seen.read_text().upper())
    assert identify(split, cache, "fingerprint") != first


def test_single_files_count_by_name_and_content(tmp_path: Path, cache: HashCache) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_text(name)
    found = {
        identify(Files(tmp_path, names, ()), cache)
        for names in (("a.tar",), ("b.tar",), ("a.tar", "b.tar"), ("b.tar", "a.tar"))
    }
    assert len(found) == 4


def test_shards_are_hashed_one_by_one_and_kept(
    tmp_path: Path, cache: HashCache, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a.tar", "b.tar", "c.tar")
    for name in names:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(hashes, "KEEP_SECONDS", 0.0)
    kept = cache.path.with_name("kept")
    told: list[int] = []

    def kill(done: int, total: int) -> None:
        told.append(done)
        if done == 1:  # what a kill would leave: all that is written by now
            shutil.copy(cache.path, kept)

    split = Files(tmp_path, names, names)
    first = identify(split, cache, progress=kill)
    assert told == [0, 1, 2]
    read.clear()
    assert identify(split, HashCache(kept), progress=lambda done, total: told.append(done)) == first
    assert read == [tmp_path / "b.tar", tmp_path / "c.tar"]
    assert told[3:] == [1, 2]


@pytest.mark.parametrize(("place", "seen"), [(0, True), (-1, True)])
def test_the_fingerprint_of_a_large_file_reads_pieces(
    place: int, seen: bool, tmp_path: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "PIECE_BYTES", 4)
    file = tmp_path / "shard.tar"
    content = bytearray(range(256)) * 4
    file.write_bytes(content)
    split = Files(file, (".",), (".",))
    first = identify(split, cache, "fingerprint")
    content[place] ^= 1
    file.write_bytes(content)
    assert (identify(split, cache, "fingerprint") != first) is seen
    file.write_bytes(content + b"x")
    assert identify(split, cache, "fingerprint") != first


def test_the_fingerprint_of_a_small_file_reads_all_of_it(
    tmp_path: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "PIECE_BYTES", 4)
    file = tmp_path / "shard.tar"
    content = bytearray(64)
    found = set()
    for place in range(64):
        file.write_bytes(content[:place] + b"x" + content[place + 1 :])
        found.add(identify(Files(file, (".",), (".",)), cache, "fingerprint"))
    assert len(found) == 64


@pytest.mark.parametrize("kind", ["content", "fingerprint"])
def test_names_that_are_not_utf8_are_known_again(
    kind: Kind, tmp_path: Path, cache: HashCache, read: list[Path]
) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff")
    for name in (b"a/\xfe.png", b"b/in\xfd/1.png"):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True)
        path.write_bytes(name)
    first = identify(list_folder(str(folder), "validation"), cache, kind)
    assert len(read) == first.files == 2
    assert identify(list_folder(str(folder), "validation"), again(cache), kind) == first
    assert len(read) == 2


def test_what_has_no_end_is_not_hashed(images: Path, cache: HashCache) -> None:
    os.mkfifo(images / "ant/pipe.jpg")
    with pytest.raises(DataError, match=r"ant/pipe\.jpg is a device or a pipe: move it out"):
        identity_of(images, cache)


def test_images_beside_linked_ones_count_too(images: Path, cache: HashCache) -> None:
    """A class folder may be linked in part."""
    (images / "ant/e.jpg").symlink_to(images.parent / "elsewhere")
    (images.parent / "elsewhere").write_text("one")
    first = identity_of(images, cache)
    assert first.files == len(NAMES) + 1
    (images.parent / "elsewhere").write_text("two!")
    second = identity_of(images, again(cache))
    assert second != first
    (images / "ant/a.jpg").write_text("three")
    assert identity_of(images, again(cache)) not in (first, second)


def test_what_is_a_memory_of_ours(tmp_path: Path, cache: HashCache, images: Path) -> None:
    identity_of(images, cache)
    assert HashCache.is_cache(cache.path)
    for content in (b"", b"SQLite format 3", b"no database at all"):
        (tmp_path / "other").write_bytes(content)
        assert not HashCache.is_cache(tmp_path / "other")


def test_files_are_known_by_their_whole_path(
    images: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images / "ant")
    first = cache.hash(Path("a.jpg"))
    (images / "bee/a.jpg").write_text("another")
    monkeypatch.chdir(images / "bee")
    assert cache.hash(Path("a.jpg")) != first
    cache.save()
    assert again(cache).known(images / "ant/a.jpg") == first


def test_nothing_new_is_not_written(images: Path, cache: HashCache) -> None:
    cache.save()
    assert not cache.path.exists()
    identity_of(images, cache)
    before = cache.path.stat().st_mtime_ns
    os.utime(cache.path, ns=(1, 1))
    identity_of(images, again(cache))
    assert cache.path.stat().st_mtime_ns == 1 != before


def test_what_was_written_is_not_written_again(images: Path, cache: HashCache) -> None:
    identity_of(images, cache)
    cache.hash(images / NAMES[0])
    cache.save()
    os.utime(cache.path, ns=(1, 1))
    cache.save()
    assert cache.path.stat().st_mtime_ns == 1


def test_files_and_folders_that_changed_take_the_place_of_what_was_known(
    images: Path, cache: HashCache
) -> None:
    for content in ("one", "longer"):
        (images / NAMES[0]).write_text(content)
        identity_of(images, cache)
        cache.hash(images / NAMES[0])
        cache.save()
    with sqlite3.connect(cache.path) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("files", "folders")
        ]
    connection.close()
    assert counts == [1, 3]
    assert again(cache).known(images / NAMES[0]) == file_hash(images / NAMES[0])


def test_the_same_run_sees_a_folder_that_changed(images: Path, cache: HashCache) -> None:
    first = identity_of(images, cache)
    (images / "ant/deep/c.jpg").write_text("other")
    second = identity_of(images, cache)
    assert first != second
    assert identity_of(images, cache) == second


def test_a_single_file_that_cannot_be_read_is_named(tmp_path: Path, cache: HashCache) -> None:
    for kind in ("content", "fingerprint"):
        with pytest.raises(DataError, match=r"gone\.tar cannot be read \(No such file"):
            identify(Files(tmp_path, ("gone.tar",), ()), cache, kind)


def test_kinds_of_identity_differ_for_single_files(tmp_path: Path, cache: HashCache) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_text(name)
    split = Files(tmp_path, ("a.tar", "b.tar"), ())
    whole, some = (identify(split, cache, kind) for kind in ("content", "fingerprint"))
    assert (whole.files, whole.kind) == (2, "content")
    assert (some.files, some.kind) == (2, "fingerprint")
    assert whole.digest != some.digest
    assert identify(split, cache) == whole


def test_a_fingerprint_takes_as_many_files_of_each_folder_as_it_may(
    images: Path, cache: HashCache, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (images / "ant" / f"{i}.jpg").write_text(str(i))
    split = list_folder(str(images), "validation")
    for sampled, count in ((1, 3), (6, 4), (12, 6), (10**6, 24)):
        monkeypatch.setattr(hashes, "SAMPLED", sampled)
        read.clear()
        identify(split, HashCache(cache.path.with_name(f"cache{sampled}")), "fingerprint")
        assert len(read) == count


def test_a_fingerprint_knows_what_was_hashed(
    images: Path, cache: HashCache, read: list[Path]
) -> None:
    split = list_folder(str(images), "validation")
    first = identify(split, cache, "fingerprint")
    read.clear()
    assert identify(split, again(cache), "fingerprint") == first
    assert read == []


def test_pieces_of_a_large_file_are_spread_over_it(
    tmp_path: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "PIECE_BYTES", 4)
    file = tmp_path / "shard.tar"
    content = bytearray(1024)
    split = Files(file, (".",), (".",))
    file.write_bytes(content)
    whole = identify(split, cache, "fingerprint").digest
    seen = []
    for place in range(1024):
        file.write_bytes(content[:place] + b"x" + content[place + 1 :])
        seen.append(identify(split, cache, "fingerprint").digest != whole)
    # Pieces of four bytes: the first, the last, and sixteen others that may overlap.
    assert all(seen[:4])
    assert all(seen[-4:])
    assert 50 <= sum(seen) <= 18 * 4
    assert any(seen[256:512])
    assert any(seen[512:768])


@pytest.mark.parametrize(("size", "whole"), [(63, True), (64, True), (65, False), (2, True)])
def test_up_to_so_many_pieces_a_file_is_read_whole(
    size: int, whole: bool, tmp_path: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "PIECE_BYTES", 4)
    asked: list[int] = []

    class Dice:
        def __init__(self, seed: int) -> None:
            assert seed == size

        def sample(self, population: range, k: int) -> list[int]:
            asked.append(k)
            assert (len(population), k) == (max(1, size - 3), min(16, max(1, size - 3)))
            return [0] * k

    monkeypatch.setattr("random.Random", Dice)
    file = tmp_path / "shard.tar"
    found = set()
    for place in range(size):
        file.write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
        found.add(identify(Files(file, (".",), (".",)), cache, "fingerprint").digest)
    assert asked
    assert (len(found) == size) is whole


def test_a_long_hashing_is_written_down_every_few_seconds(
    images: Path, cache: HashCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    saved: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: now)
    cache.saved = 0.0
    real = cache.save

    def save() -> None:
        saved.append(now)
        real()

    def tick(done: int, total: int) -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(cache, "save", save)
    identify(list_folder(str(images), "validation"), cache, progress=tick)
    assert saved == [4.0, 8.0, 8.0]  # after more than three seconds each, and in the end
    saved.clear()
    for name in ("a.tar", "b.tar", "c.tar"):
        (images / name).write_text(name)
    now, cache.saved = 0.0, 0.0
    identify(Files(images, ("a.tar", "b.tar", "c.tar"), ()), cache, progress=tick)
    assert saved == [4.0, 6.0]
