"""Which images are golden, and how far a device may be off."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.preprocess import Preprocess
from pipeline.stages.golden import FLOOR, expected, make_card
from pipeline.steps.facts.golden import GoldenFacts

RIGHT = Preprocess(32, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)


def facts(*images: int) -> GoldenFacts:
    count = len(images)
    shape = (count, 3, 8, 8)
    return GoldenFacts(images, (0,) * count, shape, shape, 3, "f" * 64, (8, 8, 3))


def test_the_tolerance_is_that_of_the_artifacts_own_error() -> None:
    exact = np.array([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 4.0]], np.float32)
    own = exact * np.array([[1.01], [1.02], [1.5]], np.float32)
    found = expected(own, exact, facts(0, 1))
    assert found is not None
    assert found.error == pytest.approx(0.02, rel=1e-4)
    assert found.tolerance == pytest.approx(0.04, rel=1e-4)
    assert found.mean_error == pytest.approx(0.015, rel=1e-4)
    assert found.mean_tolerance == pytest.approx(0.0225, rel=1e-4)
    assert (found.images, found.same_class) == (2, 2)
    exactly = expected(exact, exact, facts(0, 2))
    assert exactly is not None
    assert (exactly.tolerance, exactly.mean_tolerance) == (FLOOR, FLOOR)


def test_nothing_is_expected_of_what_is_not_finite() -> None:
    exact = np.ones((3, 3), np.float32)
    own = exact.copy()
    own[2, 1] = np.nan
    assert expected(own, exact, facts(0, 1, 2)) is None
    assert expected(own, exact, facts(0, 1)) is not None


def test_the_card_has_no_symmetry_and_tells_channels_apart() -> None:
    card = RIGHT.pixels(make_card(RIGHT)).astype(int)
    for other in (card[:, ::-1], card[::-1], card[..., ::-1], card.transpose(1, 0, 2)):
        assert np.abs(other - card).max() > 20
