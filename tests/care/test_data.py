from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from care.data import Dataset, check_classes, fashion_mnist, hold_out, open_dataset
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.preprocess import decode

Files = Mapping[str, bytes]


def picture(seed: int, kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


# Out of order, nested, upper case and with what operating systems leave behind.
CLASSES: Files = {
    "n02/b.JPEG": picture(3, "JPEG"),
    "n01/b.png": picture(2),
    "n01/a.jpg": picture(1, "JPEG"),
    "n01/inner/c.png": picture(4),
    "n01/.DS_Store": b"hidden",
    "n01/._a.jpg": b"hidden",
    ".cache/x.png": b"hidden",
}
NAMES = ["n01/a.jpg", "n01/b.png", "n01/inner/c.png", "n02/b.JPEG"]


def below(folder: str, files: Files) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def write_folder(root: Path, files: Files) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"folder:{root}"


def write_tar(path: Path, files: Files, folders: tuple[str, ...] = (), mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for folder in folders:
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "tar", "tar with folders above"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param == "folder":
        return open_dataset(write_folder(tmp_path / "images", CLASSES))
    above = "./data/imagenet/" if "above" in request.param else ""
    files = {f"{above}{name}": data for name, data in CLASSES.items()}
    return open_dataset(f"tar:{write_tar(tmp_path / 'images.tar', files)}")


def test_images_and_labels(dataset: Dataset) -> None:
    assert len(dataset) == 4
    assert dataset.classes == ("n01", "n02")
    assert dataset.labels.tolist() == [0, 0, 0, 1]
    for index, name in enumerate(NAMES):
        assert dataset.name(index).removeprefix("data/imagenet/") == name
        assert dataset.hash(index) == hashlib.sha256(CLASSES[name]).hexdigest()
        image, label = dataset[index]
        assert label == dataset.label(index)
        assert image.mode == "RGB"
        assert image.tobytes() == decode(CLASSES[name], name).tobytes()
    with pytest.raises(IndexError):
        dataset[4]


def test_transform_and_pickle(dataset: Dataset) -> None:
    dataset.transform = _width
    copy = pickle.loads(pickle.dumps(dataset))  # a loader's processes receive it so
    assert copy[3] == dataset[3] == (16, 1)


def _width(image: Image.Image) -> int:
    return image.width


def test_timm_loader(dataset: Dataset) -> None:
    loader = timm.data.create_loader(
        dataset, (3, 8, 8), 3, use_prefetcher=False, num_workers=0, interpolation="bicubic"
    )
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(3, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_splits(kind: str, tmp_path: Path) -> None:
    files = {
        **below("train", {"cat/a.png": picture(1), "dog/b.png": picture(2)}),
        **below("val", {"cat/c.png": picture(3), "dog/d.png": picture(4)}),
    }
    if kind == "folder":
        uri = write_folder(tmp_path / "images", {**files, "README.txt": b"about"})
    else:
        uri = f"tar:{write_tar(tmp_path / 'images.tar', below('top', files))}"
    names = {
        split: [Path(open_dataset(uri, split).name(i)).name for i in (0, 1)]
        for split in ("train", "validation", "calibration")
    }
    assert names == {
        "train": ["a.png", "b.png"],
        "validation": ["c.png", "d.png"],
        "calibration": ["a.png", "b.png"],
    }


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_missing_split_is_an_error(kind: str, tmp_path: Path) -> None:
    files = below("val", CLASSES)
    if kind == "folder":
        uri = write_folder(tmp_path / "images", files)
    else:
        uri = f"tar:{write_tar(tmp_path / 'images.tar', files)}"
    with pytest.raises(DataError, match=r"has val/ but no train/ or training/ for the train split"):
        open_dataset(uri, "train")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_class_may_be_called_train(kind: str, tmp_path: Path) -> None:
    files = {"bus/a.png": picture(1), "train/b.png": picture(2)}
    if kind == "folder":
        uri = write_folder(tmp_path / "images", files)
    else:
        uri = f"tar:{write_tar(tmp_path / 'images.tar', files)}"
    assert open_dataset(uri).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no class folders"),
        ({".DS_Store": b""}, "holds no class folders"),
        ({"a.png": picture(1)}, "holds 1 images but no class folders"),
        ({"cat/a.png": picture(1), "b.png": picture(2)}, r"b\.png lies outside the class folders"),
        ({"cat/a.png": picture(1), "dog/.DS_Store": b""}, "class folder .*dog has no images"),
        ({"cat/a.png": picture(1), "cat/notes.txt": b"x"}, r"notes\.txt is not an image"),
        ({"cat/a": picture(1)}, r"cat/a is not an image"),
    ],
)
def test_folder_of_other_content_is_an_error(files: Files, message: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=message):
        open_dataset(write_folder(tmp_path / "images", files))


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        ({}, (), "holds no files"),
        ({"a.png": b"x"}, (), r"a\.png in .* lies outside the class folders"),
        ({"cat/a.png": b"x", "b.png": b"x"}, (), r"b\.png in .* lies outside"),
        ({"cat/a.png": b"x", "cat/notes.txt": b"x"}, (), r"cat/notes\.txt in .* is not an image"),
        ({"cat/a.png": b"x"}, ("cat", "dog"), "class folder dog in .* has no images"),
    ],
)
def test_tar_of_other_content_is_an_error(
    files: Files, folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(f"tar:{write_tar(tmp_path / 'images.tar', files, folders)}")


@pytest.mark.parametrize("keep", [100, 512, 1000, -10240, -8000])
def test_truncated_tar_is_an_error(keep: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar", CLASSES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"images\.tar is"):
        open_dataset(f"tar:{path}")


def test_compressed_tar_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images.tar.gz", CLASSES, mode="w:gz")
    with pytest.raises(DataError, match=r"compressed.*gunzip"):
        open_dataset(f"tar:{path}")


def test_link_in_a_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("cat/a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "../b.png"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"cat/a\.png in .* is a link: .*--dereference"):
        open_dataset(f"tar:{path}")


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cat/a\.png.* is empty"),
        (b"just text", r"cat/a\.png.* is not an image"),
        (picture(1)[:300], r"cat/a\.png.* is a truncated or corrupt image"),
    ],
)
def test_bad_image_is_named(kind: str, data: bytes, message: str, tmp_path: Path) -> None:
    files = {"cat/a.png": data}
    if kind == "folder":
        dataset = open_dataset(write_folder(tmp_path / "images", files))
    else:
        dataset = open_dataset(f"tar:{write_tar(tmp_path / 'images.tar', files)}")
    with pytest.raises(DataError, match=message):
        dataset[0]


def test_vanished_files_are_named(tmp_path: Path) -> None:
    folder = open_dataset(write_folder(tmp_path / "images", CLASSES))
    path = write_tar(tmp_path / "images.tar", CLASSES)
    tar = open_dataset(f"tar:{path}")
    shutil.rmtree(tmp_path / "images")
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match=r"n01/a\.jpg cannot be read"):
        folder.image(0)
    with pytest.raises(DataError, match=r"n02/b\.JPEG in .* cannot be read .*shorter"):
        tar.hash(3)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("folder:/nowhere", "no folder at /nowhere: check the path"),
        ("tar:/nowhere.tar", "no tar file at /nowhere.tar"),
        ("wds:/nowhere-{0..2}.tar", r"3 of 3 shards are missing, the first is /nowhere-0\.tar"),
        ("wds:/nowhere-*.tar", "no shard matches"),
        ("wds:/nowhere-{0..2.tar", "braces .* not in pairs"),
        ("folder:", "lacks a path: write folder:PATH"),
        ("foldr:/x", r"unknown kind of dataset 'foldr'.*did you mean folder\?"),
        ("fashion_mnist", r"did you mean fashion-mnist\?"),
        ("https://example.org/x.tar", "unknown kind of dataset 'https'"),
    ],
)
def test_wrong_uri(uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(uri)


def test_uri_without_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"write folder:{tmp_path}"):
        open_dataset(str(tmp_path))
    file = tmp_path / "x.tar"
    file.touch()
    with pytest.raises(DataError, match=f"write tar:{file}"):
        open_dataset(str(file))
    with pytest.raises(DataError, match=f"tar:{file}"):
        open_dataset(f"folder:{file}")


def test_unknown_split() -> None:
    with pytest.raises(DataError, match=r"no split 'valid': .*did you mean validation\?"):
        open_dataset("fashion-mnist", "valid")


# WebDataset shards.


def sample(key: str, label: int, seed: int) -> dict[str, bytes]:
    return {
        f"{key}.cls": str(label).encode(),
        f"{key}.jpg": picture(seed, "JPEG"),
        f"{key}.json": b"{}",
    }


def shards(folder: Path) -> str:
    write_tar(folder / "val-00.tar", {**sample("a", 2, 1), **sample("b", 0, 2)})
    write_tar(folder / "val-01.tar", sample("c", 1, 3))
    return f"wds:{folder}/val-{{00..01}}.tar"


def test_shards(tmp_path: Path) -> None:
    dataset = open_dataset(shards(tmp_path))
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.classes == ("0", "1", "2")
    assert not dataset.names_known
    assert [dataset.name(i) for i in range(3)] == ["val-00.tar/a", "val-00.tar/b", "val-01.tar/c"]
    assert dataset.hash(2) == hashlib.sha256(picture(3, "JPEG")).hexdigest()
    assert dataset.image(1).tobytes() == decode(picture(2, "JPEG"), "").tobytes()
    check_classes(dataset, 1000)
    with pytest.raises(DataError, match=r"3 classes .* the model 2"):
        check_classes(dataset, 2)


def test_shards_by_wildcard_with_class_names(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    dataset = open_dataset(f"wds:{tmp_path}/val-*.tar")
    assert dataset.classes == ("cat", "dog", "emu")
    with pytest.raises(DataError, match=r"3 classes \(cat, dog, emu\), the model 1000"):
        check_classes(dataset, 1000)
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"label 2, but .*classes\.txt ends at 0"):
        open_dataset(f"wds:{tmp_path}/val-*.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x"}, r"sample a in .* has no label \(\.cls\)"),
        ({"a.cls": b"1"}, "sample a in .* has no image"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "two files of one kind"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls in .* holds b'cat', not a class number"),
        ({"notes.txt": b"x"}, "hold no samples"),
    ],
)
def test_incomplete_samples_are_named(files: Files, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DataError, match=message):
        open_dataset(f"wds:{path}")


# Fashion-MNIST.


def test_embedded_test_split() -> None:
    dataset = open_dataset("fashion-mnist")
    assert len(dataset) == 10_000
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    assert dataset.classes[0] == "T-shirt/top"
    assert dataset.classes[9] == "Ankle boot"
    image, label = dataset[0]
    assert (image.mode, image.size, label) == ("RGB", (28, 28), 9)
    assert dataset.name(0) == "validation/00000"
    assert dataset.hash(0) == hashlib.sha256(image.convert("L").tobytes()).hexdigest()


def test_calibration_images_are_balanced_and_not_of_the_test_split() -> None:
    calibration, test = open_dataset("fashion-mnist", "calibration"), open_dataset("fashion-mnist")
    assert np.bincount(calibration.labels).tolist() == [100] * 10
    hashes = {calibration.hash(i) for i in range(1000)}
    assert len(hashes) == 1000
    assert hashes.isdisjoint(test.hash(i) for i in range(len(test)))


def idx(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    shape = np.array(values.shape, dtype=">u4").tobytes()
    return bytes((0, 0, 8, values.ndim)) + shape + values.tobytes()


IMAGES = idx(np.arange(3 * 784, dtype=np.int64).astype(np.uint8).reshape(3, 28, 28))
LABELS = idx(np.array([4, 0, 9], dtype=np.uint8))
TRAINING: Files = {"train-images-idx3-ubyte": IMAGES, "train-labels-idx1-ubyte": LABELS}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw/"])
def test_training_split_from_a_folder(
    packed: bool, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        f"{inner}{name}{'.gz' if packed else ''}": gzip.compress(data) if packed else data
        for name, data in TRAINING.items()
    }
    write_folder(tmp_path, files)
    monkeypatch.setenv("CARE_FASHION_MNIST", str(tmp_path))
    for uri in ("fashion-mnist", f"fashion-mnist:{tmp_path}"):
        dataset = open_dataset(uri, "train")
        assert dataset.labels.tolist() == [4, 0, 9]
        assert dataset.image(2).size == (28, 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train-images-idx3-ubyte": b""}, "train-images.* not an idx file"),
        ({"train-images-idx3-ubyte": b"\0\0\x08\x03\0\0"}, "not an idx file"),
        ({"train-images-idx3-ubyte": IMAGES[:-1]}, "2351 bytes of 3x28x28: it is truncated"),
        ({"train-labels-idx1-ubyte": idx(np.array([4, 0], dtype=np.uint8))}, "not Fashion-MNIST"),
        ({"train-labels-idx1-ubyte": idx(np.array([4, 0, 10], dtype=np.uint8))}, "has label 10"),
        ({"train-images-idx3-ubyte": idx(np.zeros((3, 32, 32), np.uint8))}, "not Fashion-MNIST"),
    ],
)
def test_damaged_training_split(change: Files, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {**TRAINING, **change})
    with pytest.raises(DataError, match=message):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")


def test_truncated_gzip(tmp_path: Path) -> None:
    packed = {f"{name}.gz": gzip.compress(data)[:-9] for name, data in TRAINING.items()}
    write_folder(tmp_path, packed)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")


def test_missing_training_split_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist, or python -c"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")
    write_folder(tmp_path, {"train-images-idx3-ubyte": IMAGES})
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz does not exist: apt-get"):
        open_dataset(f"fashion-mnist:{tmp_path}", "train")


def test_embedded_files_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tmp_path / "assets"
    shutil.copytree(fashion_mnist.ASSETS, assets)
    monkeypatch.setattr(fashion_mnist, "ASSETS", assets)
    damaged = assets / "t10k-images-idx3-ubyte.gz"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"t10k-images.* differs from its checksum"):
        open_dataset("fashion-mnist")
    damaged.unlink()
    with pytest.raises(DataError, match=r"t10k-images.* cannot be read .*reinstall"):
        open_dataset("fashion-mnist")


# Splitting and checking.


def test_hold_out_is_balanced_disjoint_and_repeatable() -> None:
    dataset = open_dataset("fashion-mnist", "calibration")
    remaining, held_out = hold_out(dataset, 0.2, seed=1)
    assert np.bincount(held_out.labels).tolist() == [20] * 10
    assert np.bincount(remaining.labels).tolist() == [80] * 10
    names = [{part.name(i) for i in range(len(part))} for part in (remaining, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 1000
    np.testing.assert_array_equal(hold_out(dataset, 0.2, seed=1)[1].indices, held_out.indices)
    assert (hold_out(dataset, 0.2, seed=2)[1].indices != held_out.indices).any()
    held_out.transform = _width
    assert held_out[0][0] == 28
    assert isinstance(remaining[0][0], Image.Image)
    assert held_out.hash(3) == dataset.hash(int(held_out.indices[3]))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_hold_out_needs_a_fraction(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        hold_out(open_dataset("fashion-mnist", "calibration"), fraction)


def test_hold_out_of_a_class_that_is_too_small(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path, CLASSES))
    with pytest.raises(DataError, match="class n02 has 1 images"):
        hold_out(dataset, 0.5)


def test_check_classes(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path, CLASSES))
    check_classes(dataset, 2)
    for count in (1, 10):
        with pytest.raises(DataError, match=rf"2 classes \(n01, n02\), the model {count}"):
            check_classes(dataset, count)
