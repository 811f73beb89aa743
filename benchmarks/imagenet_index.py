"""What it costs to open the index of 1.28 million images, and what a worker of it keeps.

    python benchmarks/imagenet_index.py
    python benchmarks/imagenet_index.py --images 200000

Makes an index of ImageNet's size, without the archives that it is of, as `imagenet:` writes it;
opens it in a process of its own, forks workers from there, as torch's DataLoader does, lets them
look at images of the whole list, and measures by how much the memory of each grew meanwhile, all of
them alive. Linux only. Prints seconds, megabytes, and a line of JSON. Of the kernel's figures
(/proc/PID/smaps_rollup)

    private    Private_Dirty: pages that only this worker has and has written to. This is what a
               worker costs, and what "private memory of a worker" means in this project: nothing
               but swapping gives them back
    anonymous  Anonymous: pages that no file stands behind, those of the forking process included
    unique     Private_Clean + Private_Dirty, often called USS. Pages of the mapped index count as
               a process's own as long as no other one has looked at them; they are the disk's
               cache, which the kernel takes back at will
    share      Pss: a page that n processes map counts a n-th for each
    mapped     Rss: every page that the worker maps, whoever else has it
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import click
import numpy as np

from care.data import Dataset, imagenet
from care.data.imagenet import Found, open_imagenet

CLASSES = 1000
MEGA = 1e6


def make_index(folder: Path, images: int) -> None:
    """An index as `imagenet:` writes it, beside an archive that is only a name."""
    (folder / imagenet.TRAIN).touch()
    classes = [f"n{number:08}" for number in range(CLASSES)]
    found = [
        Found(
            f"{classes[i % CLASSES]}/{classes[i % CLASSES]}_{i}.JPEG", i % CLASSES, 110_000 * i, 9
        )
        for i in range(images)
    ]
    with mock.patch.object(imagenet, "_scan_train", return_value=(classes, found)):
        open_imagenet(str(folder), "train")
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # pages that are not on the disk yet count as written to


def memory() -> dict[str, int]:
    """Bytes of this process, by the kind that the top of this file names."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    found = {name: 1024 * int(text.split()[0]) for name, text in fields.items()}
    return {
        "private": found["Private_Dirty"],
        "anonymous": found["Anonymous"],
        "unique": found["Private_Clean"] + found["Private_Dirty"],
        "share": found["Pss"],
        "mapped": found["Rss"],
    }


def look(dataset: Dataset, looks: int, connection: Connection) -> None:
    """Look at images all over the list, as a worker does; send what memory that took.

    Args:
        dataset: Opened before this process was forked.
        looks: Images that are looked at.
        connection: Told when all have looked, and asked to go on when all were heard.
    """
    before = memory()
    for index in np.random.default_rng(0).integers(len(dataset), size=looks).tolist():
        dataset.label(index)
        dataset.name(index)
    connection.send(None)
    connection.recv()  # the pages of the index are shared once all have looked
    after = memory()
    connection.send({kind: after[kind] - before[kind] for kind in after})
    connection.recv()  # and stay so until all have been measured


def measure(folder: Path, workers: int, looks: int, sending: Connection) -> None:
    """Open the index and start workers; send images, seconds, and what the workers' memory grew."""
    start = time.perf_counter()
    dataset = open_imagenet(str(folder), "train")
    seconds = time.perf_counter() - start
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=look, args=(dataset, looks, there)) for _, there in pipes]
    for process in processes:
        process.start()
    grown = []
    for stage in ("looked", "measured"):
        told = [here.recv() for here, _ in pipes]
        if stage == "measured":
            grown = told
        for here, _ in pipes:
            here.send(None)
    for process in processes:
        process.join()
    sending.send((len(dataset), seconds, grown))


@click.command()
@click.option("--images", default=1_281_167, show_default=True, help="Of the index.")
@click.option("--workers", default=2, show_default=True, help="Processes that are measured.")
@click.option("--looks", default=20_000, show_default=True, help="Images that each looks at.")
def main(images: int, workers: int, looks: int) -> None:
    """Print seconds to open the index, and private memory of a worker."""
    with tempfile.TemporaryDirectory(prefix="index-") as name:
        folder = Path(name)
        make_index(folder, images)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(folder, workers, looks, there))
        process.start()
        count, seconds, grown = here.recv()
        process.join()
    most = {kind: max(worker[kind] for worker in grown) / MEGA for kind in grown[0]}
    click.echo(f"{count:,} images opened in {seconds:.2f} s")
    click.echo(f"most that the memory of one of {workers} workers grew by over its work:")
    for kind, value in most.items():
        click.echo(f"  {kind:9} {value:6.1f} MB")
    megabytes = {f"{kind}_mb": round(value, 2) for kind, value in most.items()}
    click.echo(json.dumps({"images": count, "seconds": round(seconds, 3), **megabytes}))


if __name__ == "__main__":
    main()
