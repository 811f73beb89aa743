from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import files, replacing
from pipeline.core.errors import ArtifactError
from pipeline.core.replacing import Whose
from pipeline.steps import artifact
from pipeline.steps.artifact import MANIFEST, Artifact

ROOT = Path(__file__).parents[3]


def make(folder: Path, content: str = "one", said: list[str] | None = None) -> Artifact:
    def build(place: Path) -> dict[str, str]:
        (place / "deep").mkdir()
        (place / "deep" / "file").write_text(content)
        return {}

    say = (said if said is not None else []).append
    return artifact.make(
        folder, kind="k", name="n", key="k", made_from={}, tools={}, build=build, say=say
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def foreign_folder(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("precious")


def foreign_file(place: Path) -> None:
    place.write_text("precious")


def link_to_an_artifact(place: Path) -> None:
    make(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


def link_to_nothing(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize(
    "put_there", [foreign_folder, foreign_file, link_to_an_artifact, link_to_nothing]
)
def test_what_carries_no_manifest_is_refused_before_anything_is_built(
    tmp_path: Path, put_there: Callable[[Path], None]
) -> None:
    place = tmp_path / "export"
    put_there(place)
    before = names(tmp_path)

    def build(folder: Path) -> dict[str, str]:
        raise AssertionError("built")

    with pytest.raises(ArtifactError, match=r"export is in the way .* move it away"):
        artifact.make(place, kind="k", name="n", key="k", made_from={}, tools={}, build=build)
    assert names(tmp_path) == before
    assert place.is_symlink() or "precious" in {
        path.read_text() for path in [place, *place.glob("*")] if path.is_file()
    }


def test_what_appears_while_something_is_built_is_refused_too(tmp_path: Path) -> None:
    place = tmp_path / "export"

    def build(folder: Path) -> dict[str, str]:
        foreign_folder(place)
        return {}

    with pytest.raises(ArtifactError, match="in the way"):
        artifact.make(place, kind="k", name="n", key="k", made_from={}, tools={}, build=build)
    assert names(tmp_path) == ["export"]
    assert names(place) == ["thesis.txt"]


def test_an_empty_folder_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    make(tmp_path / "export").verify()
    assert names(tmp_path) == ["export"]


def add_file(place: Path) -> None:
    (place / "deep" / "notes.txt").write_text("mine")


def add_folder(place: Path) -> None:
    (place / "photos").mkdir()


def add_link(place: Path) -> None:
    (place / "link").symlink_to("/")


def link_for_file(place: Path) -> None:
    (place / "deep" / "file").rename(place / "deep" / "moved")
    (place / "deep" / "file").symlink_to("moved")


def damage_manifest(place: Path) -> None:
    (place / MANIFEST).write_text("{")


@pytest.mark.parametrize("change", [add_file, add_folder, add_link, link_for_file, damage_manifest])
def test_an_artifact_with_other_files_is_set_aside_whole_and_said(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    place, said = tmp_path / "export", list[str]()
    make(place, "old")
    change(place)
    held = sorted(path.relative_to(place) for path in place.rglob("*"))
    made = make(place, "new", said)
    made.verify()
    assert made.path("deep/file").read_text() == "new"
    aside = next(path for path in tmp_path.iterdir() if path != place)
    assert names(tmp_path) == ["export", aside.name]
    assert said == [f"what was there was set aside as {aside.name}"]
    assert replacing.is_set_aside(aside)
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == held
    assert (aside / "deep" / "file").read_text() == "old"


def test_an_artifact_alone_is_replaced_and_nothing_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    made = make(tmp_path / "export", "old")
    (made.folder / "deep" / "file").write_text("damaged")
    make(tmp_path / "export", "new", said)
    assert (names(tmp_path), said) == (["export"], [])


def test_what_is_set_aside_at_once_has_names_of_its_own(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "a").write_text(str(number))
        replacing.set_aside(tmp_path / "a")
    kept = [path for path in tmp_path.iterdir() if replacing.is_set_aside(path)]
    assert sorted(path.read_text() for path in kept) == ["0", "1", "2"]


KILLED = """
import os, sys
from pathlib import Path
from pipeline.steps import artifact
folder, calls = Path(sys.argv[1]), []
original = Path.rename
def rename(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    return original(self, target)
Path.rename = Path.replace = rename
artifact.make(folder, kind="k", name="n", key="k", made_from={}, tools={},
              build=lambda place: (place / "file").write_text("new") and {})
"""


@pytest.mark.parametrize("move", [1, 2])
def test_after_a_kill_between_two_moves_the_old_one_is_there_again(
    tmp_path: Path, move: int
) -> None:
    make(tmp_path / "export", "old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "export"), str(move)]
    run = subprocess.run(command, cwd=ROOT, check=False)
    assert run.returncode == 9
    assert (tmp_path / "export").exists() == (move == 1)
    replacing.sweep(tmp_path)
    assert names(tmp_path) == ["export"]
    assert Artifact.read(tmp_path / "export").path("deep/file").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(5, "Input/output error"), ArtifactError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_after_a_move_that_fails_the_old_one_is_there_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    make(tmp_path / "export", "old")
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(raised):
        make(tmp_path / "export", "new")
    assert names(tmp_path) == ["export"]
    assert (tmp_path / "export/deep/file").read_text() == "old"


def leave(folder: Path, place: str = "export") -> Path:
    """A workspace as a killed run leaves it."""
    work = folder / f".making-{place}-abcd_123"
    (work / "new").mkdir(parents=True)
    (work / "new" / "half").write_text("x")
    (work / "made-by-care-deploy").write_bytes(os.fsencode(place))
    return work


def no_mark(work: Path) -> None:
    (work / "made-by-care-deploy").unlink()


def mark_of_another(work: Path) -> None:
    (work / "made-by-care-deploy").write_text("onnx")


def other_things_in_it(work: Path) -> None:
    (work / "film.mkv").write_text("precious")


def another_name(work: Path) -> None:
    work.rename(work.with_name(".making-of"))


@pytest.mark.parametrize("change", [no_mark, mark_of_another, other_things_in_it, another_name])
def test_only_our_own_leftovers_are_swept(tmp_path: Path, change: Callable[[Path], None]) -> None:
    change(leave(tmp_path))
    (tmp_path / ".making-plans").write_text("precious")
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    leave(tmp_path / "mine" / "deep")  # too deep for one of ours: a copy of somebody's
    (tmp_path / ".making-link-abcd_123").symlink_to("mine")
    before = sorted(tmp_path.rglob("*"))
    replacing.sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_leftovers_at_both_depths_are_swept(tmp_path: Path) -> None:
    (tmp_path / "trt").mkdir()
    leave(tmp_path)
    leave(tmp_path / "trt", "fp16")
    (leave(tmp_path, "cut") / "made-by-care-deploy").write_text("c")
    (tmp_path / ".making-unmarked-abcd_123").mkdir()
    replacing.sweep(tmp_path)
    assert names(tmp_path) == ["trt"]
    assert names(tmp_path / "trt") == []


@pytest.mark.parametrize("kind", ["content", "folder", "link"])
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "report.md", tmp_path / "target"
    target.write_text("precious")
    if kind == "content":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("target")
    with pytest.raises(ArtifactError, match=r"report\.md is in the way"):
        files.write_atomically(path, "ours", lambda path: path.read_text() == "ours")
    assert target.read_text() == "precious"
    assert os.path.lexists(path)
    assert names(tmp_path) == ["report.md", "target"]


def test_our_own_and_empty_files_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    for before in ("ours, old", ""):
        path.write_text(before)
        files.write_atomically(path, "ours", lambda path: path.read_text().startswith("ours"))
        assert path.read_text() == "ours"
    assert names(tmp_path) == ["report.md"]


def test_a_link_in_place_of_a_file_is_not_ours(tmp_path: Path) -> None:
    file = make(tmp_path / "export").path("deep/file")
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    assert artifact.whose_folder(tmp_path / "export") is Whose.MIXED


@pytest.mark.parametrize(("free", "full"), [(0, True), (60_000, True), (10**6, False)])
def test_when_a_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, full: bool
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert replacing.disk_is_full(tmp_path) == full


def test_whose_it_is(tmp_path: Path) -> None:
    place = tmp_path / "export"
    assert artifact.whose_folder(place) is Whose.FREE
    make(place)
    assert artifact.whose_folder(place) is Whose.OURS
    add_file(place)
    assert artifact.whose_folder(place) is Whose.MIXED
    (place / MANIFEST).unlink()
    assert artifact.whose_folder(place) is Whose.FOREIGN


@pytest.mark.parametrize(
    ("stated", "verb"),
    [
        (None, "write out/model"),
        ("out/model", "write out/model"),
        ("out/model/part", "write out/model"),
        ("out", "write out/model"),
        ("out/.making-model-abcdefgh/new/part", "write out/model"),
        ("out/model.before-20250203-040506", "write out/model"),
        ("out/other", "read out/other"),
        ("/data/image.png", "read /data/image.png"),
        (b"/data/\xff.png", "read /data/\\udcff.png"),
        (7, "write out/model"),
    ],
)
def test_what_could_not_be_read_is_not_called_unwritable(stated: object, verb: str) -> None:
    error = OSError(errno.EACCES, "Permission denied", stated)
    message = str(ArtifactError(replacing.cannot_write(Path("out/model"), error)))
    assert message.startswith(f"cannot {verb}: Permission denied; make ")
    assert ("another output folder" in message) == verb.startswith("write")


@pytest.mark.parametrize(
    ("number", "is_full"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EROFS, False)],
)
def test_disk_space_is_asked_for_where_there_is_none_and_nowhere_else(
    number: int, is_full: bool
) -> None:
    message = replacing.cannot_write("out", OSError(number, os.strerror(number)))
    assert ("; free disk space, or choose" in message) is is_full
    assert ("; make the folder writable, or choose" in message) is not is_full


def test_a_file_whose_owner_cannot_be_told_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.log"
    path.write_text("x")

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(ArtifactError, match=r"cannot read .*run\.log: Permission denied; make it"):
        files.refuse_foreign_file(path, refuse)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ArtifactError, match=r"cannot read .*: Permission denied; make it"):
        artifact.whose_folder(tmp_path)


def test_names_that_are_not_utf8_can_be_written_to(tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xff")
    make(tmp_path / name)
    assert names(tmp_path) == [name]
    files.write_atomically(tmp_path / f"{name}.md", f"a page about {name}")
    assert (tmp_path / f"{name}.md").read_bytes() == b"a page about x\\udcff"
    leave(tmp_path, name)
    replacing.sweep(tmp_path)
    assert names(tmp_path) == [name, f"{name}.md"]
