"""The archives in miniature: three classes, as tar files in a tar file, like ILSVRC 2012's."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import click.testing
import numpy as np
import pytest
from PIL import Image

from care import imagenet, train
from care.data import Dataset, open_dataset
from care.data import imagenet as archives
from care.data.matlab import read_structs
from pipeline.core.errors import DataError

CLASSES = ("n01440764", "n02100735", "n02119789")
NUMBERS = {"n02119789": 1, "n02100735": 2, "n01440764": 3}
"""As in tests/data/imagenet/meta.mat: not in alphabetical order, like the real ones."""

SHOWN = ("n02100735", "n01440764", "n02119789", "n01440764")
"""What the four validation images show."""

Result = click.testing.Result


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def training() -> dict[str, bytes]:
    """Members of the training archive: a tar file for each class."""
    found = {}
    for label, name in enumerate(CLASSES):
        images = {f"{name}_{10 * n}.JPEG": picture(10 * label + n) for n in range(4, 0, -1)}
        found[f"{name}.tar"] = tar_of(images)
    return found


def validation() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{n:08}.JPEG": picture(100 + n) for n in range(1, 5)}


def development_kit(data: Path, truth: str) -> bytes:
    top = "ILSVRC2012_devkit_t12"
    return tar_of(
        {
            f"{top}/readme.txt": b"hello",
            f"{top}/data/meta.mat": (data / "imagenet/meta.mat").read_bytes(),
            f"{top}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        },
        "w:gz",
    )


TRUTH = "".join(f"{NUMBERS[name]}\n" for name in SHOWN)


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    """The archives and their checksums."""
    root = tmp_path / "archives"
    root.mkdir()
    (root / archives.TRAIN).write_bytes(tar_of(training()))
    (root / archives.VALIDATION).write_bytes(tar_of(validation()))
    (root / archives.DEVKIT).write_bytes(development_kit(data, TRUTH))
    write_sums(root)
    return root


def write_sums(root: Path) -> None:
    lines = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.name}\n"
        for path in sorted(root.glob("ILSVRC*"))
    ]
    (root / "sums.txt").write_text("".join(lines))


def run(*arguments: object) -> Result:
    return click.testing.CliRunner().invoke(imagenet.main, [str(value) for value in arguments])


def content(dataset: Dataset) -> dict[str, tuple[int, str, bytes]]:
    """Label, hash and pixels of every image, by its bare name."""
    return {
        Path(dataset.name(i)).stem: (
            dataset.label(i),
            dataset.hash(i),
            dataset.image(i).tobytes(),
        )
        for i in range(len(dataset))
    }


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_archives_are_read_in_place(folder: Path) -> None:
    train = open_dataset(f"imagenet:{folder}", "train")
    assert train.classes == CLASSES
    assert len(train) == 12
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert train.name(0) == "n01440764/n01440764_10.JPEG"
    assert train.hash(0) == hashlib.sha256(picture(1)).hexdigest()
    assert train.image(11).size == (48, 40)

    judged = open_dataset(f"imagenet:{folder}", "validation")
    assert judged.classes == CLASSES
    found = {Path(judged.name(i)).name: judged.classes[judged.label(i)] for i in range(4)}
    assert found == {f"ILSVRC2012_val_{n:08}.JPEG": name for n, name in enumerate(SHOWN, 1)}
    number = judged.names.index(f"{SHOWN[2]}/ILSVRC2012_val_00000003.JPEG")  # type: ignore[attr-defined]
    assert judged.hash(number) == hashlib.sha256(picture(103)).hexdigest()


def test_the_index_is_made_once_and_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_dataset(f"imagenet:{folder}", "train")
    monkeypatch.setattr(archives, "members", None)
    again = open_dataset(f"imagenet:{folder}", "train")
    assert first.identity() == again.identity()
    assert isinstance(again.labels, np.memmap)
    assert again.labels.filename == first.labels.filename  # type: ignore[attr-defined]
    assert not list((folder / ".care-index").glob("*.tmp"))


def test_another_archive_has_another_index(folder: Path) -> None:
    before = open_dataset(f"imagenet:{folder}", "train").identity()
    members = training()
    del members["n02119789.tar"]
    (folder / archives.TRAIN).write_bytes(tar_of(members))
    after = open_dataset(f"imagenet:{folder}", "train")
    assert after.classes == CLASSES[:2]
    assert after.identity() != before


def test_where_nothing_can_be_written_the_index_lies_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / ".care-index").write_text("a file in its way")
    assert len(open_dataset(f"imagenet:{folder}", "train")) == 12
    assert list((tmp_path / "cache/care-deploy").glob("ILSVRC2012_img_train-*/places.npy"))


def test_a_list_of_classes_may_take_the_place_of_the_development_kit(folder: Path) -> None:
    expected = content(open_dataset(f"imagenet:{folder}", "validation"))
    (folder / archives.DEVKIT).unlink()
    (folder / archives.LABELS).write_text("\n".join(SHOWN) + "\n")
    assert content(open_dataset(f"imagenet:{folder}", "validation")) == expected


@pytest.mark.parametrize("name", ["meta.mat", "meta_plain.mat"])
def test_matlab_files_are_read(data: Path, name: str) -> None:
    """Written by scipy, packed and plain."""
    rows = read_structs((data / "imagenet" / name).read_bytes(), "synsets")
    assert {row["WNID"]: row["ILSVRC2012_ID"] for row in rows} == {
        **{name: [number] for name, number in NUMBERS.items()},
        "n00001740": [4],
    }
    assert rows[0]["words"] == "kit fox"
    assert rows[3]["children"] == [1, 2, 3]


def test_damaged_matlab_files_are_value_errors(data: Path) -> None:
    whole = (data / "imagenet/meta_plain.mat").read_bytes()
    with pytest.raises(ValueError, match="no variable cats"):
        read_structs(whole, "cats")
    refused = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        for text in (bytes(damaged), whole[:place]):
            try:
                read_structs(text, "synsets")
            except ValueError:
                refused += 1
    assert refused > 100


def test_tars_folder_and_shards_are_the_same_dataset(folder: Path, tmp_path: Path) -> None:
    more = ("--checksums", folder / "sums.txt", "--workers", 2)
    for kind, flags in (("tree", ()), ("shards", ("--shards",))):
        result = run("prepare", folder, "--to", tmp_path / kind, *flags, *more)
        assert result.exit_code == 0, result.output
    for split, name in (("train", "train"), ("validation", "val")):
        expected = open_dataset(f"imagenet:{folder}", split)
        tree = open_dataset(f"folder:{tmp_path}/tree", split)
        shards = open_dataset(f"wds:{tmp_path}/shards/{name}/*.tar", split)
        assert expected.classes == tree.classes == shards.classes
        assert content(expected) == content(tree) == content(shards)
        # The order is the same, too, so that a training on either takes the same steps.
        assert [tree.name(i) for i in range(len(tree))] == [
            expected.name(i) for i in range(len(expected))
        ]
    assert not [path for path in tmp_path.rglob("*.tmp") if ".care-index" not in str(path)]


@pytest.mark.soak
def test_training_takes_the_same_steps_on_tars_folder_and_shards(
    folder: Path, tmp_path: Path
) -> None:
    """The first fifty losses are the same to the last bit."""
    more = ("--checksums", folder / "sums.txt")
    for kind, flags in (("tree", ()), ("shards", ("--shards",))):
        assert run("prepare", folder, "--to", tmp_path / kind, *flags, *more).exit_code == 0
    shards = f"wds:{tmp_path}/shards"
    places = {
        "tars": (f"imagenet:{folder}", f"imagenet:{folder}"),
        "tree": (f"folder:{tmp_path}/tree", f"folder:{tmp_path}/tree"),
        "shards": (f"{shards}/train/*.tar", f"{shards}/val/*.tar"),
    }
    losses = {}
    for name, (data, validation) in places.items():
        settings = ["--model", "care_tiny", "--image-size", "32", "--batch-size", "4"]
        settings += ["--data", data, "--validation", validation, "--workers", "0", "--threads", "1"]
        settings += ["--epochs", "17", "--warmup-epochs", "1", "--distillation", "none"]
        settings += ["--log-every", "1", "--no-tensorboard", "--save-minutes", "60"]
        settings += ["--name", name, "--output", str(tmp_path / "runs")]
        result = click.testing.CliRunner().invoke(train.main, settings)
        assert result.exit_code == 0, result.output
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        steps = [event for event in map(json.loads, lines) if event["kind"] == "step"]
        losses[name] = [event["loss"] for event in steps][:50]
    assert len(set(losses["tars"])) == 50
    assert losses["tars"] == losses["tree"] == losses["shards"]


def test_a_preparation_that_was_interrupted_goes_on(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tree"
    more = ("prepare", folder, "--to", target, "--checksums", folder / "sums.txt")
    assert run(*more).exit_code == 0
    expected = digests(target)
    victims = sorted(target.rglob("*.JPEG"))[::5]
    kept = sorted(target.rglob("*.JPEG"))[1]
    stamp = kept.stat().st_mtime_ns
    victims[0].unlink()
    for path in victims[1:]:
        path.write_bytes(path.read_bytes()[:50])
    assert run(*more).exit_code == 0
    assert digests(target) == expected
    assert kept.stat().st_mtime_ns == stamp


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = run(
        "prepare",
        folder,
        "--to",
        tmp_path / "tree",
        "--checksums",
        folder / "sums.txt",
        "--dry-run",
    )
    assert result.exit_code == 0, result.output
    assert "train: 12 images of 3 classes" in result.output
    assert not (tmp_path / "tree").exists()


def test_something_else_in_the_folder_is_told(folder: Path, tmp_path: Path) -> None:
    stray = tmp_path / "tree/train/n01440764/stray.JPEG"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(picture(7))
    result = run("prepare", folder, "--to", tmp_path / "tree", "--checksums", folder / "sums.txt")
    assert result.exit_code == 2
    assert "stray" in result.stderr
    assert stray.read_bytes() == picture(7)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = run("prepare", folder, "--to", tmp_path / "tree", "--checksums", folder / "sums.txt")
    assert result.exit_code == 2
    assert "are free there" in result.stderr
    assert not (tmp_path / "tree").exists()


def test_archives_are_verified(folder: Path) -> None:
    result = run("verify", folder, "--checksums", folder / "sums.txt")
    assert result.exit_code == 0, result.output
    assert "val: 4 images of 3 classes" in result.output
    # Without a table of their own they are taken for ILSVRC 2012's, by torchvision's table.
    result = run("verify", folder)
    assert result.exit_code == 2
    assert "1d675b47d978889d74fa0da5fadfb00e" in result.stderr
    result = run("prepare", folder, "--to", folder / "tree", "--skip-checksums")
    assert "ILSVRC 2012 has 1,281,167 of 1000" in result.stderr


def refused(folder: Path, split: str) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(f"imagenet:{folder}", split)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".care-index/*[!k]"))  # no index of it, whole or half
    return str(caught.value)


def test_half_packed_and_foreign_archives_are_refused(folder: Path) -> None:
    train, judged = folder / archives.TRAIN, folder / archives.VALIDATION
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(folder, "train")
    train.write_bytes(gzip.compress(whole))
    assert "compressed, damaged" in refused(folder, "train")
    train.write_bytes(tar_of(validation()))
    assert "not ILSVRC 2012's training archive" in refused(folder, "train")
    judged.write_bytes(tar_of({"ILSVRC2010_val_00000001.JPEG": picture(1)}))
    assert "not ILSVRC 2012's validation archive" in refused(folder, "validation")
    train.rename(folder / "ILSVRC2010_images_train.tar")
    assert "ILSVRC2010_images_train.tar is another archive" in refused(folder, "train")


@pytest.mark.parametrize("inner", ["../../n01440764_1.JPEG", "/etc/n01440764_1.JPEG", "x.JPEG"])
def test_paths_that_lead_elsewhere_are_refused(folder: Path, inner: str) -> None:
    members = {**training(), "n01440764.tar": tar_of({inner: picture(1)})}
    (folder / archives.TRAIN).write_bytes(tar_of(members))
    assert "not images of its class" in refused(folder, "train")


def test_links_are_refused(folder: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("n01440764_1.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    members = {**training(), "n01440764.tar": buffer.getvalue()}
    (folder / archives.TRAIN).write_bytes(tar_of(members))
    assert "is a link" in refused(folder, "train")


def test_a_ground_truth_that_does_not_fit_is_refused(folder: Path, data: Path) -> None:
    kit = folder / archives.DEVKIT
    for truth, message in (
        (TRUTH + "1\n", "holds 4 images, .* knows 5"),
        ("1\n2\n", "holds image 3, but .* knows 2"),
        ("1\n2\n3\n4\n", "cannot be read"),  # number 4 is no class
        ("1\n2\nx\n1\n", "cannot be read"),
    ):
        kit.write_bytes(development_kit(data, truth))
        with pytest.raises(DataError, match=message):
            open_dataset(f"imagenet:{folder}", "validation")
    kit.write_bytes(b"no archive")
    assert "damaged" in refused(folder, "validation")
    kit.unlink()
    assert "nothing says what they show" in refused(folder, "validation")
    (folder / archives.LABELS).write_text("cat\n")
    assert "synset_labels.txt:1: cat is no class" in refused(folder, "validation")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder at .*nowhere"):
        open_dataset(f"imagenet:{tmp_path}/nowhere", "train")
    with pytest.raises(DataError, match=r"no ILSVRC2012_img_train\.tar in .*write folder:"):
        open_dataset(f"imagenet:{tmp_path}", "train")
