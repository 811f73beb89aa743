"""Linear layers of sequences as Gemm, which has an 8-bit kernel with its bias.

Exporters write a linear layer of (batch, tokens, channels) as a MatMul and an Add. In 8 bits that
is a product that is stored, read back and added to in float; Gemm adds the bias to the 32-bit sums.
It takes matrices, so tokens of all images are its rows. What works on each element alone between
two linear layers works on the rows: no reshape stands between 8-bit tensors then.

    y = Add(MatMul(x, w), b)        rows = Reshape(x, [-1, channels])
                                    y = Reshape(Gemm(rows, w, b), shape)

In float32 it is the same kernel, and no faster.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graphs.edit import Editor, constant, only_use, replace, sides

_ELEMENTWISE = frozenset({"Gelu", "Relu", "Sigmoid", "Tanh", "HardSwish", "Elu", "LeakyRelu"})


class LinearAsGemm(ir.passes.InPlacePass):
    """MatMul with a constant, and Add of a constant -> Gemm between reshapes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        rows: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if node.op_identifier() == ("", "MatMul", ""):
                modified |= _rewrite(node, rows)
        return ir.passes.PassResult(model, modified)


def _rewrite(product: ir.Node, rows: dict[ir.Value, ir.Value]) -> bool:
    """Rewrite one layer; `rows` holds the rows of the tensors that were made of some."""
    weight, shape = constant(product.inputs[1]), sides(product.outputs[0])
    source = product.inputs[0]
    if weight is None or weight.ndim != 2 or constant(source) is not None or source is None:
        return False
    if shape is None or len(shape) < 2 or None in shape[1:]:
        return False
    last, bias = _with_bias(product, weight.shape[1])
    edit = Editor(last, "linear")
    _name(product, bias)
    inputs = [_rows(edit, source, weight.shape[0], rows), product.inputs[1]]
    made = edit.add("Gemm", inputs if bias is None else [*inputs, bias])
    made.type, made.shape = product.outputs[0].type, ir.Shape([None, weight.shape[1]])
    if len(shape) == 2:
        replace(last, made)
        return True
    sizes = [-1 if shape[0] is None else shape[0], *shape[1:]]
    whole = edit.add(
        "Reshape", [made, edit.constant(np.array(sizes, np.int64))], like=last.outputs[0]
    )
    replace(last, whole)
    rows[whole] = made
    return True


def _with_bias(product: ir.Node, channels: int) -> tuple[ir.Node, ir.Value | None]:
    """The last node of a layer, and its bias."""
    value = product.outputs[0]
    after = next(iter(value.consumers()), None) if only_use(value) else None
    if after is not None and after.op_identifier() == ("", "Add", ""):
        for other in after.inputs:
            found = constant(other)
            if found is not None and found.shape == (channels,):
                return after, other
    return product, None


def _name(product: ir.Node, bias: ir.Value | None) -> None:
    """Give a weight a name that says to which part of the network it belongs.

    Exporters turn it, and give what comes of that a number for a name; the bias has its own.
    """
    weight = product.inputs[1]
    assert weight is not None
    if bias is not None and "." in (bias.name or "") and "." not in (weight.name or ""):
        weight.name = f"{bias.name}/{product.outputs[0].name}/weight"


def _rows(edit: Editor, value: ir.Value, channels: int, rows: dict[ir.Value, ir.Value]) -> ir.Value:
    """The tensor as a matrix, (rows, channels)."""
    if len(sides(value) or ()) == 2:
        return value
    if value not in rows:
        rows[value] = _made_rows(edit, value, channels, rows)
    return rows[value]


def _made_rows(
    edit: Editor, value: ir.Value, channels: int, rows: dict[ir.Value, ir.Value]
) -> ir.Value:
    node = value.producer()
    if node is not None and node.op_type in _ELEMENTWISE and only_use(value):
        inner = node.inputs[0]
        if inner is not None and inner in rows and node.domain == "":
            found = edit.add(node.op_type, [rows[inner]], dict(node.attributes))
            found.type, found.shape = value.type, rows[inner].shape
            return found
    shape = edit.constant(np.array([-1, channels], np.int64))
    found = edit.add("Reshape", [value, shape])
    found.type, found.shape = value.type, ir.Shape([None, channels])
    return found
