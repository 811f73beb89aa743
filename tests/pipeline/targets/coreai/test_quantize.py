"""Which values stand for weights."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.targets.coreai.quantize import cluster


def test_as_many_values_as_there_are_is_exact() -> None:
    weights = np.array([[3.0, -1.0, 0.5, 3.0]], np.float32)
    table, indices = cluster(weights, 4)
    assert np.array_equal(table[indices], weights)


def test_two_heaps_get_their_means() -> None:
    weights = np.array([-1.0, -0.9, -1.1, 5.0, 5.2, 4.8], np.float32)
    table, indices = cluster(weights, 2)
    np.testing.assert_allclose(table, [-1.0, 5.0], atol=1e-6)
    assert indices.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_each_weight_gets_the_nearest_and_more_values_are_closer(bits: int) -> None:
    weights = np.random.default_rng(0).normal(size=(24, 16, 3, 3)).astype(np.float16)
    table, indices = cluster(weights, 1 << bits)
    assert indices.shape == weights.shape
    assert table.dtype == weights.dtype
    wide = weights.astype(np.float64)
    distances = np.abs(wide[..., None] - table.astype(np.float64))
    np.testing.assert_allclose(
        np.abs(wide - table[indices].astype(np.float64)), distances.min(-1), atol=1e-12
    )
    error = float(np.sqrt(np.square(wide - table[indices]).mean()))
    # A uniform grid over the range, as wide as it is, has this one.
    step = float(np.ptp(wide)) / (1 << bits)
    assert error < step / np.sqrt(12)


def test_all_alike() -> None:
    table, indices = cluster(np.full((2, 3), 0.25, np.float16), 16)
    assert (table[indices] == np.float16(0.25)).all()
