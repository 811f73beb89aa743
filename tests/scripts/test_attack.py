"""A small part of the attack, and what counts as a fault in it; `scripts/attack.py` tries more."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import attack
import click
import numpy as np
import pytest
from attacks.attempt import Attempt, Outcome, tally, tried
from attacks.ground import LOOKED_AT, ODD_VALUES, changed_json, lay_out, look_at
from attacks.images import encoded
from attacks.tars import archive
from click.testing import CliRunner

from pipeline.core.errors import DataError

SHARE = {"yaml": 9, "model": 40, "checkpoint": 12, "safetensors": 20, "image": 1, "tar": 5}
SHARE |= dict.fromkeys(("artifact", "manifest", "report", "import"), 3)
"""Every how many of a kind are tried here."""


@pytest.mark.parametrize("kind", attack.KINDS)
def test_odd_input_is_refused_or_works(kind: str, tmp_path: Path) -> None:
    attempts = attack.KINDS[kind](tmp_path, 0, 60)
    result = tally(itertools.islice(attempts, 0, None, SHARE[kind]), limit_s=60)
    assert result.faults == []
    assert result.counts.total() >= 20
    assert result.counts[Outcome.REFUSED] > 0


def test_equal_seeds_try_equal_inputs(tmp_path: Path) -> None:
    for kind in ("image", "tar"):
        (tmp_path / kind).mkdir()
        first = [a.name for a in attack.KINDS[kind](tmp_path / kind, 3, 20)]
        assert first == [a.name for a in attack.KINDS[kind](tmp_path / kind, 3, 20)]
        assert len(set(first)) == len(first)


def refuse(message: str) -> None:
    raise DataError(message)


def fail() -> None:
    raise KeyError("x")


def wait() -> None:
    while True:
        time.sleep(0.01)


def work() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (Attempt("", lambda: refuse("x is no file")), Outcome.REFUSED),
        (Attempt("", lambda: refuse("x\n" * 60)), Outcome.TRACEBACK),
        (Attempt("", lambda: refuse("x" * 5000)), Outcome.TRACEBACK),
        (Attempt("", lambda: None), Outcome.LOADED),
        (Attempt("", lambda: None, hostile=True), Outcome.WRONG),
        (Attempt("", fail), Outcome.TRACEBACK),
        (Attempt("", wait), Outcome.HANG),
        (Attempt("", work), Outcome.HANG),
    ],
)
def test_what_came_of_an_attempt(attempt: Attempt, expected: Outcome) -> None:
    outcome, why = tried(attempt, limit_s=0.05 if expected is Outcome.HANG else 60)
    assert outcome is expected
    assert bool(why) == (expected not in (Outcome.LOADED, Outcome.WRONG))


def test_a_wait_is_longer_than_the_limit_of_work() -> None:
    """On a busy machine an attempt waits for its turn."""
    assert tried(Attempt("", lambda: time.sleep(0.2)), limit_s=0.1)[0] is Outcome.LOADED


def test_a_fault_decides_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attack.limit_memory", "faulthandler.enable", "faulthandler.dump_traceback_later"):
        monkeypatch.setattr(name, lambda *_, **__: None)
    kinds = {
        "good": lambda *_: iter([Attempt("a", lambda: None), Attempt("b", lambda: refuse("x"))]),
        "bad": lambda *_: iter([Attempt("c", fail)]),
    }
    monkeypatch.setattr(attack, "KINDS", kinds)
    monkeypatch.setattr(attack.main.params[0], "required", False)
    monkeypatch.setattr(attack.main.params[0], "type", click.STRING)
    good = CliRunner().invoke(attack.main, ["good"])
    assert good.exit_code == 0, good.output
    assert good.output.startswith("good: 2 inputs: 1 refused clearly, 1 loaded, 0 loaded, and")
    both = CliRunner().invoke(attack.main, ["good", "bad"])
    assert both.exit_code == 1
    assert "  tracebacks: c: KeyError: 'x'" in both.output


def test_changes_leave_the_odd_values_as_they_are() -> None:
    """They would lie in themselves after some thousand changes, and no JSON holds that."""
    before, rng = repr(ODD_VALUES), random.Random(0)
    text = json.dumps({"seal": "", "a": [1, {"b": {}}], "c": {"d": [], "e": 1}})
    for _ in range(500):
        changed_json(rng, text, sign=True)
    assert repr(ODD_VALUES) == before


def test_a_real_command_looks_at_what_is_odd_and_what_is_not(tmp_path: Path) -> None:
    lay_out(tmp_path)
    image = encoded(np.random.default_rng(0), "RGB", "PNG")
    names = tuple(f"{label}/1.png" for label in "abcd")
    (tmp_path / "whole.tar").write_bytes(archive(image, names=names))
    look_at(tmp_path, LOOKED_AT % ("random", "tar:whole.tar"))
    with pytest.raises(DataError, match="odd"):
        look_at(tmp_path, LOOKED_AT % ("odd.pth", "tar:whole.tar"))


def test_a_look_that_changes_something_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path)
    for name in ("notes.txt", "new.txt", "engines/trial/new.txt"):

        def write(folder: Path, *arguments: str, name: str = name) -> str:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("changed")
            return ""

        monkeypatch.setattr("attacks.ground.command", write)
        with pytest.raises(AssertionError, match="changed something"):
            look_at(tmp_path, "")


@pytest.mark.parametrize("kind", ["yaml", "checkpoint", "safetensors", "tar"])
def test_as_many_inputs_as_asked_for_are_tried_by_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | bytes] = []

    def note(folder: Path, text: str | bytes) -> None:
        odd = [path for path in folder.iterdir() if path.name.startswith("odd")]
        given.append(odd[0].read_bytes() if odd else text)

    monkeypatch.setattr("attacks.ground.look_at", note)
    attempts = list(attack.COMMANDS[kind](tmp_path, 0, 9))
    for attempt in attempts:
        attempt.run()
    assert len(attempts) == len({attempt.name for attempt in attempts}) == 9
    assert len(set(given)) >= 8
