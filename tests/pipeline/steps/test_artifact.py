from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import files, signals
from pipeline.core.errors import ArtifactError, BuildError
from pipeline.core.network import Network
from pipeline.core.replacing import Whose
from pipeline.core.seals import sealed, unsealed
from pipeline.steps import artifact
from pipeline.steps.artifact import MADE, MANIFEST, Artifact, Made

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


def test_a_manifest_is_parsed_once_as_long_as_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "made")
    artifact._parsed.cache_clear()
    parsed: list[str] = []

    def counted(data: bytes, where: str) -> tuple[dict[str, Any], str]:
        parsed.append(where)
        return unsealed(data, where)

    monkeypatch.setattr(artifact, "unsealed", counted)
    first = Artifact.read(tmp_path / "made")
    assert Artifact.read(tmp_path / "made") == first
    assert len(parsed) == 1
    manifest = tmp_path / "made" / MANIFEST
    before = manifest.read_bytes()
    for _ in range(2):
        manifest.write_bytes(before[:-9])
        with pytest.raises(ArtifactError, match="damaged"):
            Artifact.read(tmp_path / "made")
        manifest.write_bytes(before)
        assert Artifact.read(tmp_path / "made") == first
    make(tmp_path / "made", write_one)
    assert Artifact.read(tmp_path / "made") != first


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
        ("", r"is no JSON \(Expecting value.*: build again"),
        ("[" * 1000 + "]" * 1000, "is nested deeper than 64 levels: build again"),
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


def record_of(values: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the file model.bin."""
    found: dict[str, Any] = values["files"]["model.bin"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(kind=5),
        lambda values: values.update(name=None),
        lambda values: values.update(key=["k"]),
        lambda values: values.update(tools={"t": 1}),
        lambda values: values.update(made_from={"onnx": {}}),
        lambda values: values.update(seals={"onnx": True}),
        lambda values: record_of(values).update(sha256=7),
        lambda values: record_of(values).update(size=-1),
        lambda values: record_of(values).update(size=1024.0),
        lambda values: record_of(values).update(size=True),
        lambda values: record_of(values).update(size="1024"),
    ],
)
def test_manifests_with_values_of_another_kind_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    made = make(tmp_path / "a")
    plain = json.loads((made.folder / MANIFEST).read_text())
    del plain["seal"]
    change(plain)
    (made.folder / MANIFEST).write_text(sealed(plain))
    with pytest.raises(ArtifactError, match="is damaged: build again"):
        Artifact.read(made.folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret", "outside of its folder"),
        ("weights/../../secret", "outside of its folder"),
        ("/etc/passwd", "outside of its folder"),
        ("a\0b", "outside of its folder"),
        ("", "which can be none"),
        (".", "which can be none"),
        ("weights//w.bin", "which can be none"),
        ("./model.bin", "which can be none"),
        ("artifact.json", "which can be none"),
        ("made.json", "which can be none"),
    ],
)
def test_manifests_that_name_no_file_of_theirs_are_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    made = make(tmp_path / "a")
    plain = json.loads((made.folder / MANIFEST).read_text())
    del plain["seal"]
    plain["files"][name] = plain["files"]["model.bin"]
    (made.folder / MANIFEST).write_text(sealed(plain))
    with pytest.raises(ArtifactError, match=message):
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


def test_nothing_is_kept_of_a_build_in_which_a_signal_got_lost(tmp_path: Path) -> None:
    made = make(tmp_path / "a")

    def lose(folder: Path) -> dict[str, Any]:
        with contextlib.suppress(signals.Ended):
            signal.raise_signal(signal.SIGTERM)
        return write_one(folder)

    with pytest.raises(signals.Ended), signals.raised():
        make(tmp_path / "a", lose)
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

    with pytest.raises(ArtifactError, match=r"No space left on device; free disk space, or"):
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


def test_another_disk_that_is_full_is_not_said_to_be_this_one(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        error = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/scratch")
        raise BuildError("the compiler ended: /elsewhere is full") from error

    with pytest.raises(BuildError, match="the compiler ended: /elsewhere is full"):
        make(tmp_path / "a", fail)


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


def test_every_changed_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    path = made.folder / MANIFEST
    whole = path.read_bytes()
    assert len(whole) > 450
    passed = []
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place)
        try:
            Artifact.read(made.folder).verify()
            passed.append(place)
        except ArtifactError:
            continue
    assert passed == []
    path.write_bytes(whole)
    Artifact.read(made.folder).verify()


def test_the_seal_is_of_what_is_claimed_and_the_digest_of_the_files(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    told = make(tmp_path / "b", lambda folder: {**write_files(folder), "top1": 0.9})
    assert first.digest == told.digest
    assert first.seal != told.seal
    again = artifact.make(
        tmp_path / "c",
        kind=first.kind,
        name=first.name,
        key=first.key,
        made_from=first.made_from,
        tools=first.tools,
        build=write_files,
        beside={"seconds": 3.5, "date": "2026-01-02 03:04", "checkpoint": "/elsewhere/x.pth"},
    )
    assert again.seal == first.seal
    assert again.made() == Made(3.5, "2026-01-02 03:04", "/elsewhere/x.pth")


def test_what_is_known_of_the_making_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    assert set(made.files) == {"model.bin", "weights/w.bin"}
    path = made.folder / MADE
    for text in ("", "{", "[]", '{"seconds": "x"}', "[" * 100_000, "\0" * 2_000_000):
        path.write_text(text)
        made.verify()
        assert made.made() == Made()
    path.unlink()
    made.verify()
    assert made.made() == Made()
    # No day, path or time that nobody wrote down is shown.
    assert not any(dataclasses.asdict(made.made()).values())


def test_what_nobody_sealed_is_not_whole(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    parts = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    del parts["seal"]
    with pytest.raises(ArtifactError, match="has no seal"):
        Artifact(**parts).verify()


def test_an_artifact_of_an_earlier_version_is_read_and_is_not_whole(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    values = json.loads((made.folder / MANIFEST).read_text())
    for name in ("seal", "seals"):
        del values[name]
    (made.folder / MANIFEST).write_text(json.dumps({**values, "format": 1}, indent=1) + "\n")
    old = Artifact.read(made.folder)
    assert (old.seal, old.digest) == ("", made.digest)
    with pytest.raises(ArtifactError, match="has no seal: made by an older version; run python"):
        old.verify()
    # Ours all the same: what takes its place sets nothing aside.
    make(tmp_path / "a", write_one).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_seal_that_was_taken_away_makes_no_older_artifact(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    values = json.loads((made.folder / MANIFEST).read_text())
    del values["seal"]
    (made.folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="its seal is lost"):
        Artifact.read(made.folder)


def to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


def outside(path: Path) -> None:
    """A link whose target has the right content."""
    kept = path.parents[1] / f"kept-{path.name}"
    path.rename(kept)
    path.symlink_to(kept)


IRREGULAR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a linked file": (lambda f: outside(f / "model.bin"), "model.bin is a link"),
    "a linked folder": (lambda f: outside(f / "weights"), "weights does not belong .* a link"),
    "a foreign link": (lambda f: (f / "more").symlink_to("/etc"), "more does not .* a link"),
    "a broken link": (lambda f: (f / "more").symlink_to("nowhere"), "more does not .* a link"),
    "a pipe": (lambda f: os.mkfifo(f / "more"), "more does not .* a pipe, a socket"),
    "a pipe for a file": (lambda f: to_pipe(f / "model.bin"), "model.bin is a pipe"),
    "a socket": (lambda f: to_socket(f / "more"), "more does not .* a pipe, a socket"),
    "a socket for a file": (lambda f: to_socket(f / "model.bin"), "model.bin is a pipe, a socket"),
    "an empty folder": (lambda f: (f / "weights/more").mkdir(), "more does not .* a folder"),
    "a folder for a file": (
        lambda f: to_folder(f / "model.bin"),
        "model.bin is a folder",
    ),
    "a linked artifact": (to_link, "is a link, where an artifact belongs"),
    "linked facts of its making": (lambda f: outside(f / MADE), "made.json does not .* a link"),
    "a pipe for these": (lambda f: to_pipe(f / MADE), "made.json is a pipe"),
}


@pytest.mark.parametrize("what", IRREGULAR)
def test_artifacts_hold_regular_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path / "results" / "a")
    change, message = IRREGULAR[what]
    change(made.folder)
    with pytest.raises(ArtifactError, match=message):
        Artifact.read(made.folder).verify()


@pytest.mark.parametrize("change", [outside, to_pipe])
def test_a_manifest_is_a_regular_file(tmp_path: Path, change: Callable[[Path], None]) -> None:
    made = make(tmp_path / "results" / "a")
    change(made.folder / MANIFEST)
    with pytest.raises(ArtifactError, match=r"artifact\.json is a (link|pipe)"):
        Artifact.read(made.folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda f: (f / "more").symlink_to("/etc/hostname"),
        lambda f: (f / "more").symlink_to("/etc"),
        lambda f: (f / "more").mkdir(),
        lambda f: os.mkfifo(f / "more"),
    ],
)
def test_nothing_else_is_made_into_an_artifact(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    def build(folder: Path) -> dict[str, Any]:
        write(folder)
        return {}

    with pytest.raises(ArtifactError, match="more is a"):
        make(tmp_path / "a", build)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_holds_what_was_written(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    made.copy("weights/w.bin", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"w"
    (made.folder / "weights/w.bin").write_bytes(b"v")
    with pytest.raises(ArtifactError, match="has changed since it was written"):
        made.copy("weights/w.bin", tmp_path / "other")
    outside(made.folder / "model.bin")
    with pytest.raises(ArtifactError, match="is a link"):
        made.copy("model.bin", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_seals_of_its_sources_change_nothing_else(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    text, seal = made.restated({"onnx": "5" * 64})
    again = artifact.rewrite_manifest(made, text)
    assert again.seal == seal != made.seal
    assert (again.seals, again.key) == ({"onnx": "5" * 64}, made.key)
    assert (again.facts, again.files, again.inputs) == (made.facts, made.files, made.inputs)
    again.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ArtifactError, match="has changed meanwhile"):
        made.restated({})


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
    assert plain["format"] == 2
    assert plain["files"]["model.bin"] == {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
    }
    del plain["inputs"], plain["code"], plain["seal"]
    path.write_text(sealed(plain))
    assert (Artifact.read(tmp_path / "a").inputs, Artifact.read(tmp_path / "a").code) == (None, {})


def test_the_seal_is_announced_before_the_artifact_is_there(tmp_path: Path) -> None:
    """Who is killed in between leaves nothing of which no seal is stated."""
    announced: list[tuple[str, bool]] = []
    made = artifact.make(
        tmp_path / "a",
        kind="build",
        name="trt/fp16",
        key="k",
        made_from={},
        tools={},
        build=write_one,
        announce=lambda seal: announced.append((seal, (tmp_path / "a").exists())),
    )
    assert announced == [(made.seal, False)]


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
    with pytest.raises(ArtifactError, match=f"/{sorted(names)[0].split('/')[0]} does not belong"):
        made.verify()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", ".."])
def test_names_outside_are_refused(name: str, tmp_path: Path) -> None:
    made = make(tmp_path / "a", write_one)
    plain = json.loads((made.folder / MANIFEST).read_text())
    plain["files"] = {name: plain["files"]["only"]}
    del plain["seal"]
    (made.folder / MANIFEST).write_text(sealed(plain))
    with pytest.raises(ArtifactError, match="outside of its folder"):
        Artifact.read(made.folder)
    plain["files"] = {"a..b/..c": plain["files"][name]}
    (made.folder / MANIFEST).write_text(sealed(plain))
    assert list(Artifact.read(made.folder).files) == ["a..b/..c"]


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} is a folder, where a regular file"):
        Artifact.read(tmp_path)


def test_the_network_is_that_of_the_facts(tmp_path: Path) -> None:
    network = Network("x", ("a", "b"), (3, 2, 2), {"size": 2})
    made = make(tmp_path / "a", lambda folder: {"network": network.to_dict()})
    assert made.network() == network
    made.facts["network"].pop("labels")
    with pytest.raises(ArtifactError, match="the network is not stated in full: build it again"):
        made.network()
    with pytest.raises(ArtifactError, match="states no network: build it again"):
        make(tmp_path / "b", write_one).network()


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
