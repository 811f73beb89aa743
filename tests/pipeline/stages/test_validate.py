from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.figures import State
from pipeline.stages.validate import accuracy, compare_sums, judge

LABELS = np.array([0, 1, 1, 0])
REFERENCE = np.array([[2.0, 1], [1, 2], [1, 2], [1, 2]], np.float32)


def test_shares_of_the_first_and_the_first_five() -> None:
    top1, top5 = accuracy(REFERENCE, LABELS, State.MEASURED, "PyTorch", "")
    assert (top1.value, top5.value) == (0.75, 1.0)
    assert (top1.by, top1.samples, top1.state) == ("PyTorch", 4, State.MEASURED)
    assert top1.interval is not None
    assert top1.interval[0] < 0.75 < top1.interval[1]


def test_an_artifact_is_held_against_pytorch() -> None:
    logits = REFERENCE.copy()
    logits[1] = [4, 2]  # right before, wrong now
    found = judge(logits, REFERENCE, LABELS, State.EMULATED, "executor", "no GPU")
    values = [found.agreement, found.flips, found.max_difference, found.top1_drop]
    assert [number.value for number in values if number] == [0.75, 1.0, 3.0, 0.25]
    assert found.top1.value == 0.5
    assert found.cosine is not None
    assert found.cosine.value == pytest.approx((3 + 8 / np.sqrt(20 * 5)) / 4)
    assert found.top1_drop is not None
    assert found.top1_drop.interval is not None
    for number in (*[n for n in values if n], found.top1, found.top5, found.cosine):
        assert (number.state, number.by, number.why) == (State.EMULATED, "executor", "no GPU")
    assert found.agreement is not None
    assert found.agreement.interval is None


def votes(right: int, total: int) -> np.ndarray:
    """Logits that have the class 0 for the first images, and 1 for the rest."""
    logits = np.zeros((total, 2), np.float32)
    logits[:right, 0] = logits[right:, 1] = 1
    return logits


@pytest.mark.parametrize(("right", "differ"), [(256, False), (254, False), (240, True)])
def test_two_readings_of_sums(right: int, differ: bool) -> None:
    reference = votes(256, 256)
    found = compare_sums(votes(right, 256), votes(256, 256), reference, "executor")
    assert (found.images, found.agreement_wide.value) == (256, 1)
    assert found.agreement.value == right / 256
    assert found.drop.value == (256 - right) / 256
    assert found.differ is differ
    assert (found.drop.state, found.drop.by, found.drop.samples) == (
        State.EMULATED,
        "executor",
        256,
    )


def test_narrow_sums_may_be_nearer() -> None:
    found = compare_sums(votes(256, 256), votes(200, 256), votes(256, 256), "executor")
    assert found.drop.value is not None
    assert found.drop.value < 0
    assert found.differ
