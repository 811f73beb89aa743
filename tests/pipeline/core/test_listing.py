"""Which files a split consists of: the same ones for who hashes and who reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.core.listing import Files, Folders, expand_braces, list_split, parse


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def files_of(root: Path, split: str) -> list[str]:
    listed = list_split(f"folder:{root}", split, root)
    assert isinstance(listed, Folders)
    return [f"{folder}/{file.name}" for folder, files in listed.images() for file in files]


def test_a_split_of_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/bee/a.png", "train/ant/b.png", "val/bee/in/c.png", "val/bee/b.png")
    assert files_of(tmp_path, "train") == ["ant/b.png", "bee/a.png"]
    assert files_of(tmp_path, "calibration") == ["ant/b.png", "bee/a.png"]
    assert files_of(tmp_path, "validation") == ["bee/b.png", "bee/in/c.png"]
    listed = list_split(f"folder:{tmp_path}", "train", tmp_path)
    assert isinstance(listed, Folders)
    assert listed.root == tmp_path / "train"
    assert listed.classes == ("ant", "bee")


def test_every_folder_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train/bee/a.png", "val/ant/b.png", "val/bee/in/c.png", "val/bee/b.png")
    scanned: list[str] = []
    scan = os.scandir

    def counted(folder: Path) -> Any:
        scanned.append(str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", counted)
    assert files_of(tmp_path, "validation") == ["ant/b.png", "bee/b.png", "bee/in/c.png"]
    below = [path for path in scanned if path.startswith(f"{tmp_path}/val/")]
    assert sorted(below) == [f"{tmp_path}/val/{name}" for name in ("ant", "bee", "bee/in")]


def test_folders_that_are_no_classes_are_refused_before_anything_is_hashed(tmp_path: Path) -> None:
    write(tmp_path / "sets", "cats/a.png", "flowers/Train/b.png", "flowers/Val/c.png")
    write(tmp_path / "sets", "flowers/README.md")
    with pytest.raises(DataError, match=r"sets/flowers holds Train/, Val/: it is a dataset"):
        files_of(tmp_path / "sets", "validation")
    write(tmp_path / "seg", "seg_test/sea/a.png", "seg_train/sea/b.png")
    with pytest.raises(DataError, match=r"seg has seg_test/, seg_train/, which hold the same"):
        files_of(tmp_path / "seg", "validation")


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk", "ant/a.png", "ant/.hidden.png", "bee/b.png")
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/val").symlink_to(tmp_path / "disk")
    (tmp_path / "data/train/ant").symlink_to(tmp_path / "disk/ant")
    assert files_of(tmp_path / "data", "validation") == ["ant/a.png", "bee/b.png"]
    assert files_of(tmp_path / "data", "train") == ["ant/a.png"]


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "images/ant/a.png", "x.tar", "s-0.tar")
    for uri in ("folder:~/images", "tar:~/x.tar", "wds:~/s-{0..0}.tar"):
        listed = list_split(uri, "validation", tmp_path)
        assert listed.root.is_relative_to(tmp_path)


def test_a_tar_file_counts_by_its_content_alone(tmp_path: Path) -> None:
    write(tmp_path, "x.tar")
    listed = list_split(f"tar:{tmp_path}/x.tar", "validation", tmp_path)
    assert listed == Files(tmp_path / "x.tar", (".",), (".",))
    assert (tmp_path / "x.tar" / ".").read_text() == "x.tar"


def test_shards_and_the_names_of_their_classes(tmp_path: Path) -> None:
    write(tmp_path, "a/s-0.tar", "a/s-1.tar", "b/s-0.tar", "a/other.tar")
    two = list_split(f"wds:{tmp_path}/a/s-{{0..1}}.tar", "train", tmp_path)
    assert two == Files(tmp_path / "a", ("s-0.tar", "s-1.tar"), ("s-0.tar", "s-1.tar"))
    write(tmp_path, "a/classes.txt")
    named = list_split(f"wds:{tmp_path}/{{a,b}}/s-0.tar", "train", tmp_path)
    assert named == Files(tmp_path, ("a/s-0.tar", "b/s-0.tar", "a/classes.txt"), ("a/classes.txt",))


def test_the_embedded_splits(tmp_path: Path) -> None:
    listed = list_split("fashion-mnist", "calibration", tmp_path)
    assert isinstance(listed, Files)
    assert listed.root == tmp_path
    assert [name.partition("-")[0] for name in listed.names[1:]] == ["calibration"] * 2
    assert listed.labels == ("labels.txt",)
    with pytest.raises(DataError, match="carries no train split"):
        list_split("fashion-mnist", "train", tmp_path)


def test_names_of_datasets() -> None:
    assert parse("folder:/a:b") == ("folder", "/a:b")
    assert parse("fashion-mnist") == ("fashion-mnist", "")
    with pytest.raises(DataError, match=r"did you mean folder\?"):
        parse("foldr:/x")
    with pytest.raises(DataError, match="lacks a path"):
        parse("tar:")


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_listing_loads_neither_numpy_nor_torch() -> None:
    program = (
        "import sys, pipeline.core.listing, pipeline.core.hashes\n"
        "print({'numpy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
