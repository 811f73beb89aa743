"""Manifests: `artifact.json` with other bytes or other values, signed again or not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from attacks import ground as grounds
from attacks.attempt import Attempt
from attacks.ground import CHAIN, Ground, Use, changed_bytes, changed_json, put_odd
from pipeline.steps.artifact import MADE, MANIFEST
from pipeline.steps.folders import RESULTS_FILE

HOW = ("bytes", "values", "signed", "signed", "stated", "made", "odd")
"""What is changed. "stated": an attacker also states the new seal in results.json: nothing can
find that, but nothing may break by it. "made": the file beside it, which has no seal."""


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Changed manifests, through the functions that commands call."""
    yield from _attempts(folder, seed, count, grounds.in_process)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """The same through real commands."""
    yield from _attempts(folder, seed, count, grounds.by_command)


def _attempts(folder: Path, seed: int, count: int, use: Use) -> Iterator[Attempt]:
    ground = grounds.make(folder)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name, how = rng.choice(list(CHAIN)), rng.choice(HOW)
        run = partial(_try, ground, rng, name, how, use)
        yield Attempt(f"{how} {name} {number}", run, hostile=how not in ("stated", "made"))


def _try(ground: Ground, rng: random.Random, name: str, how: str, use: Use) -> None:
    try:
        use(ground, _changed(ground, rng, name, how))
    finally:
        ground.reset()
        ground.require_canaries()


def _changed(ground: Ground, rng: random.Random, name: str, how: str) -> frozenset[str]:
    """Change a manifest; returns which artifacts must not be taken in."""
    path = ground.results / name / MANIFEST
    before = path.read_bytes()
    if how == "made":
        made = ground.results / name / MADE
        made.write_bytes(changed_bytes(rng, made.read_bytes()))
        return frozenset()
    if how == "odd":
        put_odd(rng, path)
    elif how == "bytes":
        path.write_bytes(changed_bytes(rng, before))
    else:
        text = changed_json(rng, before.decode(), sign=how != "values")
        while text.encode() == before:
            text = changed_json(rng, before.decode(), sign=how != "values")
        path.write_text(text)
    if how != "stated":
        return frozenset({name})
    _state(ground, name, path)
    return frozenset()


def _state(ground: Ground, name: str, path: Path) -> None:
    seal = path.read_bytes()[-68:-4].decode(errors="replace")  # where it stands in a sealed text
    grounds.sign(ground.results / RESULTS_FILE, lambda v: v["seals"].update({name: seal}))
