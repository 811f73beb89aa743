"""The graph with pairs learns: it computes what is built, and its gradients pass the rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from calibration.observe import open_session
from calibration.ranges import WEIGHTS_INT7, WEIGHTS_INT8, Range, Scheme
from pipeline.core.errors import ModelError
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.graphs.qdq_ort import (
    Candidate,
    Inserted,
    Kind,
    StoredWeights,
    activations,
    candidates_of,
    insert,
)
from pipeline.graphs.trainable import Codes, Copies, TrainableGraph

Weights = dict[str, np.ndarray]


def weights_of(model: onnx.ModelProto) -> Weights:
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n: v for n, v in found.items() if n.endswith(("weight", "bias"))}


def coded(model: onnx.ModelProto, codes: Codes, names: Weights) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(codes.of(tensor.name), tensor.name))
    return made


def inserted(model: onnx.ModelProto, scheme: Scheme, reach: float = 4.0) -> Inserted:
    ranges = dict.fromkeys(activations(model), Range(-reach, reach))
    outputs = [name for node in model.graph.node for name in node.output]
    return insert(model, ranges, candidates_of(model), outputs, StoredWeights(scheme))


def learning(weights: Weights) -> dict[str, Tensor]:
    return {n: torch.from_numpy(v.copy()).requires_grad_() for n, v in weights.items()}


@pytest.mark.parametrize("scheme", [WEIGHTS_INT8, WEIGHTS_INT7])
def test_it_computes_what_is_built(
    small_graph: Callable[..., onnx.ModelProto], pictures: np.ndarray, scheme: Scheme
) -> None:
    source = small_graph()
    weights = weights_of(source)
    codes = Codes(weights)
    copies = codes.copies(coded(source, codes, weights))
    graph = TrainableGraph(inserted(source, scheme), copies)
    # Other weights than those that it was made with: they are stored anew at each call.
    other = {name: values * np.float32(1.3) for name, values in weights.items()}
    built = onnx.ModelProto()
    built.CopyFrom(source)
    for tensor in built.graph.initializer:
        if tensor.name in other:
            tensor.CopyFrom(numpy_helper.from_array(other[tensor.name], tensor.name))
    model = inserted(built, scheme).model
    own = learning(other)
    logits = graph(own, torch.from_numpy(pictures))
    np.testing.assert_array_equal(logits.detach().numpy(), OnnxExecutor(model).run(pictures))
    by_runtime = open_session(model, ["logits"])(pictures)["logits"]
    assert abs(by_runtime - logits.detach().numpy()).max() < 0.02 * abs(by_runtime).max()
    assert not np.allclose(logits.detach().numpy(), OnnxExecutor(built).run(pictures), rtol=1e-4)
    logits.square().sum().backward()
    for name, weight in own.items():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0, name


def test_gradients_pass_what_rounds_but_not_what_clips() -> None:
    node = helper.make_node("Add", ["image", "image"], ["logits"])
    ports = [helper.make_tensor_value_info(n, 1, [None, 4]) for n in ("image", "logits")]
    graph = helper.make_graph([node], "sum", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    ranges = {"image": Range(-1.0, 1.0)}
    made = insert(model, ranges, [Candidate(0, Kind.ADDITION, "network")])
    images = torch.tensor([[0.1, -0.9, 1.5, -3.0]], requires_grad=True)
    TrainableGraph(made, Copies((), {}))({}, images).sum().backward()
    assert images.grad is not None
    assert images.grad.tolist() == [[2.0, 2.0, 0.0, 0.0]]


def constants(**values: np.ndarray) -> onnx.ModelProto:
    held = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    return helper.make_model(helper.make_graph([], "constants", [], [], held))


def test_copies_are_found_wherever_they_were_put() -> None:
    weights = {
        "a": np.array([1, 2, 3], np.float32),
        "b": np.array([1, 2, 3], np.float32),
    }  # equal, and yet two
    codes = Codes(weights)
    a, b = codes.of("a"), codes.of("b")
    model = constants(whole=b.reshape(3, 1), mixed=np.concatenate([a[::-1], [0, 7], b[1:]]))
    learned = {"a": torch.tensor([10.0, 20, 30]), "b": torch.tensor([40.0, 50, 60])}
    made = codes.copies(model)(learned)
    assert made["whole"].tolist() == [[40.0], [50.0], [60.0]]
    assert made["mixed"].tolist() == [30.0, 20.0, 10.0, 0.0, 7.0, 50.0, 60.0]
    decoded = {t.name: numpy_helper.to_array(t) for t in codes.decoded(model).graph.initializer}
    assert decoded["mixed"].tolist() == [3.0, 2.0, 1.0, 0.0, 7.0, 2.0, 3.0]


def test_weights_that_were_computed_with_are_refused() -> None:
    codes = Codes({"a": np.array([1, 2], np.float32), "norm.weight": np.array([3], np.float32)})
    with pytest.raises(ModelError, match=r"norm\.weight is not in the graph as it is trained"):
        codes.copies(constants(a=codes.of("a"), other=2 * codes.of("norm.weight")))
