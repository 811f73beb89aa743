"""Linear attention with as few operations as float32 needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.graphs.edit import INTERNAL, Editor
from pipeline.graphs.passes import finish_blocked, finish_portable, for_ort, optimize
from pipeline.graphs.passes.attention import OPERATOR, LowerAttention, RecognizeAttention, _by_token

HEADS, DIM, SIDE = 2, 16, 3
TOKENS = SIDE * SIDE
CHANNELS = HEADS * DIM


def text(q_divisor: str = "cq") -> str:
    """The scale-free form, as `care.fuse` exports it; queries and keys from a convolution."""
    return f"""
g (float[N, {CHANNELS}, {SIDE}, {SIDE}] x) => (float[N, {CHANNELS}, {SIDE}, {SIDE}] y) {{
    v4 = Conv (x, wv)
    qk4 = Conv (x, w)
    e = Elu (qk4)
    p = Add (e, one)
    qk = Reshape (p, shape_qk)
    v = Reshape (v4, shape_v)
    q, k = Split <axis: int = 1, num_outputs: int = 2> (qk)
    sk = ReduceMean <keepdims: int = 1> (k, both)
    ck = Clip (sk, low)
    sq = ReduceSum <keepdims: int = 1> (q, dims)
    cq = Clip (sq, low, high)
    qs = Div (q, {q_divisor})
    kd = Div (k, ck)
    ks = Mul (kd, share)
    kt = Transpose <perm: ints = [0, 1, 3, 2]> (ks)
    kv = MatMul (v, kt)
    num = MatMul (kv, qs)
    ms = ReduceSum <keepdims: int = 1> (ks, last)
    mt = Transpose <perm: ints = [0, 1, 3, 2]> (ms)
    den = MatMul (mt, qs)
    bound = Clip (den, low)
    out = Div (num, bound)
    y = Reshape (out, shape_y)
}}
"""


def weights(scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    size = (2 * CHANNELS, CHANNELS, 1, 1)
    return {
        "w": (scale * rng.standard_normal(size) / np.sqrt(CHANNELS)).astype(np.float32),
        "wv": rng.standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32),
        "one": np.array(1, np.float32),
        "low": np.array(2.0**-14, np.float32),
        "share": np.array(1 / TOKENS, np.float32),
        "high": np.array(65504, np.float32),
        "both": np.array([-2, -1]),
        "last": np.array([-1]),
        "dims": np.array([-2]),
        "shape_qk": np.array([-1, 2 * HEADS, DIM, TOKENS]),
        "shape_v": np.array([-1, HEADS, DIM, TOKENS]),
        "shape_y": np.array([-1, CHANNELS, SIDE, SIDE]),
    }


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_it_is_the_same(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    scale: float,
) -> None:
    model = graph(text(), weights(scale))
    same(model, [RecognizeAttention(), LowerAttention()], noise(3, CHANNELS, SIDE, SIDE), 1e-5)
    counted = count(model)
    assert (counted["Div"], counted["ReduceMean"], counted["Clip"]) == (1, 0, 0)


@pytest.mark.parametrize("block", [8, 16])
def test_it_is_the_same_token_by_token(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    run: Callable[..., Any],
    noise: Callable[..., Any],
    block: int,
) -> None:
    """The blocked layout itself runs only where the CPU has it; this compares its arithmetic."""
    model, images = graph(text(), weights()), noise(2, CHANNELS, SIDE, SIDE)
    expected = run(model, images)
    optimize(model, [RecognizeAttention()])
    node = next(n for n in model.graph if n.op_type == OPERATOR)
    # Cut into blocks and put together again by ordinary nodes around the attention.
    node.attributes["block"] = ir.AttrInt64("block", block)
    wrap_in_blocks(node, block)
    _by_token(model, node)
    found = run(model, images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert count(model)["com.microsoft:FusedMatMul"] == 2


def turn(edit: Editor, value: ir.Value | None, channels: int, shape: list[int]) -> ir.Value:
    cut = edit.add("Reshape", [value, edit.constant(np.array(shape))])
    turned = edit.add("Transpose", [cut], {"perm": [0, 1, 3, 2]})
    back = edit.constant(np.array([-1, channels, SIDE, SIDE]))
    return edit.add("Reshape", [turned, back])


def wrap_in_blocks(node: ir.Node, block: int) -> None:
    """Cut the inputs of the attention into blocks, and put its output together again."""
    edit = Editor(node, "wrap")
    for index, channels in ((0, 2 * CHANNELS), (1, CHANNELS)):
        shape = [-1, channels // block, block, TOKENS]
        node.replace_input_with(index, turn(edit, node.inputs[index], channels, shape))
    out = node.outputs[0]
    made = turn(Editor(node, "unwrap"), out, CHANNELS, [-1, CHANNELS // block, TOKENS, block])
    made.shape, made.type, made.name, out.name = out.shape, out.type, out.name, "attended"
    assert isinstance(node.graph, ir.Graph)
    node.graph.outputs[0] = made
    node.graph.sort()


def test_vanishing_queries_give_a_number(
    graph: Callable[..., ir.Model], run: Callable[..., Any]
) -> None:
    model = graph(text(), weights())
    optimize(model, [RecognizeAttention(), LowerAttention()])
    for value in (-1e4, 0.0, 1e4):
        found = run(model, np.full((1, CHANNELS, SIDE, SIDE), value, np.float32))
        assert np.isfinite(found).all()


def test_something_else_stays(
    graph: Callable[..., ir.Model], count: Callable[[ir.Model], Counter[str]]
) -> None:
    model = graph(text(q_divisor="low"), weights())
    optimize(model, [RecognizeAttention()])
    assert f"{INTERNAL}:{OPERATOR}" not in count(model)


def test_the_internal_operator_never_stays(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    noise: Callable[..., Any],
) -> None:
    for passes in (
        [*for_ort(None), *finish_portable()],
        [*for_ort(16), *finish_blocked(16)],
    ):
        model = graph(text(), weights())
        optimize(model, passes)
        assert not any(name.startswith(INTERNAL) for name in count(model))
        assert INTERNAL not in model.graph.opset_imports
