from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from pipeline.graphs.products import count_products

Make = Callable[..., ModelProto]


def test_layers_with_weights_by_hand(small_model: ModelProto) -> None:
    assert count_products(small_model) == {
        "c1": 8 * 8 * 3 * 9,  # depthwise, 3 x 3
        "c2": 8 * 8 * 6 * 3,
        "mm": 6 * 5,
        "logits": 5 * 4,
    }


def test_a_dynamic_batch_counts_as_one_image_and_a_fixed_one_as_it_is(make_model: Make) -> None:
    weight = {"w": np.ones((5, 3, 1, 1), np.float32)}
    node = helper.make_node("Conv", ["image", "w"], ["logits"], "conv")
    for batch, factor in (("batch", 1), (4, 4)):
        model = make_model([node], weight, [batch, 3, 8, 8], [batch, 5, 8, 8])
        assert count_products(model) == {"logits": factor * 8 * 8 * 5 * 3}


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "expected"),
    [
        ("ConvTranspose", {"strides": [2, 2]}, {"w": (3, 5, 2, 2)}, 64 * 3 * 5 * 4),
        ("Conv", {"group": 3}, {"w": (6, 1, 1, 1)}, 64 * 6),
        ("MatMul", {}, {"w": (8, 7)}, 3 * 8 * 8 * 7),
        ("Einsum", {"equation": "bchw,wk->bchk"}, {"w": (8, 7)}, 3 * 8 * 8 * 7),
        ("Einsum", {"equation": "...w,wk->...k"}, {"w": (8, 7)}, None),
        ("Add", {}, {"w": (8, 8)}, None),
    ],
)
def test_each_operator(
    operator: str, attributes: dict[str, Any], inputs: dict[str, Any], expected: int | None
) -> None:
    constants = [
        onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in inputs.items()
    ]
    node = helper.make_node(operator, ["image", *inputs], ["logits"], "node", **attributes)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("image", float32, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", float32, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert count_products(model).get("logits") == expected


def test_products_of_two_activations_and_of_transposed_factors(make_model: Make) -> None:
    nodes = [
        helper.make_node("Transpose", ["image"], ["t"], "t", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["image", "t"], ["logits"], "product"),
    ]
    model = make_model(nodes, {}, ["batch", 3, 4, 8], ["batch", 3, 4, 4])
    assert count_products(model) == {"logits": 3 * 4 * 4 * 8}
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "w"], ["logits"], "linear", transB=1),
    ]
    weight = {"w": np.ones((5, 96), np.float32)}
    model = make_model(nodes, weight, ["batch", 3, 4, 8], ["batch", 5])
    assert count_products(model) == {"logits": 5 * 96}


def test_attention_multiplies_queries_by_keys_and_shares_by_values(make_model: Make) -> None:
    node = helper.make_node("Attention", ["image", "k", "v"], ["logits"], "attention")
    constants = {"k": np.ones((1, 3, 9, 8), np.float32), "v": np.ones((1, 3, 9, 6), np.float32)}
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("image", float32, [1, 3, 4, 8])],
        [helper.make_tensor_value_info("logits", float32, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    assert count_products(model) == {"logits": 3 * 4 * 9 * (8 + 6)}
