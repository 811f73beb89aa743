from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import files
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.steps import artifact
from pipeline.steps.artifact import MANIFEST, Artifact

CONTENT = bytes(range(256)) * 4


def write_files(folder: Path) -> dict[str, Any]:
    (folder / "model.bin").write_bytes(CONTENT)
    (folder / "weights").mkdir()
    (folder / "weights" / "w.bin").write_bytes(b"w")
    return {"nodes": 3}


def write_one(folder: Path) -> dict[str, Any]:
    (folder / "only").write_text("x")
    return {}


def make(folder: Path, build: Callable[[Path], Mapping[str, Any]] = write_files) -> Artifact:
    return artifact.make(
        folder,
        kind="build",
        name="trt/fp16",
        key="k",
        made_from={"onnx": "d"},
        tools={"t": "1"},
        build=build,
    )


def test_what_was_made_is_read_back(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    made.verify()
    assert made == Artifact.read(tmp_path / "a")
    assert set(made.files) == {"model.bin", "weights/w.bin"}
    assert made.size == len(CONTENT) + 1
    assert made.facts == {"nodes": 3}
    assert made.path("model.bin").read_bytes() == CONTENT
    with pytest.raises(ArtifactError, match="holds no other"):
        made.path("other")


def test_digest_is_that_of_the_content(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.digest == second.digest
    changed = make(tmp_path / "c", write_one)
    assert changed.digest != first.digest


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "model.bin", 0), r"model\.bin has changed"),
        (lambda f: flip(f / "model.bin", 512), r"model\.bin has changed"),
        (lambda f: flip(f / "model.bin", -1), r"model\.bin has changed"),
        (lambda f: (f / "model.bin").write_bytes(CONTENT[:-1]), "1023 bytes where 1024"),
        (lambda f: (f / "weights/w.bin").unlink(), r"w\.bin is missing"),
        (lambda f: (f / "stray").write_text("x"), "stray does not belong"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    made = make(tmp_path / "a")
    damage(made.folder)
    with pytest.raises(ArtifactError, match=message):
        made.verify()


def test_a_file_that_the_disk_does_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "a")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")  # a failed read names no file

    monkeypatch.setattr("hashlib.file_digest", fail)
    with pytest.raises(ArtifactError, match=r"cannot read .*\.bin: Input/output error; make it"):
        made.verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is no JSON \(Expecting value.*: mend that, or build again"),
        ("[" * 1000, "is nested deeper than 64 levels: mend that"),
        ('{"format": 1, "format": 1}', "names 'format' twice"),
        (
            '{"format": 1, "kind": "", "name": "", "key": "", "files": {"a": '
            '{"sha256": "", "size": 1e999}}}',
            "is damaged",
        ),
        ('{"format": 1, "kind": "", "name": "", "key": "", "files": 5}', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 99}', "format 99"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, content: str, message: str) -> None:
    made = make(tmp_path / "a")
    (made.folder / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        Artifact.read(made.folder)


def test_manifests_that_point_outside_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    plain = json.loads((made.folder / MANIFEST).read_text())
    plain["files"]["../secret"] = plain["files"]["model.bin"]
    (made.folder / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(ArtifactError, match="outside of its folder"):
        Artifact.read(made.folder)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing was built there"):
        Artifact.read(tmp_path)


def test_a_failing_build_keeps_what_was_there(tmp_path: Path) -> None:
    made = make(tmp_path / "a")

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        make(tmp_path / "a", fail)
    made.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_build_replaces_all_of_the_old(tmp_path: Path) -> None:
    make(tmp_path / "a")
    new = make(tmp_path / "a", write_one)
    new.verify()
    assert set(new.files) == {"only"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"No space left on device; .* free disk space"):
        make(tmp_path / "a", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_of_the_place_and_not_of_a_temporary_file(tmp_path: Path) -> None:
    """Also where it is no longer full, once what did not fit is gone."""

    def write(folder: Path) -> dict[str, Any]:
        error = OSError(errno.ENOSPC, "No space left on device", str(folder / "model.onnx"))
        raise ArtifactError(f"cannot write {folder / 'model.onnx'}") from error

    with pytest.raises(ArtifactError) as caught:
        make(tmp_path / "a", write)
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'a'}: No space left on device;")
    assert ".making-" not in str(caught.value)


def test_a_full_disk_is_said_whatever_a_library_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        raise RuntimeError("basic_ios::clear: iostream error")

    with pytest.raises(RuntimeError, match="iostream"):
        make(tmp_path / "a", fail)
    monkeypatch.setattr(artifact, "disk_is_full", lambda folder: True)
    with pytest.raises(ArtifactError, match=r"cannot write .*/a: No space left on device"):
        make(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write"):
        make(tmp_path / "file" / "a")
    with pytest.raises(ArtifactError, match="cannot write"):
        files.write_atomically(tmp_path / "file" / "x", "y")


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "results.json"
    files.write_atomically(path, "old")

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ArtifactError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert files.digest_of({"a": 1, "b": [1, 2]}) == files.digest_of({"b": [1, 2], "a": 1})
    assert files.digest_of([1, 2]) != files.digest_of([2, 1])
