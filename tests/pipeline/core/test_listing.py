"""Which files a split consists of: the same ones for who hashes and who reads them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.core.listing import (
    IMAGENET_ARCHIVES,
    KINDS,
    SPLITS,
    Files,
    Folders,
    embedded_files,
    expand_braces,
    images_below,
    is_hidden,
    is_image,
    list_split,
    parse,
    require_image,
)


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
        assert Path(str(listed.root)).is_relative_to(tmp_path)


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
    assert SPLITS == ("train", "validation", "calibration")
    assert KINDS == ("folder", "tar", "wds", "imagenet", "fashion-mnist")
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


@pytest.mark.parametrize(
    "ending",
    ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "JPG", "Png"],
)
def test_endings_of_images(ending: str, tmp_path: Path) -> None:
    assert is_image(f"a.{ending}")
    require_image(f"a.{ending}", "there")
    for name in (f"a{ending}", f"a.{ending}.txt", ending):
        assert not is_image(name)


def test_what_operating_systems_leave_behind_is_not_seen(tmp_path: Path) -> None:
    hidden = (".DS_Store", "._a.png", "__MACOSX", "Thumbs.db", "desktop.ini")
    assert all(map(is_hidden, hidden))
    assert not is_hidden("a.png")
    write(
        tmp_path,
        "ant/a.png",
        "__MACOSX/x",
        ".git/y",
        *(f"ant/{n}" for n in hidden if n != "__MACOSX"),
    )
    assert files_of(tmp_path, "train") == ["ant/a.png"]
    listed = list_split(f"folder:{tmp_path}", "train", tmp_path)
    assert isinstance(listed, Folders)
    assert listed.classes == ("ant",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant/notes.txt",), r"ant/notes\.txt is not an image \(\.bmp, \.gif, .*\): move it out"),
        (("ant/a.png", "bee/.hidden"), r"class folder .*/bee has no images: fill or remove it"),
        (("ant/a.png", "stray.png"), r"stray\.png lies outside the class folders: move it"),
        (("a.png", "b.png"), r"holds 2 images but no class folders: put the images of each class"),
        (("notes.txt",), r"holds no class folders: put"),
        (("ant/train/a/x.png", "bee/a.png"), r"ant holds train/: it is a dataset"),
        (("val/a/x.png",), r"has val/ but no train/ or training/ for the train split"),
        (("/".join(["a"] * 18) + "/x.png", "b/x.png"), "lies more than 16 folders deep"),
    ],
)
def test_folders_that_are_no_dataset(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        files_of(tmp_path, "train")


def test_images_may_lie_sixteen_folders_below_their_class(tmp_path: Path) -> None:
    name = "/".join(["a"] * 17) + "/x.png"
    write(tmp_path, name, "b/x.png")
    assert files_of(tmp_path, "train") == [name, "b/x.png"]


def test_a_text_beside_the_class_folders_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, "ant/a.png", "LICENSE.txt")
    assert files_of(tmp_path, "train") == ["ant/a.png"]


def test_a_folder_alone_above_the_splits_or_classes_is_passed(tmp_path: Path) -> None:
    write(tmp_path, "one/images/train/ant/a.png", "one/images/train/bee/b.png", "one/README")
    assert files_of(tmp_path / "one", "train") == ["ant/a.png", "bee/b.png"]
    write(tmp_path, "two/images/ant/a.png", "two/images/bee/b.png")
    assert files_of(tmp_path / "two", "train") == ["ant/a.png", "bee/b.png"]
    # One class alone holds images, and an image beside a folder says that this is the place.
    write(tmp_path, "three/ant/a.png")
    assert files_of(tmp_path / "three", "train") == ["ant/a.png"]
    write(tmp_path, "four/images/ant/a.png", "four/cover.png")
    with pytest.raises(DataError, match=r"cover\.png lies outside"):
        files_of(tmp_path / "four", "train")


def test_a_class_may_be_called_as_a_split(tmp_path: Path) -> None:
    write(tmp_path, "train/a.png", "bus/b.png")
    assert files_of(tmp_path, "validation") == ["bus/b.png", "train/a.png"]
    write(tmp_path, "train/deep/c.png")
    found = ["bus/b.png", "train/a.png", "train/deep/c.png"]
    assert files_of(tmp_path, "validation") == found


def test_what_is_not_there_is_said_with_what_to_write(tmp_path: Path) -> None:
    write(tmp_path, "x.tar", "data/ant/a.png")
    for uri, message in (
        ("folder:gone", "no folder at gone: check the path"),
        (f"folder:{tmp_path}/x.tar", r"is a file, not a folder \(a tar file opens with tar:/"),
        ("folder:a\0b", "the folder .* "),
        ("tar:gone", "no tar file at gone: check the path"),
        (f"tar:{tmp_path}/data", "no tar file at"),
        ("tar:a\0b", "the tar file .* "),
        ("wds:a\0b.tar", "the shard .* "),
        ("imagenet:a\0b", "the folder .* is no path"),
        (f"imagenet:{tmp_path}/x.tar", "no folder at .*: name the folder that holds the archives"),
        (f"{tmp_path}/data", f"lacks its kind: write folder:{tmp_path}/data"),
        (f"{tmp_path}/x.tar", f"lacks its kind: write tar:{tmp_path}/x.tar"),
        ("nonsense:x", "unknown kind of dataset 'nonsense'"),
        ("folder:", "lacks a path: write folder:PATH"),
        ("wds:gone-{0..2}.tar", r"3 of 3 shards are missing, the first is gone-0\.tar"),
        (f"wds:{tmp_path}/*.zip", r"no shard matches .*\*\.zip: check the path"),
        ("wds:/gone/*.tar", "folder /gone cannot be read: No such file"),
        ("wds:x-{3..1}.tar", "no shard matches"),
    ):
        with pytest.raises(DataError, match=message):
            list_split(uri, "validation", tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, "ant/a.png")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"folder .* cannot be read: Permission denied"):
        list_split(f"folder:{tmp_path}", "train", tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-*.tar", ["s-0.tar", "s-1.tar", "s-10.tar"]),
        ("s-?.tar", ["s-0.tar", "s-1.tar"]),
        ("s-[1]*.tar", ["s-1.tar", "s-10.tar"]),
        ("{s-1*,s-0}.tar", ["s-1.tar", "s-10.tar", "s-0.tar"]),
    ],
)
def test_wildcards_name_shards_in_order(pattern: str, names: list[str], tmp_path: Path) -> None:
    write(tmp_path, "s-10.tar", "s-1.tar", "s-0.tar", "other.txt", "in/s-2.tar")
    listed = list_split(f"wds:{tmp_path}/{pattern}", "validation", tmp_path)
    assert listed == Files(tmp_path, tuple(names), tuple(names))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{9..11}", ["9", "10", "11"]),
        ("{09..11}", ["09", "10", "11"]),
        ("{0..1}", ["0", "1"]),
        ("{000..001}x", ["000x", "001x"]),
        ("{5..5}", ["5"]),
        ("{5..4}", []),
        ("a{b}c", ["abc"]),
        ("{a,}", ["a", ""]),
        ("X,Y", ["X,Y"]),
        ("{1..2}{a,b}{3}", ["1a3", "1b3", "2a3", "2b3"]),
    ],
)
def test_braces_as_a_shell_expands_them(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{a", "a}", "{a,{b}}", "}{"])
def test_braces_in_pairs(pattern: str) -> None:
    with pytest.raises(DataError, match="are not in pairs"):
        expand_braces(pattern)


def test_too_many_shards_are_refused_before_they_are_listed() -> None:
    assert len(expand_braces("{1..1000}{1..1000},")) == 10**6
    for pattern in (
        "{0..1000000}",
        "{1..1000}{0..1000}",
        "{0..999999999999999999}",
        "{a,b}{1..500001}",
    ):
        with pytest.raises(DataError, match="name at most 1000000"):
            expand_braces(pattern)


def test_the_names_of_the_embedded_files() -> None:
    assert embedded_files("validation") == (
        "labels.txt",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    assert embedded_files("calibration")[1] == "calibration-images-idx3-ubyte.gz"


TRAIN, VALIDATION, DEVKIT, STATED = IMAGENET_ARCHIVES


@pytest.mark.parametrize(
    ("split", "present", "expected"),
    [
        ("train", IMAGENET_ARCHIVES, (TRAIN,)),
        ("calibration", IMAGENET_ARCHIVES, (TRAIN,)),
        ("train", (TRAIN,), (TRAIN,)),
        ("validation", IMAGENET_ARCHIVES, (VALIDATION, DEVKIT)),
        ("validation", (VALIDATION, DEVKIT, "notes.txt"), (VALIDATION, DEVKIT)),
        ("validation", (VALIDATION, STATED), (VALIDATION, STATED)),
    ],
)
def test_each_split_of_imagenet_has_its_archive(
    split: str, present: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path, *present)
    listed = list_split(f"imagenet:{tmp_path}", split, tmp_path)
    assert listed == Files(tmp_path, expected, expected)


@pytest.mark.parametrize(
    ("split", "present", "message"),
    [
        ("train", (VALIDATION, DEVKIT), f"no {TRAIN} in FOLDER (for unpacked images"),
        ("validation", (TRAIN, DEVKIT), f"no {VALIDATION} in FOLDER (for unpacked images"),
        (
            "train",
            (VALIDATION, "ILSVRC2012_img_train_t3.tar", "other.tar"),
            f"no {TRAIN} in FOLDER; ILSVRC2012_img_train_t3.tar is another archive (for",
        ),
        (
            "validation",
            (VALIDATION, TRAIN),
            f"nothing says what they show: put {DEVKIT} or {STATED}",
        ),
        ("validation", (VALIDATION, f"{DEVKIT}/in.txt"), "nothing says what they show"),
    ],
)
def test_what_imagenet_lacks_is_named(
    split: str, present: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    write(tmp_path, *present)
    with pytest.raises(DataError, match=re.escape(message.replace("FOLDER", str(tmp_path)))):
        list_split(f"imagenet:{tmp_path}", split, tmp_path)


def test_images_of_a_folder_and_of_those_in_it(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a/z.JPG", "a/notes.txt", "c.png/d.gif")
    write(tmp_path, ".trash/x.png", "a/__MACOSX/y.png", "a/._z.jpg")
    assert [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)] == [
        "a/z.JPG",
        "b.png",
        "c.png/d.gif",
    ]
    # What lies above the folder that was asked for hides nothing.
    assert list(images_below(tmp_path / ".trash")) == [tmp_path / ".trash/x.png"]


def test_folders_are_classes_unless_images_alone_will_do(tmp_path: Path) -> None:
    write(tmp_path, "ant/a.png")
    for needed in (True, False):
        listed = list_split(f"folder:{tmp_path}", "train", tmp_path, labels_needed=needed)
        assert isinstance(listed, Folders)
        assert (listed.classes, listed.labelled) == (("ant",), True)
    write(tmp_path, "stray.png")
    loose = list_split(f"folder:{tmp_path}", "train", tmp_path, labels_needed=False)
    assert isinstance(loose, Folders)
    assert not loose.labelled
    assert [folder for folder, _ in loose.images()] == [".", "./ant"]
