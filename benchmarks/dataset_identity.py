"""How long a run takes to know that a dataset is the one that it was.

    python benchmarks/dataset_identity.py --images 50000
    python benchmarks/dataset_identity.py --images 1300000

Writes a tree of empty images in class folders, identifies it for the first time and again as a
later run would, and removes it. It needs an inode for each image. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from pipeline.core import machine
from pipeline.core.hashes import HashCache, Kind, identify
from pipeline.core.listing import list_folder


def write_tree(root: Path, images: int, classes: int) -> None:
    """Write so many empty files, in so many folders."""
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir()
        for number in range(label, images, classes):
            (folder / f"n{label:08d}_{number}.JPEG").touch()


def scan(root: Path) -> None:
    """Look at every file, and do nothing else: what any identity by size and date takes."""
    for _, files in list_folder(str(root), "validation").images():
        for file in files:
            file.stat()


def seconds(call: Callable[[], object]) -> dict[str, float]:
    """How long a call takes, and how much of that the CPU works, in seconds."""
    start, worked = time.perf_counter(), time.process_time()
    call()
    found = {"wall": time.perf_counter() - start, "cpu": time.process_time() - worked}
    return {name: round(value, 3) for name, value in found.items()}


def identify_anew(root: Path, kept: Path, kind: Kind) -> None:
    """Identify a dataset as a run does that has just started."""
    identify(list_folder(str(root), "validation"), HashCache(kept), kind)


@click.command()
@click.option("--images", default=50_000, show_default=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--folder", type=Path, help="Where to write the tree; default: a temporary folder.")
def main(images: int, classes: int, folder: Path | None) -> None:
    """Time the identity of a dataset."""
    with tempfile.TemporaryDirectory(prefix="dataset-identity-", dir=folder) as temporary:
        root, kept = Path(temporary, "images"), Path(temporary, "hashes.sqlite")
        root.mkdir()
        figures: dict[str, object] = {"images": images, "classes": classes}
        figures["written_s"] = seconds(lambda: write_tree(root, images, classes))
        figures["scan_s"] = seconds(lambda: scan(root))
        figures["first_s"] = seconds(lambda: identify_anew(root, kept, "content"))
        figures["known_s"] = seconds(lambda: identify_anew(root, kept, "content"))
        os.utime(next(root.rglob("*.JPEG")))
        figures["one_touched_s"] = seconds(lambda: identify_anew(root, kept, "content"))
        figures["fingerprint_s"] = seconds(lambda: identify_anew(root, kept, "fingerprint"))
        figures["kept_mib"] = round(kept.stat().st_size / 2**20, 1)
    click.echo(json.dumps({**figures, "here": {**machine.describe(), "load": machine.load()}}))


if __name__ == "__main__":
    main()
