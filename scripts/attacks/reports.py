"""Reports: `results.json` with other bytes or other values, signed again or not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from attacks import ground as grounds
from attacks.attempt import Attempt
from attacks.ground import CHAIN, Ground, Use, changed_bytes, changed_json, put_odd
from pipeline.steps.folders import RESULTS_FILE, UNREPORTED

HOW = ("bytes", "bytes", "values", "values", "odd", "seals", "signed", "since")
"""What is changed. "seals": the stated seal of one artifact, signed again. "signed": anything,
signed again: only a seal can be found to be wrong then. "since": the file of what came later."""


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Changed reports, through the functions that commands call."""
    yield from _attempts(folder, seed, count, grounds.in_process)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """The same through real commands."""
    yield from _attempts(folder, seed, count, grounds.by_command)


def _attempts(folder: Path, seed: int, count: int, use: Use) -> Iterator[Attempt]:
    ground = grounds.make(folder)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        how = rng.choice(HOW)
        run = partial(_try, ground, rng, how, use)
        yield Attempt(f"{how} {number}", run, hostile=how not in ("signed", "since"))


def _try(ground: Ground, rng: random.Random, how: str, use: Use) -> None:
    try:
        use(ground, _changed(ground, rng, how))
    finally:
        ground.reset()
        ground.require_canaries()


def _changed(ground: Ground, rng: random.Random, how: str) -> frozenset[str]:
    """Change the report; returns artifacts of which it states the wrong seal."""
    path = ground.results / RESULTS_FILE
    before = path.read_bytes()
    if how == "since":
        since = ground.results / UNREPORTED
        text = '{\n "made_since": {\n  "onnx": [\n   "x"\n  ]\n },\n "seal": "0"\n}\n'
        since.write_text(changed_json(rng, text, sign=rng.random() < 0.5))
        return frozenset()
    if how == "seals":
        name = rng.choice(list(CHAIN))
        grounds.sign(path, lambda v: v["seals"].update({name: rng.randbytes(32).hex()}))
        return frozenset({name})
    if how == "odd":
        put_odd(rng, path)
    elif how == "bytes":
        path.write_bytes(changed_bytes(rng, before))
    else:
        text = changed_json(rng, before.decode(), sign=how == "signed")
        while text.encode() == before:
            text = changed_json(rng, before.decode(), sign=how == "signed")
        path.write_text(text)
    # A report that does not fit its seal vouches for nothing.
    return frozenset() if how == "signed" else frozenset(CHAIN)
