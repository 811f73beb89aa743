"""The growing histogram: exact counts, whatever the order."""

import numpy as np
import pytest

from calibration.histogram import Histogram, merged


def test_hand_computed_bins() -> None:
    histogram = Histogram(bins=4)
    histogram.add(np.array([0.0, 0.5, 1.5, 3.0]))
    # The largest magnitude 3 lies below 4 = 4 bins of width 1.
    assert histogram.width == 1
    assert histogram.edges.tolist() == [0, 1, 2, 3, 4]
    assert histogram.counts.tolist() == [2, 1, 0, 1]
    assert (histogram.low, histogram.high, histogram.count) == (0, 3, 4)


def test_growing_merges_whole_bins() -> None:
    histogram = Histogram(bins=4)
    histogram.add(np.array([-0.5, 0.5, 1.5, 3.0]))
    histogram.add(np.array([-7.0]))
    assert histogram.width == 2
    assert histogram.edges[0] == -8
    assert histogram.counts.tolist() == [1, 0, 0, 1, 2, 1]


def test_order_and_partition_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(5000) * 10 ** rng.uniform(-6, 3, 5000)).astype(np.float32)
    whole = Histogram()
    whole.add(values)
    parts = []
    for part in np.split(np.sort(np.abs(values)) * np.sign(values), [1, 7, 900]):
        parts.append(Histogram())
        parts[-1].add(part)
    reference = Histogram()
    reference.add(np.sort(np.abs(values)) * np.sign(values))
    total = merged(parts)
    assert total.counts.tolist() == reference.counts.tolist()
    assert total.edges.tolist() == reference.edges.tolist()
    shuffled = Histogram()
    for value in np.array_split(rng.permutation(values), 50):
        shuffled.add(value)
    assert shuffled.counts.tolist() == whole.counts.tolist()
    assert shuffled.width == whole.width


def test_zeros_first_then_anything() -> None:
    histogram = Histogram(bins=4)
    histogram.add(np.zeros(3))
    assert (histogram.low, histogram.high) == (0, 0)
    histogram.add(np.array([1e30, -1e-30]))
    assert histogram.count == 5
    assert histogram.magnitudes()[[0, -1]].tolist() == [4, 1]


def test_magnitudes_fold_the_negative_side() -> None:
    histogram = Histogram(bins=4)
    histogram.add(np.array([-0.5, -2.5, 0.5, 0.7, 3.5]))
    assert histogram.magnitudes().tolist() == [3, 0, 1, 1]


def test_magnitudes_of_one_side_away_from_zero() -> None:
    positive, negative = Histogram(bins=4), Histogram(bins=4)
    positive.add(np.array([2.5, 3.5]))
    negative.add(np.array([-2.5, -3.5]))
    assert positive.magnitudes().tolist() == [0, 0, 1, 1]
    assert negative.magnitudes().tolist() == [0, 0, 1, 1]


def test_coarse_spans_what_was_seen() -> None:
    histogram = Histogram()
    histogram.add(np.array([0.0, 1.0, 1.0, 2.0, 4.0]))
    assert histogram.coarse(4) == (1, 2, 1, 1)
    assert sum(histogram.coarse(3)) == 5


def test_coarse_of_nothing_and_of_a_constant() -> None:
    histogram = Histogram()
    assert histogram.coarse(3) == (0, 0, 0)
    histogram.add(np.full(5, 2.0))
    assert histogram.coarse(3) == (5, 0, 0)


def test_empty_batches_change_nothing() -> None:
    histogram = Histogram()
    histogram.add(np.zeros((0, 3)))
    histogram.merge(Histogram())
    assert histogram.count == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Histogram().add(np.array([1.0, value]))


def test_bad_bins_and_unlike_histograms_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Histogram(bins=100)
    with pytest.raises(ValueError, match="do not merge"):
        Histogram(bins=4).merge(Histogram(bins=8))
    with pytest.raises(ValueError, match="no histogram"):
        merged([])


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e-3, 1.0, 4095.0, 1e5, 1e30])
def test_single_precision_counts_as_double_does(scale: float) -> None:
    rng = np.random.default_rng(0)
    values = (scale * rng.standard_normal(5000)).astype(np.float32)
    values[:4] = 0.0, -1e-45, 1e-45, -values.max()  # the least that single precision holds
    single, double = Histogram(), Histogram()
    for part in np.split(values, 5):
        single.add(part)
        double.add(part.astype(np.float64))
    assert single.exponent == double.exponent
    assert single.first == double.first
    assert np.array_equal(single.counts, double.counts)


@pytest.mark.parametrize("scale", [1e-42, 1e-3, 1.0, 1e5, 1e30])
def test_a_part_and_the_extremes_of_all_count_as_one_after_the_other(scale: float) -> None:
    rng = np.random.default_rng(3)
    at_once, one_by_one = Histogram(), Histogram()
    for growth in (1e-3, 1.0, 40.0, 1e-3):
        values = (growth * scale * rng.standard_normal(3000)).astype(np.float32)
        low, high = float(values.min()), float(values.max())
        at_once.add_part(values[::7], low, high)
        one_by_one.add(values[::7])
        one_by_one.add(np.array([low, high]))
        for name in ("low", "high", "exponent", "first"):
            assert getattr(at_once, name) == getattr(one_by_one, name), name
        assert np.array_equal(at_once.counts, one_by_one.counts)


def test_a_part_of_a_constant_and_of_nothing() -> None:
    for low, high, part in ((0.0, 0.0, [0.0]), (-2.0, -2.0, [-2.0, -2.0]), (-1.0, 3.0, [])):
        histogram = Histogram()
        histogram.add_part(np.array(part), low, high)
        assert (histogram.low, histogram.high) == (low, high)
        assert histogram.count == len(part) + 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_extremes_of_a_part_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Histogram().add_part(np.array([1.0]), 0.0, value)
