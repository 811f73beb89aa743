"""Answers of timed calls: which are kept, what counts as another answer, what an audit accuses."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.answers import FEWEST_AUDITED, TOLERANCE, Answers, Audit, Drawing
from pipeline.core.figures import Ratio
from pipeline.core.network import Logits

JUDGED = [np.array([[3.0, 4.0]], np.float32), np.array([[4.0, 3.0]], np.float32)]


def drawn(*answers: tuple[int, Logits]) -> Drawing:
    drawing = Drawing()
    for batch, logits in answers:
        drawing.hear(batch, logits)
    return drawing


def test_the_answers_that_were_judged_are_right() -> None:
    found = drawn((0, JUDGED[0]), (1, JUDGED[1])).against(JUDGED)
    assert found == Answers(calls=2, wrong=0, largest_error=0.0)
    assert found.problem == ""
    assert found.words.startswith("2 answers of timed calls are those of the validation")


def test_the_answer_for_another_image_is_wrong() -> None:
    found = drawn((0, JUDGED[0]), (0, JUDGED[1]), (1, JUDGED[1])).against(JUDGED)
    assert (found.calls, found.wrong) == (3, 1)
    assert found.largest_error == pytest.approx(np.sqrt(2) / 5)
    assert found.problem == "1 of 3 answers of timed calls are not those of the validation"
    assert found.words == f"{found.problem} (relative error up to 0.28)"


@pytest.mark.parametrize(("error", "wrong"), [(0.98 * TOLERANCE, 0), (1.02 * TOLERANCE, 1)])
def test_rounding_is_no_other_answer(error: float, wrong: int) -> None:
    moved = JUDGED[0] + np.array([[0.0, 5 * error]], np.float32)
    assert drawn((0, moved)).against(JUDGED).wrong == wrong


def test_one_wrong_image_of_a_batch_makes_its_call_wrong() -> None:
    judged = [np.concatenate(JUDGED)]
    swapped = np.concatenate([JUDGED[0], JUDGED[0]])
    assert drawn((0, swapped)).against(judged).wrong == 1


def test_what_is_not_finite_equals_itself_alone() -> None:
    broken = np.array([[np.nan, np.inf]], np.float32)
    assert drawn((0, broken)).against([broken]).wrong == 0
    assert drawn((0, broken)).against(JUDGED).wrong == 1
    assert drawn((0, JUDGED[0])).against([broken]).wrong == 1
    nothing = np.zeros((1, 2), np.float32)
    assert drawn((0, np.full((1, 2), np.nan, np.float32))).against([nothing]).wrong == 1


def test_logits_of_another_network_are_wrong() -> None:
    assert drawn((0, np.zeros((1, 3), np.float32))).against(JUDGED).wrong == 1


def test_without_a_call_nothing_is_compared() -> None:
    found = Drawing().against(JUDGED)
    assert found.why_not == "no call was timed"
    assert found.words == "answers of timed calls not compared: no call was timed"


def test_each_call_has_the_same_chance_to_be_kept() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        drawing = Drawing(most=10, seed=seed)
        for batch in range(50):
            drawing.hear(batch, JUDGED[0])
        assert len(drawing.kept) == 10
        for batch, _ in drawing.kept:
            counts[batch] += 1
    # 80 of 400 are expected for each; a standard deviation is 8.
    assert counts.min() > 48
    assert counts.max() < 112


def test_equal_seeds_keep_equal_calls() -> None:
    kept = []
    for _ in range(2):
        drawing = Drawing(most=3)
        for batch in range(100):
            drawing.hear(batch, JUDGED[0])
        kept.append([batch for batch, _ in drawing.kept])
    assert kept[0] == kept[1] != [0, 1, 2]


@pytest.mark.parametrize(
    ("calls", "interval", "verdict", "accused"),
    [
        (FEWEST_AUDITED, (0.5, 0.89), "answers are remembered", True),
        (FEWEST_AUDITED, (0.5, 0.91), "not to be told from 30 calls", False),
        (FEWEST_AUDITED, (0.9, 1.1), "fine", False),
        (FEWEST_AUDITED - 1, (0.5, 0.6), "not to be told from 29 calls", False),
        (FEWEST_AUDITED - 1, (0.95, 1.0), "not to be told from 29 calls", False),
    ],
)
def test_an_audit_accuses_beyond_doubt(
    calls: int, interval: tuple[float, float], verdict: str, accused: bool
) -> None:
    audit = Audit(calls, Ratio(sum(interval) / 2, interval))
    assert audit.words.endswith(f"of the time of distinct ones: {verdict}")
    assert bool(audit.problem) is accused
