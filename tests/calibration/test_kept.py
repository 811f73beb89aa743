"""A search that was killed goes on with what it had evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.kept import Kept
from calibration.sensitivity import Groups, Limits, Outcome, search

GROUPS = ("a", "b", "c", "d", "e")
PERFECT = Outcome(0.9, 1.0, 0.0)


class KilledError(Exception):
    pass


def evaluation(excluded: Groups) -> Outcome:
    """Quantizing "d" alone costs too much."""
    return PERFECT if "d" in excluded else Outcome(0.5, 0.6, 0.4)


def run(path: Path, dies_after: int | None = None) -> tuple[frozenset[str], list[Groups]]:
    """A search that keeps its evaluations; what it found, and what it had to evaluate."""
    kept = Kept(path)
    made: list[Groups] = []

    def evaluate(excluded: Groups) -> Outcome:
        def anew() -> Outcome:
            if len(made) == dies_after:
                raise KilledError
            made.append(excluded)
            return evaluation(excluded)

        return kept.outcome(",".join(sorted(excluded)), anew)

    found = search(GROUPS, evaluate, baseline=PERFECT, limits=Limits(0.01))
    return found.excluded, made


def test_what_was_evaluated_before_a_kill_is_not_evaluated_again(tmp_path: Path) -> None:
    whole, all_made = run(tmp_path / "whole.jsonl")
    path = tmp_path / "kept" / "search.jsonl"
    with pytest.raises(KilledError):
        run(path, dies_after=4)
    found, made = run(path)
    assert (found, made) == (whole, all_made[4:])
    assert run(path) == (whole, [])


def test_a_line_that_was_cut_off_is_evaluated_again(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    whole, all_made = run(path)
    text = path.read_text()
    path.write_text(text[:-12])
    assert run(path) == (whole, all_made[-1:])


def test_a_foreign_file_is_neither_read_nor_written(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    path.write_text("precious")
    _, made = run(path)
    assert made
    Kept(path).forget()
    assert path.read_text() == "precious"


def test_a_search_that_ended_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "search.jsonl"
    run(path)
    assert path.exists()
    Kept(path).forget()
    assert not path.parent.exists()
