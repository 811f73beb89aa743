"""Equalization: the same bits out, and channels that are alike inside."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from calibration import observe
from calibration.histogram import Doubles
from pipeline.core.errors import ConfigError, DataError
from pipeline.graphs.equalize import equalize, tensors

Batch = npt.NDArray[np.float32]
Run = Callable[[ModelProto, Batch], Batch]
Make = Callable[..., ModelProto]


def constant(model: ModelProto, name: str) -> Batch:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value: Batch = numpy_helper.to_array(tensor)
    return value


def magnitudes(model: ModelProto, pixels: Batch) -> dict[str, Doubles]:
    """Of all channels that can be scaled."""
    return observe.magnitudes(model, pixels, tensors(model))


def conv(source: str, weight: str, to: str, **attributes: Any) -> NodeProto:
    return helper.make_node("Conv", [source, weight], [to], **attributes)


def filters(rng: np.random.Generator, *shape: int) -> Batch:
    """Weights of 1x1 convolutions whose output channels differ a lot."""
    spread = 2.0 ** rng.integers(-4, 5, shape[0])
    made = rng.standard_normal((*shape, 1, 1)) * spread[:, None, None, None]
    return made.astype(np.float32)


def spread(ranges: Doubles) -> float:
    return float(ranges.max() / ranges.mean())


def test_tensors_of_a_network(small_model: ModelProto) -> None:
    # The Gelu and the LayerNormalization are not homogeneous, so nothing crosses them.
    assert tensors(small_model) == {"c1": 1, "norm": -1, "mm": -1, "hidden": -1, "relu": -1}


def test_outputs_are_the_same_bits(small_model: ModelProto, pixels: Batch, run_model: Run) -> None:
    result = equalize(small_model, magnitudes(small_model, pixels))
    assert set(result.scales) == set(tensors(small_model))
    np.testing.assert_array_equal(run_model(result.model, pixels), run_model(small_model, pixels))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_activations_divide_as_the_scales_say(
    small_model: ModelProto, pixels: Batch, strength: float
) -> None:
    before = magnitudes(small_model, pixels)
    result = equalize(small_model, before, strength=strength)
    after = magnitudes(result.model, pixels)
    for name, scale in result.scales.items():
        np.testing.assert_array_equal(after[name] * scale, before[name])
        assert spread(after[name]) <= spread(before[name])


def test_scales_by_hand(make_model: Make) -> None:
    nodes = [
        helper.make_node("Gemm", ["image", "w1", "b1"], ["x"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Gemm", ["y", "w2"], ["logits"]),
    ]
    constants = {
        "w1": np.array([[16, 1, 0], [-8, 0.5, 0]], dtype=np.float32),
        "b1": np.array([32, 3, 1], dtype=np.float32),
        # Rows read the channels, with 1/2, 1 and 1/8 of the largest.
        "w2": np.array([[2, -0.5], [4, 1], [0.5, 0.5]], dtype=np.float32),
    }
    model = make_model(nodes, constants, ["b", 2], ["b", 2])
    seen = {"y": np.array([64.0, 16.0, 0.0])}
    # All of 1 and 1/4 moves; a channel that is always zero stays.
    full = equalize(model, seen, strength=1.0)
    assert full.scales["x"].tolist() == full.scales["y"].tolist() == [1, 0.25, 1]
    assert constant(full.model, "w1").tolist() == [[16, 4, 0], [-8, 2, 0]]
    assert constant(full.model, "b1").tolist() == [32, 12, 1]
    assert constant(full.model, "w2").tolist() == [[2, -0.5], [1, 0.25], [0.5, 0.5]]
    # Half: sqrt(1 / (1/2)) rounds to 1, sqrt(1/4 / 1) = 1/2; then both read 2, of 64 and 32.
    half = equalize(model, seen, strength=0.5)
    assert half.scales["y"].tolist() == [1, 0.5, 1]
    # Nothing of it: what reads the channels becomes alike.
    none = equalize(model, {"y": np.array([64.0, 16.0, 8.0])}, strength=0.0)
    assert none.scales["y"].tolist() == [2, 1, 8]


@pytest.mark.parametrize("keepdims", [1, 0])
def test_through_depthwise_convolutions_and_pooling(
    make_model: Make, run_model: Run, keepdims: int
) -> None:
    rng = np.random.default_rng(0)
    last = filters(rng, 5, 4)
    constants = {
        "a": filters(rng, 4, 3),
        "d": rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "p": last if keepdims else last[:, :, 0, 0].T,
        "axes": np.array([2, -1], np.int64),
    }
    nodes = [
        conv("image", "a", "x"),
        helper.make_node("Relu", ["x"], ["xr"]),
        conv("xr", "d", "y", group=4),
        helper.make_node("MaxPool", ["y"], ["yp"], kernel_shape=[2, 2]),
        helper.make_node("ReduceMean", ["yp", "axes"], ["mean"], keepdims=keepdims),
        helper.make_node("Conv" if keepdims else "MatMul", ["mean", "p"], ["logits"]),
    ]
    shape = ["b", 5, 1, 1] if keepdims else ["b", 5]
    model = make_model(nodes, constants, ["b", 3, 8, 8], shape)
    assert tensors(model) == {"x": 1, "xr": 1, "y": 1, "yp": 1, "mean": 1 if keepdims else -1}
    pixels = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    seen = magnitudes(model, pixels)
    result = equalize(model, seen, strength=0.5)
    assert (result.scales["yp"] != 1).any()
    np.testing.assert_array_equal(run_model(result.model, pixels), run_model(model, pixels))
    # Weights of depthwise convolutions take in the whole difference: each channel has its scale.
    assert spread(seen["xr"]) > 1.9
    assert magnitudes(result.model, pixels)["xr"].min() > seen["xr"].max() / 2.01


def residual(rng: np.random.Generator) -> tuple[list[NodeProto], dict[str, npt.NDArray[Any]]]:
    """Channels that are split, added, joined and read at three places."""
    nodes = [
        conv("image", "a", "x"),
        helper.make_node("Split", ["x", "sizes"], ["left", "right"], axis=1),
        conv("left", "b", "made"),
        helper.make_node("Add", ["made", "right"], ["sum"]),
        helper.make_node("Concat", ["left", "sum"], ["all"], axis=1),
        conv("all", "c", "logits"),
    ]
    constants: dict[str, npt.NDArray[Any]] = {
        "a": filters(rng, 6, 3),
        "b": filters(rng, 4, 2),
        "c": filters(rng, 5, 6),
        "sizes": np.array([2, 4], np.int64),
    }
    return nodes, constants


def test_channels_that_are_added_joined_and_split_are_scaled_alike(
    make_model: Make, run_model: Run
) -> None:
    rng = np.random.default_rng(1)
    model = make_model(*residual(rng), ["b", 3, 4, 4], ["b", 5, 4, 4])
    pixels = rng.standard_normal((4, 3, 4, 4)).astype(np.float32)
    seen = magnitudes(model, pixels)
    assert list(seen) == ["x", "left", "right", "made", "sum", "all"]
    result = equalize(model, seen, strength=1.0)
    np.testing.assert_array_equal(run_model(result.model, pixels), run_model(model, pixels))
    found = result.scales
    assert len(set(found["x"])) > 2
    np.testing.assert_array_equal(found["x"], [*found["left"], *found["right"]])
    np.testing.assert_array_equal(found["all"], found["x"])
    np.testing.assert_array_equal(found["made"], found["right"])
    after = magnitudes(result.model, pixels)
    # But for the rounding of scales, no tensor's range grows, and every class fills one of them.
    assert all(after[name].max() <= 2**0.5 * seen[name].max() for name in seen)
    shares = {name: after[name] / after[name].max() for name in seen}
    right = np.max([shares[n] for n in ("right", "made", "sum")] + [shares["x"][2:]], axis=0)
    assert right.min() > 0.49


@pytest.mark.parametrize(
    ("change", "left"),
    [
        pytest.param(("Gelu", "sum"), ["x", "left", "all"], id="read by what is not homogeneous"),
        pytest.param(
            ("Gelu", "left"), ["x", "right", "made", "sum", "all"], id="a part of a split"
        ),
        pytest.param(("", "made"), ["x", "left", "all"], id="leaves the graph"),
    ],
)
def test_channels_that_meet_another_operator_stay(
    make_model: Make, run_model: Run, change: tuple[str, str], left: list[str]
) -> None:
    rng = np.random.default_rng(2)
    nodes, constants = residual(rng)
    operator, name = change
    if operator:
        nodes.insert(-2, helper.make_node(operator, [name], ["seen"]))
        nodes[-1].input[0] = "all"
        nodes[-2].input.append("seen")
        constants["c"] = filters(rng, 5, 10 if name == "sum" else 8)
    model = make_model(nodes, constants, ["b", 3, 4, 4], ["b", 5, 4, 4])
    if not operator:
        model.graph.output.append(helper.make_tensor_value_info(name, 1, ["b", 4, 4, 4]))
    else:
        shape = ["b", 4 if name == "sum" else 2, 4, 4]
        model.graph.value_info.append(helper.make_tensor_value_info("seen", 1, shape))
    assert list(tensors(model)) == left
    pixels = rng.standard_normal((4, 3, 4, 4)).astype(np.float32)
    result = equalize(model, magnitudes(model, pixels))
    assert result.scales
    np.testing.assert_array_equal(run_model(result.model, pixels), run_model(model, pixels))


def test_what_is_joined_with_channels_of_unknown_number_stays(make_model: Make) -> None:
    rng = np.random.default_rng(3)
    nodes = [
        conv("image", "a", "x"),
        helper.make_node("Gelu", ["image"], ["y"]),
        helper.make_node("Concat", ["x", "y"], ["all"], axis=1),
        conv("all", "c", "logits"),
    ]
    constants = {"a": filters(rng, 6, 3), "c": filters(rng, 5, 9)}
    model = make_model(nodes, constants, ["b", 3, 4, 4], ["b", 5, 4, 4])
    assert tensors(model) == {}
    unknowns: list[list[str | int | None]] = [["b", "c", 4, 4], ["b", 3]]
    for unknown in unknowns:
        model.graph.value_info.append(helper.make_tensor_value_info("y", 1, unknown))
        assert tensors(model) == {}
        del model.graph.value_info[:]
    model.graph.value_info.append(helper.make_tensor_value_info("y", 1, ["b", 3, 4, 4]))
    assert tensors(model) == {"x": 1, "all": 1}
    seen = {"all": np.array([1.0] * 6 + [4.0] * 3)}
    scales = equalize(model, seen, strength=1.0).scales["all"]
    assert scales.tolist() == [0.25] * 6 + [1.0] * 3


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(
            [
                ("Transpose", ["x"], ["y"], {"perm": [0, 1, 2, 3]}),
                ("Conv", ["y", "c"], ["logits"], {}),
            ],
            id="an operator that is not known",
        ),
        pytest.param([("Conv", ["x", "g"], ["logits"], {"group": 2})], id="groups of channels"),
        pytest.param(
            [("Add", ["x", "bias"], ["y"], {}), ("Conv", ["y", "c"], ["logits"], {})],
            id="a constant",
        ),
        pytest.param(
            [
                ("Split", ["x", "odd"], ["y", "z"], {"axis": 2}),
                ("Conv", ["y", "c"], ["logits"], {}),
            ],
            id="rows are split",
        ),
        pytest.param(
            [("ReduceMean", ["x", "rows"], ["y"], {}), ("Conv", ["y", "c"], ["logits"], {})],
            id="a mean of channels",
        ),
        pytest.param([("Conv", ["x", "x"], ["logits"], {})], id="its own weight"),
        pytest.param(
            [
                ("Reshape", ["x", "halves"], ["h"], {}),
                ("Conv", ["h", "c"], ["y"], {}),
                ("Reshape", ["y", "square"], ["logits"], {}),
            ],
            id="other channels of halves of images",
        ),
    ],
)
def test_what_is_read_otherwise_stays(
    make_model: Make, nodes: list[tuple[str, list[str], list[str], dict[str, Any]]]
) -> None:
    rng = np.random.default_rng(4)
    constants = {
        "a": filters(rng, 4, 3),
        "c": filters(rng, 4, 4),
        "g": filters(rng, 4, 2),
        "bias": np.ones((1, 4, 1, 1), np.float32),
        "odd": np.array([2, 2], np.int64),
        "rows": np.array([1], np.int64),
        "halves": np.array([-1, 4, 2, 4], np.int64),
        "square": np.array([-1, 4, 4, 4], np.int64),
    }
    made = [conv("image", "a", "x")]
    made += [helper.make_node(kind, ins, outs, **given) for kind, ins, outs, given in nodes]
    used = {name for node in made for name in node.input}
    constants = {name: value for name, value in constants.items() if name in used}
    model = make_model(made, constants, ["b", 3, 4, 4], ["b", 4, 4, 4])
    assert "x" not in tensors(model)


@pytest.mark.parametrize(
    ("shape", "scaled"),
    [([-1, 8], True), ([2, -1, 8], True), ([-1, 4], False), ([0, 0, -1], False)],
    ids=["rows", "pairs of rows", "halves", "of unknown width"],
)
def test_channels_of_tokens_stay_channels_of_rows(
    make_model: Make, run_model: Run, shape: list[int], scaled: bool
) -> None:
    rng = np.random.default_rng(9)
    width = abs(shape[-1]) if shape[-1] > 0 else 8
    nodes = [
        helper.make_node("LayerNormalization", ["image", "g", "h"], ["x"]),
        helper.make_node("Reshape", ["x", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
        helper.make_node("Reshape", ["y", "back"], ["logits"]),
    ]
    constants = {
        "g": np.linspace(0.1, 9, 8).astype(np.float32),
        "h": np.zeros(8, np.float32),
        "shape": np.array(shape, np.int64),
        "w": rng.standard_normal((width, 4)).astype(np.float32),
        "back": np.array([4, 3, -1], np.int64),
    }
    model = make_model(nodes, constants, [4, 3, 8], [4, 3, 4 * 8 // width])
    tokens = rng.standard_normal((4, 3, 8)).astype(np.float32)
    result = equalize(model, {"x": np.linspace(0.1, 9, 8)}) if scaled else None
    assert ("x" in tensors(model)) is scaled
    if result:
        assert (result.scales["x"] != 1).any()
        np.testing.assert_array_equal(result.scales["rows"], result.scales["x"])
        np.testing.assert_array_equal(run_model(result.model, tokens), run_model(model, tokens))


def test_nothing_is_scaled_beside_a_subgraph(make_model: Make) -> None:
    rng = np.random.default_rng(5)
    nodes, constants = residual(rng)
    inner = helper.make_graph(
        [helper.make_node("Gelu", ["made"], ["out"])],
        "inner",
        [],
        [helper.make_tensor_value_info("out", 1, None)],
    )
    nodes.insert(3, helper.make_node("If", ["yes"], ["odd"], then_branch=inner, else_branch=inner))
    model = make_model(nodes, {**constants, "yes": np.array(True)}, ["b", 3, 4, 4], ["b", 5, 4, 4])
    assert "made" not in tensors(model)
    assert "left" not in tensors(model)


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
    result = equalize(model, {"x": np.array([96.0, 2.0])})
    assert result.scales
    x = np.array([[1, 2], [3, -4]], dtype=np.float32)
    np.testing.assert_array_equal(run_model(result.model, x), run_model(model, x))
    assert constant(model, "w").tolist() == weight.tolist()


def test_a_channel_that_would_underflow_stays(make_model: Make) -> None:
    tiny = float(np.finfo(np.float32).tiny)
    constants = {
        "w1": np.ones((2, 2), np.float32),
        "w2": np.array([[tiny * 1.0000001, 1.0], [1.0, 1.0]], dtype=np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["image", "w1"], ["x"]),
        helper.make_node("MatMul", ["x", "w2"], ["logits"]),
    ]
    model = make_model(nodes, constants, ["b", 2], ["b", 2])
    assert equalize(model, {"x": np.array([32.0, 1024.0])}, strength=1.0).scales == {}
    result = equalize(model, {"x": np.array([1024.0, 32.0])}, strength=1.0)
    assert result.scales["x"].tolist() == [1, 1 / 32]


def test_the_given_graph_stays(small_model: ModelProto) -> None:
    before = small_model.SerializeToString(deterministic=True)
    equalize(small_model, {"c1": np.array([1.0, 4.0, 8.0])})
    assert small_model.SerializeToString(deterministic=True) == before


def test_bad_questions(small_model: ModelProto) -> None:
    with pytest.raises(ConfigError, match="strength"):
        equalize(small_model, {}, strength=1.5)
    with pytest.raises(DataError, match="gelu has no channels"):
        equalize(small_model, {"gelu": np.ones(3)})
    for bad in (np.ones(2), np.array([1, np.nan, 1]), np.array([1, -1, 1])):
        with pytest.raises(DataError, match="magnitudes of c1"):
            equalize(small_model, {"c1": bad})
