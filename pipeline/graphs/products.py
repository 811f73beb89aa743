"""How many products a graph multiplies and adds up for one image, node by node.

What a precision costs on a GPU is for the most part that of these: Conv, ConvTranspose, MatMul,
Gemm, Einsum and Attention. Sums, norms and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx
from onnx import NodeProto, shape_inference

from pipeline.graphs.links import attribute

Shapes = dict[str, tuple[int, ...]]


def count_products(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of one image by node, which its first output names.

    Args:
        model: A graph; a dynamic batch counts as one image.

    Returns:
        Nodes without products, and those whose shapes nobody can infer, have none.
    """
    shapes = _shapes(model)
    counted = {}
    for node in model.graph.node:
        if found := _products(node, shapes):
            counted[node.output[0]] = found
    return counted


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Shapes of all tensors with a single image, as far as they can be inferred."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in single.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    del single.graph.value_info[:]
    graph = shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sides = value.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides):
            shapes[value.name] = tuple(side.dim_value for side in sides)
    return shapes


def _products(node: NodeProto, shapes: Shapes) -> int:
    known = [shapes.get(name) for name in (*node.input[:3], node.output[0]) if name]
    if node.op_type not in _COUNTED or None in known:
        return 0
    inputs = [shapes[name] for name in node.input if name in shapes]
    result = shapes[node.output[0]]
    if node.op_type == "Conv":
        return prod(result) * prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":
        return prod(inputs[0]) * prod(inputs[1][1:])
    if node.op_type == "MatMul":
        return prod(result) * inputs[0][-1]
    if node.op_type == "Gemm":
        return prod(result) * inputs[0][0 if attribute(node, "transA", 0) else 1]
    if node.op_type == "Einsum":
        return _einsum(attribute(node, "equation", b"").decode(), inputs)
    # Attention: each query by each key, and each share by each value.
    return (prod(inputs[0]) + prod(result)) * inputs[1][-2]


_COUNTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention"})


def _einsum(equation: str, inputs: Sequence[tuple[int, ...]]) -> int:
    """Size of all its axes together; 0 where an ellipsis hides some."""
    if "." in equation:
        return 0
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return prod(sizes.values())
