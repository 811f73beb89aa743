"""Windows in the corners: incomplete ones, padding on one side, padding without values."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.emulate import kernels, windows

COUNT = torch.arange(1.0, 7).reshape(1, 1, 6)


def pooled(kind: str, **settings: object) -> list[float]:
    pool = kernels.max_pool if kind == "max" else kernels.average_pool
    options = {"strides": [3], "pads": [(0, 1)], "dilations": [1], "ceil": True} | settings
    result: list[float] = pool(COUNT, [3], **options).flatten().tolist()  # type: ignore[arg-type]
    return result


def test_a_window_that_begins_in_the_padding_behind_is_left_out() -> None:
    assert pooled("max") == [3, 6]
    assert pooled("average") == [2, 5]
    assert pooled("average", count_padding=True) == [2, 5]


def test_a_last_window_may_be_incomplete() -> None:
    assert pooled("max", strides=[2], pads=[(0, 0)]) == [3, 5, 6]
    assert pooled("average", strides=[2], pads=[(0, 0)]) == [2, 4, 5.5]


def test_padding_behind_counts_only_as_far_as_it_was_declared() -> None:
    # The last window holds 5, 6 and one place beyond; of that place one zero of padding, or none.
    assert pooled("average", strides=[2], pads=[(0, 1)], count_padding=True) == pytest.approx(
        [2, 4, 11 / 3]
    )
    assert pooled("average", strides=[2], pads=[(0, 0)], count_padding=True) == [2, 4, 5.5]


def test_padding_of_more_than_half_a_window() -> None:
    assert pooled("max", strides=[2], pads=[(2, 2)], ceil=False) == [1, 3, 5, 6]
    assert pooled("average", strides=[2], pads=[(2, 2)], ceil=False) == [1, 2, 4, 5.5]


def test_means_over_windows_that_are_longer_than_the_input() -> None:
    x = torch.ones(1, 1, 1, 3, 1)
    settings = {"strides": [1, 1, 1], "pads": [(1, 1), (0, 0), (1, 1)]}
    result = kernels.average_pool(x, [2, 2, 3], count_padding=True, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(result, torch.full((1, 1, 2, 2, 1), 1 / 6))


def test_dilated_means() -> None:
    assert pooled("average", strides=[1], pads=[(0, 0)], dilations=[2], ceil=False) == [3, 4]
    assert pooled("average", strides=[1], pads=[(1, 1)], dilations=[2], ceil=False) == [3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_maxima_of_integers(dtype: torch.dtype) -> None:
    x = (COUNT - 4).to(dtype) if dtype.is_signed else COUNT.to(dtype)
    settings = {"strides": [1], "pads": [(1, 0)], "dilations": [1]}
    result = kernels.max_pool(x, [2], **settings)  # type: ignore[arg-type]
    assert result.dtype == dtype
    assert torch.equal(result, torch.cat([x[..., :1], x[..., 1:]], -1))


@pytest.mark.parametrize("pads", [(3, 0), (0, 3)])
def test_windows_of_padding_alone_are_refused(pads: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="nothing but padding"):
        windows.lay([6], [3], [1], [pads], [1])


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 5 does not fit 3"):
        windows.lay([3], [3], [1], [(0, 0)], [2])


def test_places_of_the_largest_values() -> None:
    x = torch.tensor([[[5.0, 5, 1, 9]]])
    axes = windows.lay([4], [2], [1], [(1, 0)], [1])
    (places,) = windows.places_of_largest(axes, x)
    assert places.tolist() == [[[0, 0, 1, 3]]]


def test_sums_and_counts_over_two_axes() -> None:
    axes = windows.lay([3, 4], [2, 3], [2, 1], [(1, 0), (0, 1)], [1, 1])
    ones = torch.ones(1, 1, 3, 4)
    assert torch.equal(windows.sums(axes, ones)[0, 0], windows.counts(axes, count_padding=False))
    assert windows.counts(axes, count_padding=True).unique().tolist() == [6]
    assert math.prod(axis.count for axis in axes) == windows.sums(axes, ones).numel()
