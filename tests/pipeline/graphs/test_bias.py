"""Bias correction on graphs whose errors are known."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from onnx import GraphProto, ModelProto, helper, numpy_helper

from calibration.ranges import Scheme, weight_quantization
from pipeline.core.errors import BuildError, DataError
from pipeline.graphs import bias
from pipeline.graphs.bias import (
    Layer,
    correct_biases,
    float_means,
    fold,
    layers,
    mean_errors,
)
from pipeline.graphs.links import Links

Batch = npt.NDArray[np.float32]


def coarse(model: ModelProto) -> ModelProto:
    """Round the weights of all layers to a whole-tensor 8-bit grid that is 8 times too coarse."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim > 1:
            parameters = weight_quantization(value, None, Scheme())
            rounded = parameters.round_trip(value / 8) * 8
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), tensor.name))
    return copy


def test_layers_and_their_outputs(small_model: ModelProto) -> None:
    assert layers(small_model) == [
        Layer("conv1", "c1", 3, 2),
        Layer("conv2", "c2", 6, 2),
        Layer("matmul", "hidden", 5, 0),
        Layer("gemm", "logits", 4, 0),
    ]


def test_mean_errors_by_hand(small_model: ModelProto, pixels: Batch) -> None:
    shifted = fold(small_model, {"c1": np.array([1.0, -2.0, 0.5])})
    first = layers(small_model)[:1]
    errors = mean_errors(shifted, small_model, pixels, first, batch=3)
    np.testing.assert_allclose(errors["c1"], [-1, 2, -0.5], atol=1e-5)


def test_fold_leaves_its_argument_alone(small_model: ModelProto) -> None:
    before = small_model.SerializeToString(deterministic=True)
    fold(small_model, {"c2": np.ones(6), "hidden": np.ones(5), "logits": np.ones(4)})
    assert small_model.SerializeToString(deterministic=True) == before


def test_folding_all_at_once_gives_the_graph_of_one_after_the_other(
    small_model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = ModelProto()
    bare.CopyFrom(small_model)
    kept = [node for node in bare.graph.node if node.output[0] != "hidden"]
    for node in kept:  # a MatMul without a bias, which gets a node of its own
        for names in (node.input, node.output):
            names[:] = ["hidden" if name == first_of(small_model) else name for name in names]
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    errors = {layer.output: np.arange(1.0, layer.channels + 1) for layer in layers(bare)}
    assert list(errors) == ["c1", "c2", "hidden", "logits"]
    each = bare
    for output, error in errors.items():
        each = fold(each, {output: error})
    looks: list[GraphProto] = []

    class Counted(Links):
        def __init__(self, graph: GraphProto) -> None:
            looks.append(graph)
            super().__init__(graph)

    monkeypatch.setattr(bias, "Links", Counted)
    whole = fold(bare, errors)
    assert whole.SerializeToString(deterministic=True) == each.SerializeToString(deterministic=True)
    assert len(looks) == 3, "for the layers, for the errors, and after the node that is new"


def first_of(model: ModelProto) -> str:
    """What the product gives to which `hidden` adds a bias."""
    add = next(node for node in model.graph.node if node.output[0] == "hidden")
    made = {name for node in model.graph.node for name in node.output}
    return next(name for name in add.input if name in made)


def test_fold_works_for_every_kind_of_layer(
    small_model: ModelProto, pixels: Batch, run_model: Callable[[ModelProto, Batch], Batch]
) -> None:
    shift = np.arange(4.0)
    folded = fold(small_model, {"logits": shift})
    difference = run_model(small_model, pixels) - run_model(folded, pixels)
    np.testing.assert_allclose(difference, np.tile(shift, (10, 1)), atol=1e-5)
    # conv2 has no bias, the bias of the MatMul is in the Add after it.
    for output, size in (("c2", 6), ("hidden", 5)):
        error = np.linspace(-1, 1, size)
        chosen = [layer for layer in layers(small_model) if layer.output == output]
        errors = mean_errors(fold(small_model, {output: error}), small_model, pixels, chosen)
        np.testing.assert_allclose(errors[output], -error, atol=1e-5)


def test_a_matmul_without_bias_gets_one(
    make_model: Callable[..., ModelProto],
    run_model: Callable[[ModelProto, Batch], Batch],
) -> None:
    nodes = [helper.make_node("MatMul", ["image", "w"], ["logits"], "matmul")]
    model = make_model(nodes, {"w": np.eye(2, dtype=np.float32)}, ["b", 2], ["b", 2])
    folded = fold(model, {"logits": np.array([1.0, 2.0])})
    x = np.zeros((3, 2), dtype=np.float32)
    assert run_model(folded, x).tolist() == [[-1, -2]] * 3
    assert layers(folded)[0].output == "logits"


def test_a_shared_bias_is_split(
    make_model: Callable[..., ModelProto],
    run_model: Callable[[ModelProto, Batch], Batch],
) -> None:
    weight = np.eye(2, dtype=np.float32)
    nodes = [
        helper.make_node("Gemm", ["image", "w", "b"], ["first"], "g1"),
        helper.make_node("Gemm", ["first", "w", "b"], ["logits"], "g2", beta=2.0),
    ]
    constants = {"w": weight, "b": np.ones(2, dtype=np.float32)}
    model = make_model(nodes, constants, ["batch", 2], ["batch", 2])
    folded = fold(model, {"logits": np.array([0.5, 1.0])})
    x = np.zeros((1, 2), dtype=np.float32)
    assert run_model(model, x).tolist() == [[3, 3]]
    assert run_model(folded, x).tolist() == [[2.5, 2]]


def test_correction_removes_the_mean_error(
    small_model: ModelProto, pixels: Batch, run_model: Callable[[ModelProto, Batch], Batch]
) -> None:
    quantized = coarse(small_model)
    correction = correct_biases(small_model, quantized, pixels)
    reference = run_model(small_model, pixels)
    before = np.abs((run_model(quantized, pixels) - reference).mean(0))
    after = np.abs((run_model(coarse(correction.model), pixels) - reference).mean(0))
    assert (after < 1e-4).all()
    assert before.max() > 1e-2
    # Nothing is mended twice: the means of all layers are right, not only the last one's.
    order = layers(small_model)
    left = mean_errors(coarse(correction.model), small_model, pixels, order)
    assert max(np.abs(error).max() for error in left.values()) < 1e-4


def test_a_graph_with_a_fixed_batch_gets_its_own(make_model: Callable[..., ModelProto]) -> None:
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Gemm", ["image", "w"], ["logits"], "gemm")]
    constants = {"w": rng.standard_normal((6, 6)).astype(np.float32)}
    fixed = make_model(nodes, constants, [3, 6], [3, 6])
    dynamic = make_model(nodes, constants, ["b", 6], ["b", 6])
    x = rng.standard_normal((8, 6)).astype(np.float32)
    whole = np.concatenate([x, x[:1]])
    expected = mean_errors(coarse(dynamic), dynamic, whole, layers(dynamic))["logits"]
    assert np.abs(expected).max() > 1e-3
    measured = mean_errors(coarse(fixed), fixed, x, layers(fixed))["logits"]
    np.testing.assert_allclose(measured, expected, atol=1e-6)
    corrected = correct_biases(fixed, coarse(fixed), x)
    np.testing.assert_allclose(corrected.errors["logits"], expected, atol=1e-6)


def test_deep_networks_do_not_diverge(make_model: Callable[..., ModelProto]) -> None:
    rng = np.random.default_rng(0)
    nodes, constants, name = [], {}, "image"
    for i in range(24):
        last = "logits" if i == 23 else f"r{i}"
        constants[f"w{i}"] = rng.standard_normal((6, 6)).astype(np.float32)
        nodes += [
            helper.make_node("Gemm", [name, f"w{i}"], [f"x{i}"], f"gemm{i}"),
            helper.make_node("Tanh", [f"x{i}"], [f"t{i}"]),
            helper.make_node("Add", [f"t{i}", name], [last]),
        ]
        name = last
    model = make_model(nodes, constants, ["b", 6], ["b", 6])
    x = rng.standard_normal((20, 6)).astype(np.float32)
    corrected = correct_biases(model, coarse(model), x).model
    order = layers(model)
    before = mean_errors(coarse(model), model, x, order)
    after = mean_errors(coarse(corrected), model, x, order)
    assert max(np.abs(error).max() for error in before.values()) > 0.1
    assert max(np.abs(error).max() for error in after.values()) < 1e-3


def test_batches_are_averaged(small_model: ModelProto, pixels: Batch) -> None:
    quantized = coarse(small_model)
    whole = correct_biases(small_model, quantized, pixels).errors
    parts = correct_biases(small_model, quantized, pixels, batch=4).errors
    # The first layer's errors do not depend on any other's, the last one's nearly so.
    np.testing.assert_allclose(parts["c1"], whole["c1"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts["logits"], whole["logits"], atol=0.3)


def test_old_operator_sets(make_model: Callable[..., ModelProto]) -> None:
    nodes = [helper.make_node("Gemm", ["image", "w"], ["logits"], "gemm")]
    model = make_model(nodes, {"w": np.eye(2, dtype=np.float32)}, ["b", 2], ["b", 2])
    model.opset_import[0].version = 13
    shifted = fold(model, {"logits": np.array([1.0, -1.0])})
    x = np.ones((3, 2), dtype=np.float32)
    errors = correct_biases(model, shifted, x).errors
    np.testing.assert_allclose(errors["logits"], [-1, 1])


def test_quantizers_must_keep_names(small_model: ModelProto, pixels: Batch) -> None:
    renamed = coarse(small_model)
    renamed.graph.node[0].output[0] = "other"
    renamed.graph.node[1].input[0] = "other"
    with pytest.raises(BuildError, match="no tensor c1"):
        correct_biases(small_model, renamed, pixels)


def test_errors_that_cannot_be_folded(
    small_model: ModelProto, make_model: Callable[..., ModelProto], pixels: Batch
) -> None:
    with pytest.raises(DataError, match="gives the tensor act"):
        fold(small_model, {"act": np.ones(6)})
    with pytest.raises(DataError, match="bias of"):
        fold(small_model, {"c1": np.ones((2, 3))})
    with pytest.raises(DataError, match="no calibration images"):
        mean_errors(small_model, small_model, pixels[:0], layers(small_model))
    nothing = make_model([helper.make_node("Relu", ["image"], ["logits"])], {}, ["batch", 3, 8, 8])
    with pytest.raises(DataError, match="no Conv, Gemm or MatMul"):
        correct_biases(nothing, nothing, pixels)


def test_means_that_are_not_finite_are_refused(small_model: ModelProto, pixels: Batch) -> None:
    with pytest.raises(DataError, match="c1 is not finite"):
        mean_errors(small_model, small_model, pixels * np.float32(np.nan), layers(small_model))


def test_means_of_the_float_graph_serve_several_corrections(
    small_model: ModelProto, pixels: Batch
) -> None:
    wanted = float_means(small_model, pixels, batch=4)
    assert [set(means) for means in wanted] == [{"c1", "c2", "hidden", "logits"}] * 3
    quantized = coarse(small_model)
    alone = correct_biases(small_model, quantized, pixels, batch=4).errors
    shared = correct_biases(small_model, quantized, pixels, wanted=wanted, batch=4).errors
    assert {name: error.tobytes() for name, error in shared.items()} == {
        name: error.tobytes() for name, error in alone.items()
    }
    # They are what is aimed at: the same lower means ask for larger corrections.
    lower = [{name: mean - 1 for name, mean in means.items()} for means in wanted]
    aimed = correct_biases(small_model, quantized, pixels, wanted=lower, batch=4).errors
    np.testing.assert_allclose(aimed["c1"], alone["c1"] + 1, atol=1e-5)


def test_means_of_a_fixed_batch_are_of_that_batch(small_model: ModelProto, pixels: Batch) -> None:
    fixed = ModelProto()
    fixed.CopyFrom(small_model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert len(float_means(fixed, pixels)) == 3
    assert len(float_means(small_model, pixels)) == 1
