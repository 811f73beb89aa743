"""Weights of which no two products can saturate 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.pairs import MOST, excess, is_safe, neighbours, rows, safe_weights
from calibration.ranges import Quantization, weight_quantization


def a_weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_channels_of_one_position_are_neighbours() -> None:
    # Of two channels and two positions: the channels of the first position come first.
    weight = np.array([[[[1, 2]], [[3, 4]]]], np.int8)
    assert neighbours(weight).tolist() == [[[1, 3], [2, 4]]]


def test_an_odd_last_weight_has_zero_beside_it() -> None:
    assert neighbours(np.array([[100, 100, 120]], np.int8)).tolist() == [[[100, 100], [120, 0]]]


def test_only_weights_of_the_same_sign_add_up() -> None:
    weight = np.array([[127, -127], [100, 29], [64, 64], [-100, -29]], np.int8)
    assert excess(weight).ravel().tolist() == [0, 1, 0, 1]


def test_what_is_safe_cannot_saturate_and_one_more_can() -> None:
    assert 255 * MOST <= 32767 < 255 * (MOST + 1)


@pytest.mark.parametrize("shape", [(8, 6), (8, 7), (16, 4, 3, 3), (5, 3, 1, 1), (32, 64, 1, 1)])
def test_safe_weights_are_safe_and_near(shape: tuple[int, ...]) -> None:
    weight = a_weight(*shape)
    found = weight_quantization(weight, 0)
    assert not is_safe(found.quantize(weight))
    safe, stored = safe_weights(weight, found)
    assert is_safe(stored)
    assert stored.dtype == np.int8
    assert stored.shape == weight.shape
    assert (safe.scale >= found.scale).all()
    assert (safe.scale <= 2 * found.scale * 1.0001).all()


def test_they_lose_less_than_a_bit() -> None:
    weight = a_weight(64, 256)
    found = weight_quantization(weight, 0)
    safe, stored = safe_weights(weight, found)
    seven = Quantization(found.scheme, found.scale * 2, found.zero_point, 0)

    def error(values: np.ndarray) -> float:
        return float(((values - weight) ** 2).mean())

    assert error(safe.dequantize(stored)) < 0.6 * error(seven.round_trip(weight))


def test_a_safe_channel_stays_as_it_is() -> None:
    weight = np.array([[1.0, -1.0, 0.3, -0.2], [1.0, 1.0, 0.3, 0.2]], np.float32)
    found = weight_quantization(weight, 0)
    safe, stored = safe_weights(weight, found)
    assert safe.scale[0] == found.scale[0]
    assert stored[0].tolist() == found.quantize(weight)[0].tolist()
    assert safe.scale[1] > found.scale[1]


def test_weights_of_other_layouts() -> None:
    weight = a_weight(6, 8)
    found = weight_quantization(weight, 1)
    safe, stored = safe_weights(weight, found)
    assert is_safe(stored, axis=1)
    turned, other = safe_weights(weight.T.copy(), weight_quantization(weight.T.copy(), 0))
    assert np.array_equal(stored.T, other)
    assert np.array_equal(safe.scale, turned.scale)


def test_rows_are_outputs_by_products() -> None:
    assert rows(a_weight(4, 3, 2, 2)).shape == (4, 12)
    assert rows(a_weight(4, 3), axis=1).shape == (3, 4)
