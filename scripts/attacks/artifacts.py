"""Artifacts: files that were changed, swapped, added or taken away, and what is no file at all."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attacks import ground as grounds
from attacks.attempt import Attempt
from attacks.ground import CHAIN, Ground, Use, changed_bytes, put_odd
from pipeline.core.files import file_hash
from pipeline.steps.artifact import MADE, MANIFEST

Change = Callable[[random.Random, Ground, str], frozenset[str]]
"""Changes an artifact; returns the names of those that are not what they were."""


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Changed artifacts, through the functions that commands call."""
    yield from _attempts(folder, seed, count, grounds.in_process)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """The same through real commands."""
    yield from _attempts(folder, seed, count, grounds.by_command)


def _attempts(folder: Path, seed: int, count: int, use: Use) -> Iterator[Attempt]:
    ground = grounds.make(folder)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name, change = rng.choice(list(CHAIN)), rng.choice(CHANGES)
        run = partial(_try, ground, rng, name, change, use)
        yield Attempt(f"{change.__name__} {name} {number}", run, hostile=True)


def _try(ground: Ground, rng: random.Random, name: str, change: Change, use: Use) -> None:
    try:
        use(ground, change(rng, ground, name))
    finally:
        ground.reset()
        ground.require_canaries()


def _files(place: Path) -> list[Path]:
    """Files of an artifact, but for what is known of its making."""
    return sorted(path for path in place.rglob("*") if path.is_file() and path.name != MADE)


def bytes_of_a_file(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """Other bytes in a file, the manifest among them."""
    path = rng.choice(_files(ground.results / name))
    path.write_bytes(changed_bytes(rng, path.read_bytes()))
    return frozenset({name})


def no_file(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """One file less."""
    rng.choice(_files(ground.results / name)).unlink()
    return frozenset({name})


def more_files(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """A file of somebody else."""
    places = [path for path in (ground.results / name).rglob("*") if path.is_dir()]
    place = rng.choice([ground.results / name, *places])
    named = rng.choice(("notes.txt", ".hidden", "x" * 200, "\x1b[2J", "a\nb", "[red]", "ä", "a b"))
    (place / named).write_bytes(rng.randbytes(rng.choice((0, 1, 99))))
    return frozenset({name})


def no_regular_file(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """A link, a pipe, a socket or a folder, beside the files or in the place of one."""
    place = ground.results / name
    put_odd(rng, rng.choice([*_files(place), place / "more", place / MADE]))
    return frozenset({name})


def linked_to_its_like(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """A file or folder that is a link to what was there, so that its content is right."""
    place = ground.results / name
    path = rng.choice([place, *_files(place), *(p for p in place.rglob("*") if p.is_dir())])
    elsewhere = ground.results / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return frozenset({name})


def another_in_its_place(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """The whole folder of another artifact."""
    other = rng.choice([each for each in CHAIN if each != name])
    shutil.rmtree(ground.results / name)
    shutil.copytree(ground.results / other, ground.results / name)
    return frozenset({name})


def signed_again(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """Other bytes in a file, with the hash and the seal that fit."""
    place = ground.results / name
    path = rng.choice([path for path in _files(place) if path.name != MANIFEST])
    path.write_bytes(changed_bytes(rng, path.read_bytes()))
    record = {"sha256": file_hash(path), "size": path.stat().st_size}
    grounds.sign(
        place / MANIFEST,
        lambda values: values["files"].update({path.relative_to(place).as_posix(): record}),
    )
    return frozenset({name})


def no_artifact(rng: random.Random, ground: Ground, name: str) -> frozenset[str]:
    """The folder is gone, or only its manifest."""
    place = ground.results / name
    if rng.random() < 0.5:
        shutil.rmtree(place)
    else:
        (place / MANIFEST).unlink()
    return frozenset({name})


CHANGES: tuple[Change, ...] = (
    *(bytes_of_a_file, no_file, more_files, no_regular_file, linked_to_its_like),
    *(another_in_its_place, signed_again, no_artifact),
)
