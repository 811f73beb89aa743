from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import files
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.core.network import Network
from pipeline.core.replacing import Whose
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
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


def test_all_that_was_told_is_read_back(tmp_path: Path) -> None:
    made = artifact.make(
        tmp_path / "a",
        kind="build",
        name="trt/fp16",
        key="k",
        made_from={"onnx": "d"},
        tools={"t": "1"},
        build=write_files,
        inputs={"size": 1},
        code={"x.py": "h"},
    )
    assert (made.kind, made.name, made.key) == ("build", "trt/fp16", "k")
    assert (made.made_from, made.tools) == ({"onnx": "d"}, {"t": "1"})
    assert (made.inputs, made.code) == ({"size": 1}, {"x.py": "h"})
    assert Artifact.read(tmp_path / "a") == made
    path = tmp_path / "a" / MANIFEST
    plain = json.loads(path.read_text())
    assert plain["format"] == 1
    assert plain["files"]["model.bin"] == {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
    }
    del plain["inputs"], plain["code"]
    path.write_text(json.dumps(plain))
    assert (Artifact.read(tmp_path / "a").inputs, Artifact.read(tmp_path / "a").code) == (None, {})


def test_nothing_told_is_nothing(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    assert (made.inputs, made.code) == ({}, {})


def test_what_an_artifact_holds_is_on_the_disk_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    make(tmp_path / "a")
    assert {"model.bin", "w.bin"} <= synced


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    def write_other(folder: Path) -> dict[str, Any]:
        (folder / "other").write_text("x")
        return {}

    assert make(tmp_path / "a", write_one).digest != make(tmp_path / "b", write_other).digest


@pytest.mark.parametrize(
    "names", [("a1", "z1"), ("z2", "a2"), ("b/x", "b/a"), ("q", "p", "o", "n")]
)
def test_of_foreign_files_the_first_is_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    made = make(tmp_path / "a")
    for name in names:
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_text("x")
    with pytest.raises(ArtifactError, match=f"/{sorted(names)[0]} does not belong"):
        made.verify()


def test_a_manifest_deeper_down_and_folders_are_no_foreign_files(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    (made.folder / "empty").mkdir()
    made.verify()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ".."])
def test_names_outside_are_refused(name: str, tmp_path: Path) -> None:
    made = make(tmp_path / "a", write_one)
    plain = json.loads((made.folder / MANIFEST).read_text())
    plain["files"] = {name: plain["files"]["only"]}
    (made.folder / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(ArtifactError, match="outside of its folder"):
        Artifact.read(made.folder)
    plain["files"] = {"a..b/..c": plain["files"][name]}
    (made.folder / MANIFEST).write_text(json.dumps(plain))
    assert list(Artifact.read(made.folder).files) == ["a..b/..c"]


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match=rf"cannot read .*{MANIFEST}: Is a directory"):
        Artifact.read(tmp_path)


def test_the_network_is_that_of_the_facts(tmp_path: Path) -> None:
    network = Network("x", ("a", "b"), (3, 2, 2), {"size": 2})
    made = make(tmp_path / "a", lambda folder: {"network": network.to_dict()})
    assert made.network() == network
    made.facts["network"].pop("labels")
    for bare in (made, make(tmp_path / "b", write_one)):
        with pytest.raises(ArtifactError, match="states no network: build it again"):
            bare.network()


def test_whose_a_folder_is(tmp_path: Path) -> None:
    assert artifact.whose_folder(tmp_path / "none") is Whose.FREE
    (tmp_path / "empty").mkdir()
    assert artifact.whose_folder(tmp_path / "empty") is Whose.FREE
    (tmp_path / "file").write_text("x")
    assert artifact.whose_folder(tmp_path / "file") is Whose.FOREIGN
    made = make(tmp_path / "ours")
    assert artifact.whose_folder(made.folder) is Whose.OURS
    for name, target in (("link", made.folder), ("empty link", tmp_path / "empty"), ("gone", "x")):
        (tmp_path / name).symlink_to(target)
        assert artifact.whose_folder(tmp_path / name) is Whose.FOREIGN
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x").write_text("x")
    assert artifact.whose_folder(tmp_path / "foreign") is Whose.FOREIGN
    (made.folder / "notes").write_text("x")
    assert artifact.whose_folder(made.folder) is Whose.MIXED
    damaged = make(tmp_path / "damaged")
    (damaged.folder / MANIFEST).write_text("{")
    assert artifact.whose_folder(damaged.folder) is Whose.MIXED


def test_somebody_elses_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine").write_text("mine")
    built: list[Path] = []

    def build(folder: Path) -> dict[str, Any]:
        built.append(folder)
        return {}

    with pytest.raises(ArtifactError, match=f"holds no {MANIFEST}"):
        make(tmp_path / "a", build)
    assert built == [], "it is refused before anything is built"
    assert (tmp_path / "a/mine").read_text() == "mine"


def test_a_folder_that_appears_while_it_is_built_stays(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/mine").write_text("mine")
        return {}

    with pytest.raises(ArtifactError, match=f"holds no {MANIFEST}"):
        make(tmp_path / "a", build)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_what_holds_other_files_is_set_aside_and_this_is_said(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    (made.folder / "notes").write_text("mine")
    said: list[str] = []
    artifact.make(
        tmp_path / "a",
        kind="build",
        name="x",
        key="k",
        made_from={},
        tools={},
        build=write_one,
        say=said.append,
    )
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "a"]
    assert (aside / "notes").read_text() == "mine"
    assert said == [f"what was there was set aside as {aside.name}"]


def test_what_the_system_refuses_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    def connect(folder: Path) -> dict[str, Any]:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    with pytest.raises(BuildError, match=r"^a cannot be made: .*Connection refused"):
        make(tmp_path / "a", connect)

    def elsewhere(folder: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")

    with pytest.raises(BuildError, match="Permission denied"):
        make(tmp_path / "a", elsewhere)

    def here(folder: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "x"))

    with pytest.raises(ArtifactError, match=r"cannot write .*/a: Permission denied"):
        make(tmp_path / "a", here)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_what_cannot_be_written_is_said_of_the_folder(number: int, tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ArtifactError, match=rf"cannot write .*/a: {os.strerror(number)}"):
        make(tmp_path / "a", fail)
