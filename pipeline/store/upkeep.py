"""Looks after a store: what is in it, what of it is damaged, and what nobody needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.core.errors import DamagedError
from pipeline.steps.artifact import Artifact
from pipeline.store.entries import STEPS, Entries
from pipeline.store.objects import object_name

DAY_S = 86400.0

GRACE_S = DAY_S
"""Objects that nothing names are kept so long: somebody may be giving what names them."""

OBJECTS = "objects"


@dataclass(frozen=True)
class Content:
    """What a store holds.

    Attributes:
        artifacts: How many.
        objects: How many files they consist of.
        size: Bytes of these.
        unnamed: How many objects no artifact names.
        unnamed_size: Bytes of these.
        problems: What is damaged or missing, in words.
    """

    artifacts: int
    objects: int
    size: int
    unnamed: int
    unnamed_size: int
    problems: tuple[str, ...]


def whole(entries: Entries, problems: list[str]) -> Iterator[tuple[str, Artifact]]:
    """Every entry that can be read, with its name; what cannot goes to the problems."""
    for name in entries.names():
        try:
            found = entries.read(name)
        except DamagedError as error:
            problems.append(str(error))
            continue
        if found is not None:
            yield name, found


def status(entries: Entries) -> Content:
    """Count what a store holds, by names and sizes; contents of objects are not read."""
    problems: list[str] = []
    objects = entries.objects.listed(OBJECTS)
    named: set[str] = set()
    artifacts = 0
    for entry, artifact in whole(entries, problems):
        artifacts += 1
        for name, record in artifact.files.items():
            place = object_name(record.sha256)
            named.add(place)
            if place not in objects:
                problems.append(f"{entry}: {artifact.name}/{name} is missing")
            elif objects[place].size != record.size:
                problems.append(f"{entry}: {artifact.name}/{name} has another size")
    unnamed = {name: each for name, each in objects.items() if name not in named}
    return Content(
        artifacts=artifacts,
        objects=len(objects) - len(unnamed),
        size=sum(each.size for name, each in objects.items() if name in named),
        unnamed=len(unnamed),
        unnamed_size=sum(each.size for each in unnamed.values()),
        problems=tuple(problems),
    )


def verify(entries: Entries) -> Content:
    """As `status`, after every object that an artifact names was read and hashed."""
    counted = status(entries)
    problems = list(counted.problems)
    for name in entries.objects.listed(OBJECTS):
        digest = hashlib.sha256()
        try:
            for piece in entries.objects.pieces(name):
                digest.update(piece)
        except DamagedError as error:
            problems.append(str(error))
            continue
        if digest.hexdigest() != PurePosixPath(name).name:
            problems.append(f"{entries.objects.address.shown}/{name} is damaged")
    return Content(**{**vars(counted), "problems": tuple(problems)})


def collect(entries: Entries, days: float | None = None) -> tuple[int, int]:
    """Remove objects that no artifact names, and what is damaged.

    Dates are the store's own: neither this machine's clock nor that of another counts.

    Args:
        entries: The store.
        days: Also remove artifacts that were given longer ago, at least one day; None for none.

    Returns:
        How many files were removed, and their bytes.

    Raises:
        StoreError: The store cannot be read or written. Nothing is removed then that is named.
    """
    objects, now = entries.objects, entries.objects.now()
    dates = objects.listed(STEPS)
    problems: list[str] = []
    kept: set[str] = set()
    sound: set[str] = set()
    for name, artifact in whole(entries, problems):
        given = dates[name].written if name in dates else now  # given since it was listed
        if days is not None and now - given > days * DAY_S:
            continue
        sound.add(name)
        kept |= {object_name(record.sha256) for record in artifact.files.values()}
    old = {
        name: each
        for name, each in (dates | objects.listed(OBJECTS)).items()
        if name not in sound and name not in kept and now - each.written > GRACE_S
    }
    # Entries before objects: an entry must not name what is gone.
    for name in sorted(old, reverse=True):
        objects.remove(name)
    return len(old), sum(each.size for each in old.values())
