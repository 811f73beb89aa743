r"""ImageNet-1K from its archives: `python -m care.imagenet`.

    python -m care.imagenet verify /data/imagenet
    python -m care.imagenet prepare /data/imagenet --to /scratch/imagenet --dry-run
    python -m care.imagenet prepare /data/imagenet --to /scratch/imagenet
    python -m care.imagenet prepare /data/imagenet --to /scratch/shards --shards

Training needs none of this: `--data imagenet:/data/imagenet` reads the archives as they were
downloaded. Folders serve other programs, shards are for storage that dislikes small reads.
"""

from __future__ import annotations

from pipeline.core import signals

if __name__ == "__main__":
    signals.leave_while_loading()

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.progress import track

from care.data import Dataset, open_dataset
from care.data.imagenet import DEVKIT, TRAIN, VALIDATION
from pipeline.core.commandline import Group
from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.screen import Screen
from pipeline.core.signals import die_with_parent

SPLITS = {"train": "train", "val": "validation"}
"""Folders that are made, and the splits of the archives that they hold."""

COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000

_SHARD = 1_000_000_000
"""Bytes of images in a shard."""

_SLICE = 512
"""Images that a process writes before it says so."""

_ROOM = 1.02
"""Space for folders and the headers of files, beside the images."""


@dataclass(frozen=True)
class Table:
    """What the archives have to be.

    Attributes:
        sums: MD5 of each, in hexadecimal, by its name.
        counts: Images of each split; empty where it is not known.
    """

    sums: dict[str, str]
    counts: dict[str, int]


def published_table() -> Table:
    """The table that torchvision carries, and ILSVRC 2012's numbers of images."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    return Table(dict(ARCHIVE_META.values()), COUNTS)


def read_table(path: Path) -> Table:
    """A table in the form of md5sum, for archives that are not ILSVRC 2012's.

    Raises:
        DataError: It is no such file.
    """
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line]
        return Table({name.lstrip("*"): total for total, name in rows}, {})
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no list as md5sum writes it: {error}") from error


@click.group(cls=Group)
def main() -> None:
    """ImageNet-1K from the archives that were downloaded."""


@main.command()
@click.argument("archives", type=click.Path(path_type=Path))
@click.option("--checksums", type=click.Path(path_type=Path), help="Of other archives, by md5sum.")
def verify(archives: Path, checksums: Path | None) -> None:
    """Check the archives: the MD5 of each, and the number of classes and images."""
    table = read_table(checksums) if checksums else published_table()
    console = Screen(soft_wrap=True)
    _verify_sums(archives, table, console)
    for split in SPLITS:
        dataset = _open(archives, split, table)
        console.print(f"{split}: {len(dataset):,} images of {len(dataset.classes)} classes")


@main.command()
@click.argument("archives", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--shards", is_flag=True, help="Write WebDataset shards, not a folder a class.")
@click.option("--workers", default=os.cpu_count() or 1, type=click.IntRange(1), help="Processes.")
@click.option("--checksums", type=click.Path(path_type=Path), help="Of other archives, by md5sum.")
@click.option("--skip-checksums", is_flag=True, help="Do not read the archives to verify them.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
def prepare(
    archives: Path,
    target: Path,
    shards: bool,
    workers: int,
    checksums: Path | None,
    skip_checksums: bool,
    dry_run: bool,
) -> None:
    """Write the images of the archives into a folder tree or into shards.

    What is whole already stays; run it again after an interruption.
    """
    table = read_table(checksums) if checksums else published_table()
    console = Screen(soft_wrap=True)
    datasets = {split: _open(archives, split, table) for split in SPLITS}
    missing = _missing(datasets, target, shards)
    for split, dataset in datasets.items():
        console.print(f"{split}: {len(dataset):,} images of {len(dataset.classes)} classes")
    _require_room(target, missing)
    console.print(f"{missing / 1e9:.3g} GB to write into {target}")
    if dry_run:
        return
    if not skip_checksums:
        _verify_sums(archives, table, console)
    for split, dataset in datasets.items():
        tasks = list(_tasks(dataset, archives, target, split, shards))
        with ProcessPoolExecutor(workers, initializer=die_with_parent) as pool:
            done = pool.map(_write_shard if shards else _write_images, tasks)
            for _ in track(done, split, len(tasks), console=console, transient=True):
                pass
        if shards:
            _write_text(target / split / "classes.txt", "\n".join(dataset.classes) + "\n")
        _compare(dataset, _made(target, split, shards))
        console.print(f"{split}: written and compared")
    example = f"wds:{target}/train/*.tar" if shards else f"folder:{target}"
    console.print(f"train with --data {example}")


def _verify_sums(archives: Path, table: Table, console: Screen) -> None:
    """Compare the MD5 of each archive that is there with the table.

    Raises:
        DataError: One is not what it should be.
    """
    for name in (TRAIN, VALIDATION, DEVKIT):
        path = archives / name
        if not path.exists() and name == DEVKIT:
            continue  # a list of classes may stand in its place
        if name not in table.sums:
            raise DataError(f"the table has no MD5 of {name}")
        with console.status(f"reading {path}"), path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if found.hexdigest() != table.sums[name]:
            raise DataError(
                f"{path} has the MD5 {found.hexdigest()}, not {table.sums[name]}: it is incomplete "
                "or another archive, download it again"
            )
        console.print(f"{name}: whole")


def _open(archives: Path, split: str, table: Table) -> Dataset:
    dataset = open_dataset(f"imagenet:{archives}", SPLITS[split])
    expected = table.counts.get(split)
    if expected is not None and (len(dataset), len(dataset.classes)) != (expected, CLASSES):
        raise DataError(
            f"{archives} has {len(dataset):,} images of {len(dataset.classes)} classes to {split}, "
            f"ILSVRC 2012 has {expected:,} of {CLASSES}: download the archive again, or give "
            "--checksums of archives that are not ILSVRC 2012's"
        )
    return dataset


@dataclass(frozen=True)
class Task:
    """Some images that one process writes.

    Attributes:
        archives: Folder of the archives.
        split: "train" or "val".
        target: Folder of the images, or file of the shard.
        indices: Which images.
    """

    archives: Path
    split: str
    target: Path
    indices: tuple[int, ...]


def _tasks(
    dataset: Dataset, archives: Path, target: Path, split: str, shards: bool
) -> Iterator[Task]:
    if not shards:
        for start in range(0, len(dataset), _SLICE):
            indices = tuple(range(start, min(start + _SLICE, len(dataset))))
            yield Task(archives, split, target / split, indices)
        return
    for number, indices in enumerate(_shards(dataset)):
        yield Task(archives, split, target / split / f"{split}-{number:06d}.tar", indices)


def _shards(dataset: Dataset) -> list[tuple[int, ...]]:
    """Which images go into which shard: shuffled, so that programs may read them one by one."""
    order = np.random.default_rng(0).permutation(len(dataset))
    sizes = np.cumsum([dataset.size(int(index)) for index in order])
    parts = np.split(order, np.flatnonzero(np.diff(sizes // _SHARD)) + 1)
    return [tuple(part.tolist()) for part in parts]


def _missing(datasets: dict[str, Dataset], target: Path, shards: bool) -> int:
    """Bytes of images that are not there yet."""
    total = 0
    for split, dataset in datasets.items():
        if shards:
            for number, indices in enumerate(_shards(dataset)):
                if not (target / split / f"{split}-{number:06d}.tar").exists():
                    total += sum(map(dataset.size, indices))
            continue
        for index in range(len(dataset)):
            path = target / split / dataset.name(index)
            if not _is_there(path, dataset.size(index)):
                total += dataset.size(index)
    return total


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _require_room(target: Path, needed: int) -> None:
    above = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if needed * _ROOM > free:
        raise ArtifactError(
            f"{needed * _ROOM / 1e9:.3g} GB go into {target}, {free / 1e9:.3g} GB are free there: "
            "choose another disk, or train on imagenet: and unpack nothing"
        )


def _write_images(task: Task) -> None:
    """Write images, each whole or not at all; those that are there stay."""
    dataset = open_dataset(f"imagenet:{task.archives}", SPLITS[task.split])
    for index in task.indices:
        path = task.target / dataset.name(index)
        if not _is_there(path, dataset.size(index)):
            _write_bytes(path, _encoded(dataset, index))


def _write_shard(task: Task) -> None:
    """Write a shard, whole or not at all; one that is there stays."""
    if task.target.exists():
        return
    from webdataset import TarWriter

    dataset = open_dataset(f"imagenet:{task.archives}", SPLITS[task.split])
    temporary = task.target.with_name(f".{task.target.name}.{os.getpid()}.tmp")
    try:
        task.target.parent.mkdir(parents=True, exist_ok=True)
        with TarWriter(str(temporary), mtime=0) as writer:
            for index in task.indices:
                key = Path(dataset.name(index)).stem
                label = str(dataset.label(index))
                writer.write({"__key__": key, "jpg": _encoded(dataset, index), "cls": label})
        temporary.replace(task.target)
    except OSError as error:
        raise ArtifactError(f"{task.target} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(dataset: Dataset, index: int) -> bytes:
    found = dataset.encoded(index)
    if found is None:
        raise DataError(f"{dataset.name(index)} is no file")
    return found[0]


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _made(target: Path, split: str, shards: bool) -> Dataset:
    uri = f"wds:{target}/{split}/*.tar" if shards else f"folder:{target}/{split}"
    return open_dataset(uri, SPLITS[split])


def _compare(expected: Dataset, found: Dataset) -> None:
    """Compare classes, and names, labels and sizes of all images.

    Raises:
        ArtifactError: Something else lies there.
    """
    if found.classes != expected.classes:
        raise ArtifactError("what was written has other classes than the archives: remove it")
    sides = [sorted(_entries(dataset)) for dataset in (expected, found)]
    for one, other in itertools.zip_longest(*sides):
        if one != other:
            raise ArtifactError(
                f"what was written differs from the archives: {other} in place of {one}; remove it "
                "and prepare it again"
            )


def _entries(dataset: Dataset) -> Iterator[tuple[str, int, int]]:
    for index in range(len(dataset)):
        yield Path(dataset.name(index)).stem, dataset.label(index), dataset.size(index)


if __name__ == "__main__":
    main()
