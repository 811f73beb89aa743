from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from care.data import Dataset, check_classes, fashion_mnist, folders, hold_out, open_dataset, tars
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.hashes import HashCache, Kind, identify
from pipeline.core.listing import list_split
from pipeline.core.preprocess import decode
from pipeline.core.remote import RemotePath

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
        dataset,
        (3, 8, 8),
        3,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,  # older versions ask for them even where there is none
        interpolation="bicubic",
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
    # By class and key, as in a folder, wherever they lie.
    assert dataset.labels.tolist() == [0, 1, 2]
    assert dataset.classes == ("0", "1", "2")
    assert not dataset.names_known
    assert [dataset.name(i) for i in range(3)] == ["val-00.tar/b", "val-01.tar/c", "val-00.tar/a"]
    assert dataset.hash(1) == hashlib.sha256(picture(3, "JPEG")).hexdigest()
    assert dataset.image(0).tobytes() == decode(picture(2, "JPEG"), "").tobytes()
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


# Tar files at an address.


@pytest.fixture
def bucket() -> Iterator[Callable[[Path], str]]:
    """Puts the files of a folder into memory, and gives the address."""
    from fsspec.implementations.memory import MemoryFileSystem

    files = MemoryFileSystem()

    def fill(folder: Path) -> str:
        for path in folder.iterdir():
            files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
        return "memory://bucket"

    yield fill
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("names", [b"", b"cat\ndog\nemu\n"])
@pytest.mark.parametrize("pattern", ["val-{00..01}.tar", "val-*.tar"])
def test_shards_at_an_address_are_those_of_a_disk(
    bucket: Callable[[Path], str], tmp_path: Path, pattern: str, names: bytes
) -> None:
    shards(tmp_path)
    if names:
        (tmp_path / "classes.txt").write_bytes(names)
    here, there = (open_dataset(f"wds:{at}/{pattern}") for at in (tmp_path, bucket(tmp_path)))
    assert there.identity() == here.identity()
    assert there.classes == here.classes
    for one in (there, pickle.loads(pickle.dumps(there))):
        for index in range(len(here)):
            assert one.encoded(index)[0] == here.encoded(index)[0]  # type: ignore[index]
    assert "memory://bucket/val-00.tar" in str(there.encoded(0))


def test_keys_hold_the_same_bytes_wherever_they_lie(
    bucket: Callable[[Path], str], tmp_path: Path
) -> None:
    """Found by content; one that is known is not read again, and one that changed is."""
    (tmp_path / "data").mkdir()
    shards(tmp_path / "data")
    address, cache = bucket(tmp_path / "data"), tmp_path / "hashes.sqlite"

    def identity(at: str, kind: Kind = "content") -> str:
        split = list_split(f"wds:{at}/val-{{00..01}}.tar", "validation", tmp_path)
        return identify(split, HashCache(cache), kind).digest

    for kind in ("content", "fingerprint"):
        assert identity(address, kind) == identity(str(tmp_path / "data"), kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "open", None)
        assert identity(address) == identity(str(tmp_path / "data"))
    write_tar(tmp_path / "data" / "val-01.tar", sample("c", 0, 3))
    assert identity(bucket(tmp_path / "data")) == identity(str(tmp_path / "data"))


def test_one_tar_file_at_an_address(bucket: Callable[[Path], str], tmp_path: Path) -> None:
    write_tar(tmp_path / "images.tar", CLASSES)
    address = bucket(tmp_path)
    dataset = open_dataset(f"tar:{address}/images.tar")
    assert [dataset.name(index) for index in range(4)] == NAMES
    assert dataset.hash(0) == hashlib.sha256(picture(1, "JPEG")).hexdigest()
    there, here = (
        identify(list_split(f"tar:{at}/images.tar", "train", tmp_path), HashCache(tmp_path / "h"))
        for at in (address, tmp_path)
    )
    assert there == here


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("tar:memory://bucket/none.tar", "no tar file at memory://bucket/none.tar"),
        ("wds:memory://bucket/x-{0..2}.tar", "3 of 3 shards are missing, the first is memory://b"),
        ("wds:memory://bucket/x-*.tar", "no shard matches memory://bucket/x-"),
        ("wds:memory://nowhere/x-*.tar", "no file at memory://nowhere: check the address"),
        ("tar:memory://bucket/half.tar", "memory://bucket/half.tar is truncated: copy or download"),
        ("wds:{/data,memory://bucket}/x.tar", "names files here and at an address"),
        ("folder:s3://bucket/val", "is read from a disk: for images at an address pack them"),
        ("tar:https://host/x.tar", "read at addresses of file://, memory://, s3://"),
        ("tar:file:///data/x.tar", "write it without file://"),
        ("tar:s3://key:topsecret@bucket/x.tar", "holds no password and no query: let keys"),
        ("tar:s3://bucket/x.tar?secret=topsecret", "holds no password and no query: let keys"),
        ("tar:gs://bucket/x.tar", r"needs a driver: pip install 'care-deploy\[gs\]'"),
    ],
)
def test_what_cannot_be_read_at_an_address(
    bucket: Callable[[Path], str], tmp_path: Path, uri: str, message: str
) -> None:
    whole = write_tar(tmp_path / "half.tar", CLASSES).read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[:2000])
    bucket(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(uri)
    assert "topsecret" not in str(caught.value)


def test_a_tar_file_that_changed_at_its_address(
    bucket: Callable[[Path], str], tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "images.tar", CLASSES)
    dataset = open_dataset(f"tar:{bucket(tmp_path)}/images.tar")
    path.write_bytes(path.read_bytes()[:600])
    bucket(tmp_path)
    with pytest.raises(DataError, match=r"a\.jpg in memory://bucket/images\.tar cannot be read"):
        dataset.image(0)


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


# Layouts that once became classes.


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("TRAIN", "VALIDATION"), ("data/Training", "data/Test")]
)
def test_splits_in_capitals_or_one_folder_up(
    kind: str, train: str, val: str, tmp_path: Path
) -> None:
    files = {
        **below(train, {"no/a.png": picture(1), "yes/b.png": picture(2)}),
        **below(val, {"no/c.png": picture(3), "yes/d.png": picture(4)}),
    }
    if kind == "folder":
        uri = write_folder(tmp_path / "d", files)
    else:
        uri = f"tar:{write_tar(tmp_path / 'd.tar', files)}"
    for split, expected in (("train", "a.png"), ("validation", "c.png"), ("calibration", "a.png")):
        dataset = open_dataset(uri, split)
        assert dataset.classes == ("no", "yes")
        assert dataset.name(0).endswith(expected)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("cats/train/a", "cats/val/a", "dogs/train/b"), r"holds train/(, val/)?: it is a dataset"),
        (("seg_train/sea/x", "seg_test/sea/x"), "which hold the same folders: these are splits"),
        (("Val/a/x", "val/a/x", "train/a/x"), "has Val/, val/: keep one of them"),
    ],
)
def test_datasets_and_splits_are_no_classes(
    kind: str, folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    files = {f"{folder}/1.png": picture(1) for folder in folders}
    if kind == "folder":
        uri = write_folder(tmp_path / "d", files)
    else:
        uri = f"tar:{write_tar(tmp_path / 'd.tar', files)}"
    with pytest.raises(DataError, match=message):
        open_dataset(uri, "validation")


def test_a_single_class_stays_a_class(tmp_path: Path) -> None:
    uri = write_folder(tmp_path / "d", {"n01/a.png": picture(1), "n01/deep/b.png": picture(2)})
    assert open_dataset(uri).classes == ("n01",)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202e", "a\nb", "a\rb", "\ta"])
def test_class_folders_with_control_characters(kind: str, name: str, tmp_path: Path) -> None:
    files = {f"{name}/1.png": picture(1), "b/1.png": picture(2)}
    if kind == "folder":
        uri = write_folder(tmp_path / "d", files)
    else:
        uri = f"tar:{write_tar(tmp_path / 'd.tar', files)}"
    with pytest.raises(DataError, match="control character") as caught:
        open_dataset(uri)
    assert str(caught.value).isprintable()
    assert str(caught.value).count("control character") == 1


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "images", {"a/1.png": picture(1), "b/1.png": picture(2)})
    assert open_dataset("folder:~/images").classes == ("a", "b")
    for kind in ("folder", "tar", "wds"):
        with pytest.raises(DataError, match="nobody-at-all"):
            open_dataset(f"{kind}:~nobody-at-all/x")


@pytest.mark.parametrize("kind", ["folder", "tar", "wds", "fashion-mnist", "nothing"])
@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_paths_that_cannot_be(kind: str, path: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(f"{kind}:{path}", "train")
    assert len(str(caught.value)) < 600


def test_what_never_ends_among_the_images(tmp_path: Path) -> None:
    uri = write_folder(tmp_path / "d", {"a/1.png": picture(1), "b/1.png": picture(2)})
    opened = open_dataset(uri)
    os.mkfifo(tmp_path / "d" / "a" / "2.png")
    with pytest.raises(DataError, match=r"a/2\.png is a device or a pipe: move it out"):
        open_dataset(uri)
    (tmp_path / "d" / "a" / "2.png").unlink()
    (tmp_path / "d" / "a" / "1.png").unlink()
    os.mkfifo(tmp_path / "d" / "a" / "1.png")
    with pytest.raises(DataError, match=r"a/1\.png cannot be read \(it is a device or a pipe\)"):
        opened.image(0)
    (tmp_path / "d" / "a" / "1.png").unlink()
    (tmp_path / "d" / "a" / "1.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"a/1\.png is a device or a pipe: move it out"):
        open_dataset(uri)
    (tmp_path / "d" / "a" / "1.png").unlink()
    (tmp_path / "d" / "a" / "1.png").write_bytes(picture(1))
    (tmp_path / "d" / "b" / "up").symlink_to("..")
    with pytest.raises(DataError, match="more than 16 folders deep: does a link lead back up"):
        open_dataset(uri)


# Archives whose headers lie.


def with_field(path: Path, start: int, value: bytes) -> Path:
    """The archive with another field in its first header, and a checksum that fits."""
    data = bytearray(path.read_bytes())
    data[start : start + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("start", "value"),
    [
        (124, b"\x80" + b"\xff" * 11),  # a size of 2^88
        (124, b"\xff" * 12),  # a size of -1
        (124, b"\xff" * 10 + b"\xf0\0"),  # one that leads back to the header
        (124, b"99999999999\0"),
        (156, b"S"),  # GNU's sparse file
    ],
)
def test_headers_that_lie(start: int, value: bytes, tmp_path: Path) -> None:
    files = {"a/1.png": picture(1), "b/1.png": picture(2)}
    path = with_field(write_tar(tmp_path / "x.tar", files), start, value)
    with pytest.raises(DataError, match=r"x\.tar") as caught:
        open_dataset(f"tar:{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "headers",
    [{"size": "9" * 30}, {"size": "-1"}, {"GNU.sparse.size": "x"}, {"path": ""}],
)
def test_extended_headers_that_lie(headers: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a/1.png")
        member.size, member.pax_headers = len(picture(1)), headers
        tar.addfile(member, io.BytesIO(picture(1)))
    with pytest.raises(DataError, match=r"x\.tar"):
        open_dataset(f"tar:{path}")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..99999999999}", "stands for 1e.11 files"),
        ("{0..9999}{0..9999}.tar", "stands for 1e.08 files"),
        ("a/**", "folder a cannot be read"),
        ("x" * 300 + "-*", "has a name of 302 bytes"),
    ],
)
def test_shards_without_end(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(f"wds:{pattern}")


def test_a_wildcard_looks_into_one_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.png": picture(1), "1.cls": b"0"})
    (tmp_path / "inner").mkdir()
    write_tar(tmp_path / "inner" / "y.tar", {"2.png": picture(2), "2.cls": b"1"})
    assert len(open_dataset(f"wds:{tmp_path}/*.tar")) == 1
    with pytest.raises(DataError, match="shards are missing"):
        open_dataset(f"wds:{tmp_path}/**")  # as `*`: inner is no shard


@pytest.mark.parametrize("label", [b"99999999999999", b"9" * 5000, b"-1", b""])
def test_class_numbers_that_cannot_be(label: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.png": picture(1), "1.cls": label})
    with pytest.raises(DataError, match="not a class number"):
        open_dataset(f"wds:{path}")


def test_names_of_classes_beside_shards_are_distinct(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"1.png": picture(1), "1.cls": b"0"})
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(DataError, match=r"classes\.txt:3: the class 'cat' stands in line 1"):
        open_dataset(f"wds:{path}")


def test_a_packed_file_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_LARGEST", 10_000)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x02\0\0\0\x64\0\0\0\x65" + bytes(10_100)))
    with pytest.raises(DataError, match="would hold more than Fashion-MNIST does"):
        fashion_mnist.read_idx(path)
    read: list[int] = []
    real = gzip.GzipFile.read

    def counted(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        data = real(self, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x64" + bytes(20_000)))
    with pytest.raises(DataError, match="holds 101 or more bytes of 100: it is truncated or damag"):
        fashion_mnist.read_idx(path)
    assert sum(read) == 4 + 4 + 100 + 1
    path.write_bytes(gzip.compress(b"\0\0\x08\xff" + bytes(4 * 255)))
    with pytest.raises(DataError, match="is not an idx file"):
        fashion_mnist.read_idx(path)


def test_an_image_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (folders, tars):
        monkeypatch.setattr(module, "MOST_BYTES", 5_000)
    uri = write_folder(tmp_path / "d", {"a/1.png": picture(1), "b/1.png": bytes(5_001)})
    tar = write_tar(tmp_path / "x.tar", {"a/1.png": picture(1), "b/1.png": bytes(5_001)})
    for name in (uri, f"tar:{tar}"):
        opened = open_dataset(name)
        opened.image(0)
        with pytest.raises(DataError, match=r"b/1\.png .*\(it is larger than 0\.005 MB\)"):
            opened.image(1)
