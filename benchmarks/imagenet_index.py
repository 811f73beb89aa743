"""What it costs to open the index of 1.28 million images, and what a worker of it keeps.

    python benchmarks/imagenet_index.py
    python benchmarks/imagenet_index.py --images 200000

Makes an index of ImageNet's size, without the archives that it is of, as `imagenet:` writes it;
opens it in a process of its own, and measures in workers that are forked from there by how much
each one's own memory grows while it looks at images of the whole list: private, and written to. The
index itself is a mapped file, of which all see the same pages. Linux only. Prints seconds,
megabytes, and a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
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


def own_memory() -> int:
    """Bytes that this process alone holds, and wrote to."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    return 1024 * int(fields["Private_Dirty"].split()[0])


def look(dataset: Dataset, looks: int, sending: Connection) -> None:
    """Look at images all over the list, as a worker does; send what this process alone holds."""
    before = own_memory()
    for index in np.random.default_rng(0).integers(len(dataset), size=looks).tolist():
        dataset.label(index)
        dataset.name(index)
    sending.send(own_memory() - before)


def measure(folder: Path, workers: int, looks: int, sending: Connection) -> None:
    """Open the index and start workers; send images, seconds, and the workers' private memory."""
    start = time.perf_counter()
    dataset = open_imagenet(str(folder), "train")
    seconds = time.perf_counter() - start
    context = multiprocessing.get_context("fork")
    memory = []
    for _ in range(workers):
        here, there = context.Pipe()
        process = context.Process(target=look, args=(dataset, looks, there))
        process.start()
        memory.append(here.recv())
        process.join()
    sending.send((len(dataset), seconds, memory))


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
        count, seconds, memory = here.recv()
        process.join()
    most = max(memory)
    click.echo(f"{count:,} images opened in {seconds:.2f} s")
    click.echo(f"a worker's private memory grew by {most / MEGA:.1f} MB over its work")
    figures = {"images": count, "seconds": round(seconds, 3), "private_mb": round(most / MEGA, 2)}
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
