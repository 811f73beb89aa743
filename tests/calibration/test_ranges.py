"""Ranges, scales and zero points against cases computed by hand."""

import itertools
import math

import numpy as np
import pytest

from calibration.histogram import Histogram
from calibration.ranges import (
    ACTIVATIONS_INT8,
    ACTIVATIONS_UINT8,
    FLOAT8_E4M3,
    WEIGHTS_INT8,
    DType,
    Method,
    Range,
    Scheme,
    choose_range,
    divergences,
    method_named,
    quantization,
    weight_quantization,
)
from pipeline.core.errors import ConfigError, DataError


def seen(*values: float, bins: int = 4096) -> Histogram:
    histogram = Histogram(bins)
    histogram.add(np.array(values))
    return histogram


# Scale and zero point.


@pytest.mark.parametrize(
    ("low", "high", "scheme", "scale", "zero_point"),
    [
        (-1.0, 2.54, ACTIVATIONS_INT8, 0.02, 0),
        (-2.54, 1.0, WEIGHTS_INT8, 0.02, 0),
        (-1.27, 1.0, Scheme(DType.UINT8), 0.01, 128),
        (0.0, 5.1, ACTIVATIONS_UINT8, 0.02, 0),
        (-1.0, 4.1, ACTIVATIONS_UINT8, 0.02, 50),
        (-5.1, 0.0, ACTIVATIONS_UINT8, 0.02, 255),
        (-1.0, 4.1, Scheme(DType.INT8, symmetric=False), 0.02, -78),
        # Widened to hold zero.
        (2.0, 5.1, ACTIVATIONS_UINT8, 0.02, 0),
        (-5.1, -2.0, ACTIVATIONS_UINT8, 0.02, 255),
        (-224.0, 100.0, FLOAT8_E4M3, 0.5, 0),
    ],
)
def test_scale_and_zero_point(
    low: float, high: float, scheme: Scheme, scale: float, zero_point: int
) -> None:
    parameters = quantization(Range(low, high), scheme)
    assert parameters.scale == np.float32(scale)
    assert int(parameters.zero_point) == zero_point
    assert parameters.scale.dtype == np.float32
    assert parameters.zero_point.dtype == scheme.dtype.numpy


@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8, FLOAT8_E4M3])
def test_a_range_of_zero_gets_scale_one(scheme: Scheme) -> None:
    assert float(quantization(Range(0, 0), scheme).scale) == 1


@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8, FLOAT8_E4M3])
def test_scales_are_never_subnormal(scheme: Scheme) -> None:
    assert float(quantization(Range(-1e-42, 1e-42), scheme).scale) >= np.finfo(np.float32).tiny


def test_quantize_rounds_ties_to_even_and_saturates() -> None:
    parameters = quantization(Range(-127, 127), ACTIVATIONS_INT8)
    stored = parameters.quantize(np.array([0.5, 1.5, 2.5, -0.5, 300, -128, -300]))
    assert stored.dtype == np.int8
    assert stored.tolist() == [0, 2, 2, 0, 127, -128, -128]
    narrow = quantization(Range(-127, 127), WEIGHTS_INT8)
    assert narrow.quantize(np.array([-300.0])).tolist() == [-127]


def test_zero_is_exact_in_every_scheme() -> None:
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8, FLOAT8_E4M3, Scheme(DType.UINT8)):
        assert quantization(Range(-0.17, 5.3), scheme).round_trip(np.zeros(1)).tolist() == [0]


def test_unsigned_round_trip() -> None:
    parameters = quantization(Range(-1, 4.1), ACTIVATIONS_UINT8)
    assert parameters.quantize(np.array([-1, 0, 4.1, 9])).tolist() == [0, 50, 255, 255]
    np.testing.assert_allclose(
        parameters.round_trip(np.array([-1, 0.013, 9])), [-1, 0.02, 4.1], 1e-6
    )


def test_float8_rounds_to_its_grid_and_saturates() -> None:
    parameters = quantization(Range(-448, 448), FLOAT8_E4M3)
    # With 3 bits of mantissa the neighbours of 17 are 16 and 18 (a tie, to the even 16), the
    # smallest number is 2**-9, and nothing lies beyond 448.
    values = np.array([17.0, 17.5, 2**-9, 2**-11, 500.0, -1e9])
    assert parameters.round_trip(values).tolist() == [16, 18, 2**-9, 0, 448, -448]


def test_onnx_agrees_with_quantize() -> None:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    values = np.linspace(-3, 6, 97).astype(np.float32)
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
        parameters = quantization(Range(-1, 4.1), scheme)
        node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
        kind = scheme.dtype.onnx
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [97]),
                helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
                helper.make_tensor_value_info("z", kind, []),
            ],
            [helper.make_tensor_value_info("y", kind, [97])],
        )
        feeds = {"x": values, "s": parameters.scale, "z": parameters.zero_point}
        result = ReferenceEvaluator(helper.make_model(graph)).run(None, feeds)
        assert isinstance(result, list)
        assert parameters.quantize(values).tolist() == result[0].tolist()


def test_types_have_the_numbers_of_onnx() -> None:
    from onnx import TensorProto

    assert DType.INT8.onnx == TensorProto.INT8
    assert DType.UINT8.onnx == TensorProto.UINT8
    assert DType.FLOAT8.onnx == TensorProto.FLOAT8E4M3FN


def test_schemes_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="zero point"):
        Scheme(DType.FLOAT8, symmetric=False)
    with pytest.raises(ConfigError, match="narrow"):
        Scheme(DType.UINT8, narrow=True)


@pytest.mark.parametrize("bounds", [(math.nan, 1), (0, math.inf), (-math.inf, 0)])
def test_ranges_are_finite(bounds: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="not finite"):
        Range(*bounds)


def test_ranges_do_not_end_before_they_begin() -> None:
    with pytest.raises(DataError, match="ends before"):
        Range(1, 0)


def test_clip() -> None:
    assert Range(-1, 5).clip(2) == Range(-1, 2)
    assert Range(-4, 5).clip(2) == Range(-2, 2)
    assert Range(3, 5).clip(2) == Range(2, 2)
    assert Range(-4, 5).amax == 5


# Methods.


def test_min_max_keeps_everything() -> None:
    assert choose_range(seen(-1, 0, 7), Method.MIN_MAX, ACTIVATIONS_INT8) == Range(-1, 7)


def test_percentile_symmetric() -> None:
    # 100 magnitudes, one in each bin [i, i + 1): 90 % of them lie below 90.
    histogram = seen(*[(-1) ** i * (i + 0.5) for i in range(100)], bins=128)
    assert histogram.width == 1
    chosen = choose_range(histogram, Method.PERCENTILE, ACTIVATIONS_INT8, percentile=90)
    assert chosen == Range(-90, 90)


def test_percentile_asymmetric_cuts_half_at_either_end() -> None:
    histogram = seen(*[i + 0.5 for i in range(-20, 80)], bins=128)
    chosen = choose_range(histogram, Method.PERCENTILE, ACTIVATIONS_UINT8, percentile=90)
    assert chosen.low == pytest.approx(-15)
    assert chosen.high == pytest.approx(75)


def test_percentile_of_everything_is_min_max() -> None:
    histogram = seen(-1.25, 0, 3.75)
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
        assert choose_range(histogram, Method.PERCENTILE, scheme, 100) == Range(-1.25, 3.75)


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_percentiles_outside_of_their_range(percentile: float) -> None:
    with pytest.raises(ConfigError, match="percentile"):
        choose_range(seen(0, 1), Method.PERCENTILE, ACTIVATIONS_INT8, percentile)


def test_divergence_by_hand() -> None:
    # Two levels. All six bins: P = (1, 3, 2, 2, 1, 0) / 9, groups of three bins hold 6 and 3 and
    # spread over their 3 and 2 occupied bins: Q = (2, 2, 2, 1.5, 1.5, 0) / 9.
    counts = np.array([1, 3, 2, 2, 1, 0])
    whole = sum(
        p / 9 * math.log(p / q) for p, q in zip([1, 3, 2, 2, 1], [2, 2, 2, 1.5, 1.5], strict=True)
    )
    # Four bins kept: P = (1, 3, 2, 2 + 1) / 9, Q = (2, 2, 2, 2) / 8.
    four = sum(p / 9 * math.log(p / 9 / (2 / 8)) for p in [1, 3, 2, 3])
    result = divergences(counts, np.array([6, 4]), 2)
    np.testing.assert_allclose(result, [whole, four], rtol=1e-12)


def test_divergence_is_infinite_where_the_last_level_lacks_what_is_cut_off() -> None:
    counts = np.array([4, 4, 0, 0, 0, 1])
    result = divergences(counts, np.array([4, 6]), 2)
    assert np.isinf(result[0])
    assert np.isfinite(result[1])


def test_divergences_agree_with_the_plain_definition() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(60 * np.exp(-np.arange(300) / 60.0))
    kept = np.arange(16, 301, 7)

    def plainly(number: int, levels: int) -> float:
        p = counts[:number].astype(float)
        p[-1] += counts[number:].sum()
        borders = np.rint(np.linspace(0, number, levels + 1)).astype(int)
        q = np.zeros(number)
        for start, stop in itertools.pairwise(borders):
            occupied = p[start:stop] > 0
            if occupied.any():
                q[start:stop][occupied] = counts[start:stop].sum() / occupied.sum()
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        with np.errstate(divide="ignore"):
            return float((p[used] * np.log(p[used] / q[used])).sum())

    expected = [plainly(int(number), 16) for number in kept]
    np.testing.assert_allclose(divergences(counts, kept, 16), expected, rtol=1e-9, atol=1e-12)


def test_entropy_cuts_off_stray_outliers() -> None:
    rng = np.random.default_rng(0)
    histogram = seen(*rng.standard_normal(50_000), 40.0)
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
        chosen = choose_range(histogram, Method.ENTROPY, scheme)
        assert 2.5 < chosen.high < 8
        assert chosen.low >= histogram.low


def test_entropy_keeps_an_even_distribution_whole() -> None:
    histogram = seen(*np.linspace(-1, 1, 40_001))
    chosen = choose_range(histogram, Method.ENTROPY, ACTIVATIONS_INT8)
    assert chosen.amax == pytest.approx(1, rel=0.02)


def test_entropy_is_not_moved_by_a_spike_of_zeros() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(20_000))
    plain_range = choose_range(seen(*values), Method.ENTROPY, ACTIVATIONS_UINT8)
    spiked = choose_range(seen(*values, *np.zeros(500_000)), Method.ENTROPY, ACTIVATIONS_UINT8)
    assert spiked.high == pytest.approx(plain_range.high, rel=0.1)


@pytest.mark.parametrize("count", [50, 20_000])
def test_entropy_does_not_collapse_onto_values_far_from_zero(count: int) -> None:
    values = np.random.default_rng(0).normal(3, 0.4, count)
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
        chosen = choose_range(seen(*values), Method.ENTROPY, scheme)
        assert (values > chosen.high).mean() <= 0.011
        assert chosen.low == values.min()


def test_entropy_is_for_integers() -> None:
    with pytest.raises(ConfigError, match="float8"):
        choose_range(seen(0, 1), Method.ENTROPY, FLOAT8_E4M3)


def test_mse_keeps_what_fits_exactly() -> None:
    # Whole numbers up to 127 have no error at all with the scale 1; any smaller range has.
    histogram = seen(*range(-127, 128), bins=4096)
    chosen = choose_range(histogram, Method.MSE, ACTIVATIONS_INT8)
    assert chosen.amax == 127


def test_mse_trades_clipping_for_steps() -> None:
    # One outlier a at 40 among n values of which the steps matter: the whole range costs about
    # n * step**2 / 12 with step = 40 / 127, a clipped one (40 - t)**2 + n * (t / 127)**2 / 12.
    rng = np.random.default_rng(0)
    n = 1_000_000
    values = rng.uniform(-3, 3, n)
    histogram = Histogram()
    histogram.add(np.append(values, 40.0))
    chosen = choose_range(histogram, Method.MSE, ACTIVATIONS_INT8)
    thresholds = np.linspace(3, 40, 2000)
    costs = (40 - thresholds) ** 2 + n * (thresholds / 127) ** 2 / 12
    assert chosen.high == pytest.approx(thresholds[costs.argmin()], rel=0.1)


def test_mse_moves_the_ends_apart() -> None:
    rng = np.random.default_rng(0)
    histogram = Histogram()
    histogram.add(np.append(rng.uniform(-1, 3, 3_000_000), 30.0))
    chosen = choose_range(histogram, Method.MSE, ACTIVATIONS_UINT8)
    assert chosen.low == pytest.approx(-1, abs=0.05)
    assert chosen.high < 10


@pytest.mark.parametrize("method", list(Method))
def test_constants_keep_their_value(method: Method) -> None:
    assert choose_range(seen(2.5, 2.5), method, ACTIVATIONS_UINT8) == Range(2.5, 2.5)
    assert choose_range(seen(0, 0), method, ACTIVATIONS_INT8) == Range(0, 0)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8])
def test_ranges_reach_no_further_than_what_was_seen(method: Method, scheme: Scheme) -> None:
    for values in ([100.0, 100.5, 101], [-3.0, -2, -1], [-1e-20, 1e20], [0, 1e-30]):
        histogram = seen(*values)
        chosen = choose_range(histogram, method, scheme)
        assert chosen.amax <= max(abs(histogram.low), abs(histogram.high))
        assert np.isfinite(quantization(chosen, scheme).scale)


def test_nothing_was_seen() -> None:
    with pytest.raises(DataError, match="no value"):
        choose_range(Histogram(), Method.MIN_MAX, ACTIVATIONS_INT8)


def test_mse_moves_the_low_end_apart_too() -> None:
    rng = np.random.default_rng(0)
    histogram = Histogram()
    histogram.add(np.append(rng.uniform(-1, 3, 1_000_000), [-30.0, 60.0]))
    chosen = choose_range(histogram, Method.MSE, ACTIVATIONS_UINT8)
    # A threshold for both ends, or a part of both, would leave the low end at -3 or below.
    assert -2 < chosen.low < -1
    assert 3 < chosen.high < 40


def error_of(histogram: Histogram, chosen: Range, scheme: Scheme) -> float:
    rounded = quantization(chosen, scheme).round_trip(histogram.centres)
    return float((histogram.counts * (rounded - histogram.centres) ** 2).sum())


@pytest.mark.parametrize("scheme", [ACTIVATIONS_INT8, ACTIVATIONS_UINT8, FLOAT8_E4M3])
def test_mse_finds_what_is_best_of_a_grid(scheme: Scheme) -> None:
    histogram = seen(*np.random.default_rng(4).standard_t(3, 20_000))
    low, high, amax = histogram.low, histogram.high, max(-histogram.low, histogram.high)
    found = error_of(histogram, choose_range(histogram, Method.MSE, scheme), scheme)
    for fraction in np.linspace(1, 1 / 16, 96):
        whole = Range(low, high).clip(amax * fraction)
        assert found <= error_of(histogram, whole, scheme)
        if not scheme.symmetric:
            assert found <= error_of(histogram, Range(low * fraction, high * fraction), scheme)


def test_entropy_takes_the_first_bin_for_no_more_than_the_second() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(20_000))
    spiked, plain = seen(*values, *np.zeros(500_000), bins=512), seen(*values, bins=512)
    plain.counts[0] = plain.counts[1]
    few = seen(*values, bins=512)
    few.counts[0] = few.counts[1] // 2
    for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
        expected = choose_range(plain, Method.ENTROPY, scheme)
        assert choose_range(spiked, Method.ENTROPY, scheme).high == expected.high
    before = few.counts.copy()
    choose_range(few, Method.ENTROPY, ACTIVATIONS_INT8)
    assert np.array_equal(few.counts, before)


def test_a_method_by_its_name() -> None:
    assert [method_named(str(method)) for method in Method] == list(Method)
    assert [str(m) for m in Method] == ["min-max", "percentile", "entropy", "mse"]
    with pytest.raises(
        ConfigError, match="unknown calibration method 'x'; there are min-max, perc"
    ):
        method_named("x")


def test_limits_of_what_is_stored() -> None:
    assert ACTIVATIONS_INT8.limits == (-128, 127)
    assert WEIGHTS_INT8.limits == (-127, 127)
    assert ACTIVATIONS_UINT8.limits == (0, 255)
    assert FLOAT8_E4M3.limits == (-448, 448)
    assert [str(kind) for kind in DType] == ["int8", "uint8", "float8e4m3fn"]
    for wrong in ({"dtype": DType.INT8, "symmetric": False}, {"dtype": DType.FLOAT8}):
        with pytest.raises(ConfigError, match="narrow"):
            Scheme(**wrong, narrow=True)


def test_ranges_of_one_value() -> None:
    assert Range(2, 2).constant
    assert not Range(2, 3).constant
    assert Range(-3, 2).amax == 3


# Weights.


def test_mse_weights_are_the_best_of_a_series_of_thresholds() -> None:
    weight = np.random.default_rng(0).standard_t(3, (2, 20_000))
    found = weight_quantization(weight, 0, method=Method.MSE)
    amax = np.abs(weight).max(1)
    error = ((found.round_trip(weight) - weight) ** 2).sum(1)
    ratio = found.scale * 127 / amax
    assert (ratio <= 1 + 1e-6).all()
    assert (ratio >= 0.3 - 1e-6).all()
    assert ratio.min() < 0.95
    for fraction in np.linspace(1, 0.3, 96):
        scale = (amax * fraction / 127).astype(np.float32)[:, None]
        rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.float32) * scale
        assert (error <= ((rounded - weight) ** 2).sum(1) * (1 + 1e-6)).all()
    whole = weight_quantization(weight, None, method=Method.MSE)
    assert whole.scale.shape == ()


def test_weights_of_nothing_or_next_to_nothing() -> None:
    tiny = float(np.finfo(np.float32).tiny)
    found = weight_quantization(np.array([[0.0], [1e-42], [127.0]]), 0)
    assert found.scale.tolist() == [1.0, pytest.approx(tiny), 1.0]
    assert weight_quantization(np.empty((2, 0)), 0).scale.tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match="infinite"):
        weight_quantization(np.array([[np.inf]]), 0)


def test_weight_scales_by_channel() -> None:
    weight = np.array([[1.27, -0.5], [0.0, 0.0], [-2.54, 1.0]])
    parameters = weight_quantization(weight, 0)
    np.testing.assert_allclose(parameters.scale, [0.01, 1, 0.02], 1e-6)
    assert parameters.zero_point.tolist() == [0, 0, 0]
    assert parameters.quantize(weight).tolist() == [[127, -50], [0, 0], [-127, 50]]
    last = weight_quantization(weight.T, -1)
    np.testing.assert_allclose(last.quantize(weight.T), parameters.quantize(weight).T)


def test_weight_scale_of_the_whole() -> None:
    parameters = weight_quantization(np.array([[1.0, -2.54]]), None)
    assert parameters.scale.shape == ()
    assert float(parameters.scale) == pytest.approx(0.02, rel=1e-6)
    assert int(parameters.zero_point) == 0


def test_mse_weights_are_never_worse_than_min_max() -> None:
    weight = np.random.default_rng(0).standard_t(3, (8, 16, 3, 3))
    errors = [
        ((weight_quantization(weight, 0, method=method).round_trip(weight) - weight) ** 2).sum(
            (1, 2, 3)
        )
        for method in (Method.MIN_MAX, Method.MSE)
    ]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()


def test_weights_that_cannot_be_quantized() -> None:
    with pytest.raises(DataError, match="NaN"):
        weight_quantization(np.array([[np.nan]]), 0)
    with pytest.raises(ConfigError, match="symmetric"):
        weight_quantization(np.ones((1, 1)), 0, ACTIVATIONS_UINT8)
    with pytest.raises(ConfigError, match="activations"):
        weight_quantization(np.ones((1, 1)), 0, method=Method.ENTROPY)
