"""Linear attention with as few operations as float32 needs.

`care.fuse` exports the scale-free form, which divides queries and keys by their size so that
nothing overflows in half precision. In float32 nothing does, and these sizes cancel in the
quotient: three divisions, a mean, two sums and three clips become one division and one sum. What
keeps the divisor from zero is again the published 1e-6, so that the result is that of the published
form up to rounding; the scale-free form bounds its divisors by 2**-14 instead. They differ only for
a token whose queries vanish.

The pass first finds the whole attention and puts one operator in its place (`RecognizeAttention`);
`LowerAttention` then writes it out: channel by channel in the plain layout, token by token in the
blocked one (`nchwc`), where a block of channels is a matrix of tokens already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from pipeline.graphs.edit import INTERNAL, Editor, constant, integer, is_scalar, producer, replace

OPERATOR = "LinearAttention"
"""(queries and keys (batch, 2 C, h, w), values (batch, C, h, w)) -> (batch, C, h, w).

Attributes: `heads`, `dim` (channels of a head), `tokens`, and `block`: channels of a block if the
tensors are in the blocked layout, else 0.
"""

MICROSOFT = "com.microsoft"

EPSILON = 1e-6
"""What the published attention adds to its normalizer."""


class RecognizeAttention(ir.passes.InPlacePass):
    """The exported scale-free attention -> one internal operator."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        modified = False
        for node in list(model.graph):
            if node.op_identifier() == ("", "Reshape", "") and node.graph is not None:
                modified |= _recognize(node)
        if modified:
            model.graph.opset_imports[INTERNAL] = 1
        return ir.passes.PassResult(model, modified)


class LowerAttention(ir.passes.InPlacePass):
    """The internal operator -> operators that ONNX Runtime has."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        found = [n for n in model.graph if n.op_identifier() == (INTERNAL, OPERATOR, "")]
        for node in found:
            (_by_token if integer(node, "block", 0) else _by_channel)(model, node)
        return ir.passes.PassResult(model, bool(found))


class _MismatchError(Exception):
    """The graph is not what is looked for."""


def _need(value: ir.Value | None, operator: str) -> ir.Node:
    node = producer(value, operator)
    if node is None:
        raise _MismatchError
    return node


def _check(condition: bool) -> None:
    if not condition:
        raise _MismatchError


def _bounded(value: ir.Value | None) -> ir.Value | None:
    """What a Clip from below, maybe from above too, takes."""
    clip = _need(value, "Clip")
    _check(len(clip.inputs) > 1 and all(is_scalar(bound) for bound in clip.inputs[1:]))
    return clip.inputs[0]


def _mean(value: ir.Value | None, *axes: int) -> ir.Value | None:
    """What a mean over `axes` (counted from the back) takes, with the axes kept."""
    return _reduced(value, "ReduceMean", axes)


def _sum(value: ir.Value | None, *axes: int) -> ir.Value | None:
    """What a sum over `axes` (counted from the back) takes, with the axes kept."""
    return _reduced(value, "ReduceSum", axes)


def _reduced(value: ir.Value | None, operator: str, axes: tuple[int, ...]) -> ir.Value | None:
    node = _need(value, operator)
    found = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    _check(found is not None and sorted(axis % 4 for axis in found) == [a % 4 for a in axes])
    _check(integer(node, "keepdims", 1) == 1)
    return node.inputs[0]


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """What a transposition of the last two axes takes."""
    transpose = _need(value, "Transpose")
    _check(list(transpose.attributes["perm"].as_ints()) == [0, 1, 3, 2])
    return transpose.inputs[0]


def _quotient(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    node = _need(value, "Div")
    return node.inputs[0], node.inputs[1]


def _product(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    node = _need(value, "MatMul")
    return node.inputs[0], node.inputs[1]


def _scale_free(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value, float]:
    """Queries, keys, values and share of a token of `care.fuse.scale_free_attention`."""
    attended, bound = _quotient(value)
    # What bounds the other two divisors cancels; an upper bound of this one would not.
    _check(len(_need(bound, "Clip").inputs) == 2)
    kv, q_scaled = _product(attended)
    v, k_turned = _product(kv)
    q, q_divisor = _quotient(q_scaled)
    _check(_sum(_bounded(q_divisor), -2) is q)
    k_scaled = _swapped(k_turned)
    times = _need(k_scaled, "Mul")
    share = constant(times.inputs[1])
    _check(share is not None and share.size == 1)
    k, scale_k = _quotient(times.inputs[0])
    _check(_mean(_bounded(scale_k), -2, -1) is k)
    sum_k_turned, same_q = _product(_bounded(bound))
    _check(same_q is q_scaled and _sum(_swapped(sum_k_turned), -1) is k_scaled)
    assert q is not None
    assert k is not None
    assert v is not None
    assert share is not None
    return q, k, v, float(share.reshape(()))


def _recognize(last: ir.Node) -> bool:
    """Replace the attention that ends in the Reshape `last`, if there is one."""
    try:
        q, k, v, share = _scale_free(last.inputs[0])
        split = _need(q, "Split")
        _check(list(split.outputs) == [q, k] and integer(split, "axis", 0) == 1)
        qk, shape = _heads(split.inputs[0])
        v_plain, v_shape = _heads(v)
        _check(shape[1] == 2 * v_shape[1] and shape[2:] == v_shape[2:])
        _check(abs(v_shape[3] * share - 1) < 1e-6)
    except _MismatchError:
        return False
    edit = Editor(last, "attention")
    attributes = {"heads": v_shape[1], "dim": v_shape[2], "tokens": v_shape[3], "block": 0}
    out = edit.add(OPERATOR, [qk, v_plain], attributes, domain=INTERNAL, like=last.outputs[0])
    replace(last, out)
    return True


def _heads(value: ir.Value | None) -> tuple[ir.Value | None, list[int]]:
    """What a Reshape to (batch, heads, dim, tokens) takes, and that shape."""
    reshape = _need(value, "Reshape")
    shape = constant(reshape.inputs[1])
    _check(shape is not None and shape.size == 4)
    assert shape is not None
    return reshape.inputs[0], [int(side) for side in shape]


def _settings(node: ir.Node) -> tuple[int, int, int, int]:
    heads, dim, tokens, block = (integer(node, n, 0) for n in ("heads", "dim", "tokens", "block"))
    return heads, dim, tokens, block


def _bound(edit: Editor, tokens: int) -> ir.Value:
    """The published 1e-6, which belongs to a mean over tokens, for a sum over them."""
    return edit.constant(np.array(EPSILON * tokens, np.float32))


def _shape(edit: Editor, *shape: int) -> ir.Value:
    return edit.constant(np.array(shape, np.int64))


def _as_before(edit: Editor, value: ir.Value, node: ir.Node) -> ir.Value:
    """Back to the attention's own shape: (batch, channels, height, width)."""
    shape = node.outputs[0].shape
    assert shape is not None
    height, width = shape[2], shape[3]
    assert isinstance(height, int)
    assert isinstance(width, int)
    heads, dim, _, _ = _settings(node)
    return edit.add("Reshape", [value, _shape(edit, -1, heads * dim, height, width)])


def _split(edit: Editor, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    first = edit.add("Split", [value], {"axis": 1, "num_outputs": 2}, outputs=2)
    node = first.producer()
    assert node is not None
    return node.outputs[0], node.outputs[1]


def _by_channel(model: ir.Model, node: ir.Node) -> None:
    """Heads are (dim, tokens): the order that the plain layout has."""
    heads, dim, tokens, _ = _settings(node)
    edit = Editor(node, "attention")
    qk = edit.add("Reshape", [node.inputs[0], _shape(edit, -1, 2 * heads, dim, tokens)])
    v = edit.add("Reshape", [node.inputs[1], _shape(edit, -1, heads, dim, tokens)])
    q, k = _split(edit, qk)
    turn: dict[str, Any] = {"perm": [0, 1, 3, 2]}
    kv = edit.add("MatMul", [v, edit.add("Transpose", [k], turn)])
    total = edit.add("ReduceSum", [k, _shape(edit, -1)], {"keepdims": 1})
    normalizer = edit.add("MatMul", [edit.add("Transpose", [total], turn), q])
    normalizer = edit.add("Add", [normalizer, _bound(edit, tokens)])
    out = edit.add("Div", [edit.add("MatMul", [kv, q]), normalizer])
    replace(node, _as_before(edit, out, node))


def _by_token(model: ir.Model, node: ir.Node) -> None:
    """Heads are (tokens, dim): the order that the blocked layout has within a block."""
    heads, _, tokens, _ = _settings(node)
    edit = Editor(node, "attention")
    q, k = _split(edit, _gather_blocks(edit, node.inputs[0], node, 2 * heads))
    v = _gather_blocks(edit, node.inputs[1], node, heads)
    kv = edit.add("FusedMatMul", [k, v], {"transA": 1}, domain=MICROSOFT)
    total = edit.add("ReduceSum", [k, _shape(edit, -2)], {"keepdims": 1})
    normalizer = edit.add("FusedMatMul", [q, total], {"transB": 1}, domain=MICROSOFT)
    normalizer = edit.add("Add", [normalizer, _bound(edit, tokens)])
    out = edit.add("Div", [edit.add("MatMul", [q, kv]), normalizer])
    replace(node, _as_before(edit, _scatter_blocks(edit, out, node), node))
    model.graph.opset_imports[MICROSOFT] = 1


def _gather_blocks(edit: Editor, value: ir.Value | None, node: ir.Node, heads: int) -> ir.Value:
    """Blocks of (tokens, block) -> heads of (tokens, dim); no copy where a head is one block."""
    _, dim, tokens, block = _settings(node)
    if dim == block:
        return edit.add("Reshape", [value, _shape(edit, -1, heads, tokens, dim)])
    blocks = _shape(edit, -1, heads, dim // block, tokens, block)
    turned = edit.add(
        "Transpose", [edit.add("Reshape", [value, blocks])], {"perm": [0, 1, 3, 2, 4]}
    )
    return edit.add("Reshape", [turned, _shape(edit, -1, heads, tokens, dim)])


def _scatter_blocks(edit: Editor, value: ir.Value, node: ir.Node) -> ir.Value:
    """The inverse of `_gather_blocks`, up to the final shape."""
    heads, dim, tokens, block = _settings(node)
    if dim == block:
        return value
    blocks = edit.add("Reshape", [value, _shape(edit, -1, heads, tokens, dim // block, block)])
    return edit.add("Transpose", [blocks], {"perm": [0, 1, 3, 2, 4]})
