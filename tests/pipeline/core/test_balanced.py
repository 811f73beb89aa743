"""A few images of many, with classes as even as can be."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.balanced import balanced

LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 4], np.int64)


@pytest.mark.parametrize(
    ("count", "places"),
    [(4, [0, 4, 6, 7]), (5, [0, 1, 4, 6, 7]), (2, [0, 6]), (100, list(range(8)))],
)
def test_as_many_of_each_class(count: int, places: list[int]) -> None:
    assert balanced(LABELS, count).tolist() == places


def test_an_order_of_classes_does_not_matter() -> None:
    mixed = np.array([4, 0, 1, 0, 2, 0, 1, 0], np.int64)
    assert balanced(mixed, 4).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (np.repeat(np.arange(10), 100), [2] * 6 + [1] * 4),
        (np.array([0] * 50 + [1] * 3), [13, 3]),
        (np.array([4, 2, 2]), [2, 1]),
    ],
)
def test_classes_are_as_even_as_can_be(labels: np.ndarray, counts: list[int]) -> None:
    chosen = balanced(labels, 16)
    assert len(set(chosen.tolist())) == len(chosen)
    assert (np.diff(chosen) > 0).all()
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() == counts


def test_of_many_classes_some_all_over_are_taken() -> None:
    labels = np.repeat(np.arange(1000), 2)
    found = labels[balanced(labels, 16)]
    assert len(np.unique(found)) == 16
    assert found.min() == 0
    assert found.max() > 900
