"""Linear layers of sequences as Gemm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.graphs.passes import optimize
from pipeline.graphs.passes.linear import LinearAsGemm

Count = Callable[[ir.Model], Counter[str]]
TYPES = "float[N, 3, 4] x"


def text(body: str, given: str = TYPES, result: str = "float[N, 3, 6] y") -> str:
    return f"g ({given}) => ({result}) {{ {body} }}"


LAYER = "p = MatMul (x, w)\n y = Add (p, b)"
WEIGHTS = {"w": [4, 6], "b": [6]}


def sequences(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def inferred(graph: Callable[..., ir.Model], body: str, weights: dict[str, Any], *more: str) -> Any:
    from onnx_ir.passes.common import ShapeInferencePass

    model = graph(text(body, *more), weights)
    ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize("add", ["Add (p, b)", "Add (b, p)"])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_layer_of_tokens_is_one_gemm(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None], add: str, batch: int
) -> None:
    model = inferred(graph, f"p = MatMul (x, w)\n y = {add}", WEIGHTS)
    same(model, [LinearAsGemm()], sequences(batch, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 1}


def test_a_layer_without_a_bias_stays_without(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    model = inferred(graph, "y = MatMul (x, w)", {"w": [4, 6]})
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 1}


def test_matrices_need_no_reshape(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    model = inferred(graph, LAYER, WEIGHTS, "float[N, 4] x", "float[N, 6] y")
    same(model, [LinearAsGemm()], sequences(7, 4), 1e-6)
    assert count(model) == {"Gemm": 1}


def test_shapes_of_a_fixed_batch_stay_fixed(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    given, result = "float[2, 3, 5, 4] x", "float[2, 3, 5, 6] y"
    model = inferred(graph, LAYER, WEIGHTS, given, result)
    same(model, [LinearAsGemm()], sequences(2, 3, 5, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 1}


def test_what_works_on_each_element_stands_between_rows(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    body = 'p = MatMul (x, w)\n h = Add (p, b)\n a = Gelu <approximate = "tanh"> (h)\n'
    body += "q = MatMul (a, w2)\n y = Add (q, b2)"
    model = inferred(graph, body, {**WEIGHTS, "w2": [6, 6], "b2": [6]})
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 2, "Gelu": 1}


def test_what_others_read_too_keeps_its_shape(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    body = "p = MatMul (x, w)\n h = Add (p, b)\n a = Gelu (h)\n q = MatMul (a, w2)\n y = Add (q, a)"
    model = inferred(graph, body, {**WEIGHTS, "w2": [6, 6]})
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 4, "Gemm": 2, "Gelu": 1, "Add": 1}


def test_layers_that_read_one_tensor_share_its_rows(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    body = "q = MatMul (x, w)\n k = MatMul (x, w2)\n y = Mul (q, k)"
    model = inferred(graph, body, {"w": [4, 6], "w2": [4, 6]})
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 3, "Gemm": 2, "Mul": 1}


@pytest.mark.parametrize(
    ("body", "weights", "given", "result"),
    [
        (
            "t = Transpose <perm = [0, 2, 1]> (x)\n y = MatMul (x, t)",
            {},
            TYPES,
            "float[N, 3, 3] y",
        ),
        ("y = MatMul (x, w)", {"w": [1, 4, 6]}, TYPES, "float[N, 3, 6] y"),
        ("y = MatMul (w, x)", {"w": [2, 3]}, TYPES, "float[N, 2, 4] y"),
        ("y = MatMul (x, w)", {"w": [4, 6]}, "float[N, M, 4] x", "float[N, M, 6] y"),
    ],
    ids=["of two tensors", "of a stack", "from the left", "of any number of tokens"],
)
def test_other_products_stay(
    graph: Callable[..., ir.Model],
    count: Count,
    body: str,
    weights: dict[str, Any],
    given: str,
    result: str,
) -> None:
    model = inferred(graph, body, weights, given, result)
    before = count(model)
    optimize(model, [LinearAsGemm()])
    assert count(model) == before


@pytest.mark.parametrize(
    ("other", "shape"),
    [("b", [3, 1]), ("b", [1]), ("p", None)],
    ids=["of a token", "a number", "itself"],
)
def test_a_sum_that_is_no_bias_stays(
    graph: Callable[..., ir.Model],
    count: Count,
    same: Callable[..., None],
    other: str,
    shape: list[int] | None,
) -> None:
    weights = {"w": [4, 6], **({"b": shape} if shape else {})}
    model = inferred(graph, f"p = MatMul (x, w)\n y = Add (p, {other})", weights)
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 1, "Add": 1}


def test_a_bias_that_is_added_elsewhere_too_stays(
    graph: Callable[..., ir.Model], count: Count, same: Callable[..., None]
) -> None:
    model = inferred(graph, "p = MatMul (x, w)\n s = Add (p, b)\n y = Mul (s, p)", WEIGHTS)
    same(model, [LinearAsGemm()], sequences(2, 3, 4), 1e-6)
    assert count(model) == {"Reshape": 2, "Gemm": 1, "Add": 1, "Mul": 1}


@pytest.mark.parametrize(
    ("weight", "bias", "told"),
    [
        ("val_7", "blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc1.bias/"),
        ("blocks.0.fc1.weight", "blocks.1.mlp.fc1.bias", "blocks.0.fc1.weight"),
        ("val_7", "val_8", "val_7"),
    ],
)
def test_the_bias_names_the_part_of_the_network(
    graph: Callable[..., ir.Model], weight: str, bias: str, told: str
) -> None:
    model = inferred(graph, LAYER, WEIGHTS)
    names = {"w": weight, "b": bias}
    for value in list(model.graph.initializers.values()):
        value.name = names[str(value.name)]
    optimize(model, [LinearAsGemm()])
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    found = gemm.inputs[1]
    assert found is not None
    assert str(found.name).startswith(told)
