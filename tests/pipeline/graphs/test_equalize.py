"""Equalization: the same bits out, and channels that are alike inside."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, helper, numpy_helper

from calibration.observe import observe
from pipeline.core.errors import ConfigError, DataError
from pipeline.graphs.equalize import equalize, tensors

Batch = npt.NDArray[np.float32]
Run = Callable[[ModelProto, Batch], Batch]
Make = Callable[..., ModelProto]


def constant(model: ModelProto, name: str) -> Batch:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value: Batch = numpy_helper.to_array(tensor)
    return value


def test_pairs_of_a_network(small_model: ModelProto) -> None:
    # The Gelu and the LayerNormalization are not homogeneous, so nothing crosses them.
    assert tensors(small_model) == {"c1": 1, "norm": -1, "relu": -1}
    pairs = equalize(small_model).pairs
    assert [(p.producer, p.tensor, p.consumer) for p in pairs] == [
        ("c1", "c1", "c2"),
        ("norm", "norm", "mm"),
        ("mm", "relu", "logits"),
    ]


def test_outputs_are_the_same_bits(small_model: ModelProto, pixels: Batch, run_model: Run) -> None:
    magnitudes = {
        name: np.maximum(-seen.channel_low, seen.channel_high)
        for name, seen in observe(
            small_model, pixels, list(tensors(small_model)), channels=tensors(small_model)
        ).items()
        if seen.channel_low is not None and seen.channel_high is not None
    }
    for activations in (None, magnitudes):
        result = equalize(small_model, activations)
        assert any(pair.channels for pair in result.pairs)
        np.testing.assert_array_equal(
            run_model(result.model, pixels), run_model(small_model, pixels)
        )


def test_channels_become_alike(small_model: ModelProto) -> None:
    for pair in equalize(small_model).pairs:
        assert pair.spread_after <= pair.spread_before
    first = equalize(small_model).pairs[0]
    assert first.spread_before > 2
    assert first.spread_after < first.spread_before / 1.2


def test_activations_divide_as_the_scales_say(small_model: ModelProto, pixels: Batch) -> None:
    def magnitudes(model: ModelProto) -> npt.NDArray[np.float64]:
        seen = observe(model, pixels, ["c1"], channels={"c1": 1})["c1"]
        assert seen.channel_low is not None
        assert seen.channel_high is not None
        result: npt.NDArray[np.float64] = np.maximum(-seen.channel_low, seen.channel_high)
        return result

    before = magnitudes(small_model)
    result = equalize(small_model, {"c1": before}, strength=1.0)
    np.testing.assert_array_equal(magnitudes(result.model) * result.scales["c1"], before)
    after = magnitudes(result.model)
    # The scales are powers of two, so channels end up within a factor of two.
    assert after.max() / after.min() <= 2.0001


def test_scales_by_hand(make_model: Make) -> None:
    nodes = [
        helper.make_node("Gemm", ["image", "w1", "b1"], ["x"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Gemm", ["y", "w2"], ["logits"]),
    ]
    constants = {
        # Columns make channels with the ranges 16, 1 and 0.
        "w1": np.array([[16, 1, 0], [-8, 0.5, 0]], dtype=np.float32),
        "b1": np.array([32, 3, 1], dtype=np.float32),
        # Rows read them, with the ranges 1, 4 and 2.
        "w2": np.array([[1, -0.5], [4, 1], [2, 2]], dtype=np.float32),
    }
    model = make_model(nodes, constants, ["b", 2], ["b", 2])
    result = equalize(model)
    # sqrt(16 / 1) = 4, sqrt(1 / 4) = 1/2; a channel that is always zero stays.
    assert result.scales["y"].tolist() == [4, 0.5, 1]
    assert constant(result.model, "w1").tolist() == [[4, 2, 0], [-2, 1, 0]]
    assert constant(result.model, "b1").tolist() == [8, 6, 1]
    assert constant(result.model, "w2").tolist() == [[4, -2], [2, 0.5], [2, 2]]
    # At full strength the scale is the whole magnitude of the activation.
    full = equalize(model, {"y": np.array([8.0, 2.0, 1.0])}, strength=1.0)
    assert full.scales["y"].tolist() == [8, 2, 1]


def test_chains_through_depthwise_convolutions(make_model: Make, run_model: Run) -> None:
    rng = np.random.default_rng(0)
    spread = 2.0 ** np.array([6, 0, -6, 3])
    constants = {
        "a": rng.standard_normal((4, 3, 1, 1)) * spread[:, None, None, None],
        "d": rng.standard_normal((4, 1, 3, 3)),
        "p": rng.standard_normal((5, 4, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["x"]),
        helper.make_node("Relu", ["x"], ["xr"]),
        helper.make_node("Conv", ["xr", "d"], ["y"], group=4),
        helper.make_node("MaxPool", ["y"], ["yp"], kernel_shape=[2, 2]),
        helper.make_node("Conv", ["yp", "p"], ["logits"]),
    ]
    plain = {name: value.astype(np.float32) for name, value in constants.items()}
    model = make_model(nodes, plain, ["b", 3, 8, 8], ["b", 5, 5, 5])
    result = equalize(model)
    assert [pair.tensor for pair in result.pairs] == ["xr", "yp"]
    assert result.pairs[0].spread_after < result.pairs[0].spread_before / 1.3
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(run_model(result.model, x), run_model(model, x))


def test_what_is_read_twice_or_leaves_the_graph_is_not_scaled(make_model: Make) -> None:
    eye = np.diag([100.0, 1.0]).astype(np.float32)
    twice = [
        helper.make_node("MatMul", ["image", "w1"], ["x"]),
        helper.make_node("MatMul", ["x", "w2"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["logits"]),
    ]
    constants = {"w1": eye, "w2": np.eye(2, dtype=np.float32)}
    assert tensors(make_model(twice, constants, ["b", 2], ["b", 2])) == {}
    gelu = [
        helper.make_node("MatMul", ["image", "w1"], ["x"]),
        helper.make_node("Gelu", ["x"], ["y"]),
        helper.make_node("MatMul", ["y", "w2"], ["logits"]),
    ]
    assert tensors(make_model(gelu, constants, ["b", 2], ["b", 2])) == {}


def test_a_shared_weight_is_split(make_model: Make, run_model: Run) -> None:
    weight = np.array([[64, 1], [32, 1]], dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
    ]
    model = make_model(nodes, {"w": weight}, ["b", 2], ["b", 2])
    result = equalize(model)
    x = np.array([[1, 2], [3, -4]], dtype=np.float32)
    np.testing.assert_array_equal(run_model(result.model, x), run_model(model, x))
    assert constant(model, "w").tolist() == weight.tolist()


def test_a_channel_that_would_underflow_stays(make_model: Make) -> None:
    tiny = float(np.finfo(np.float32).tiny)
    constants = {
        "w1": np.array([[1024.0, 1024.0], [tiny * 1.0000001, 1.0]], dtype=np.float32),
        "w2": np.array([[1.0], [1.0]], dtype=np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["image", "w1"], ["x"]),
        helper.make_node("MatMul", ["x", "w2"], ["logits"]),
    ]
    result = equalize(make_model(nodes, constants, ["b", 2], ["b", 1]))
    assert result.scales["x"].tolist() == [1, 32]


def test_the_given_graph_stays(small_model: ModelProto) -> None:
    before = small_model.SerializeToString(deterministic=True)
    equalize(small_model)
    assert small_model.SerializeToString(deterministic=True) == before


def test_bad_questions(small_model: ModelProto) -> None:
    with pytest.raises(ConfigError, match="strength"):
        equalize(small_model, strength=1.5)
    for bad in (np.ones(2), np.array([1, np.nan, 1]), np.array([1, -1, 1])):
        with pytest.raises(DataError, match="magnitudes of c1"):
            equalize(small_model, {"c1": bad})
