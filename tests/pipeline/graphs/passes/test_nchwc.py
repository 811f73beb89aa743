"""ONNX Runtime's blocked layout through the whole network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from pipeline.graphs.passes import optimize
from pipeline.graphs.passes.nchwc import NCHWC, BlockedLayout, block_filters, block_outputs
from pipeline.targets.ort.layout import block_size, write_probe

CONV = f"{NCHWC}:Conv"

TEXT = """
g (float[N, 3, 16, 16] x) => (float[N, 10] y) {
    stem = Conv <strides: ints = [4, 4]> (x, ws, bs)
    a, b = Split <axis: int = 1, num_outputs: int = 2> (stem)
    a1 = Conv <group: int = 32, pads: ints = [1, 1, 1, 1]> (a, wd)
    b1 = Gelu (b)
    c = Concat <axis: int = 1> (a1, b1)
    h = Conv (c, wp, bp)
    s = Add (h, stem)
    down = Conv <strides: ints = [2, 2]> (s, w2)
    m = ReduceMean <keepdims: int = 0> (down, axes)
    y = Gemm (m, head, hb)
}
"""

WEIGHTS: dict[str, Any] = {
    "ws": (64, 3, 4, 4),
    "bs": (64,),
    "wd": (32, 1, 3, 3),
    "wp": (64, 64, 1, 1),
    "bp": (64,),
    "w2": (32, 64, 2, 2),
    "axes": np.array([2, 3]),
    "head": (32, 10),
    "hb": (10,),
}


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> int:
    probe = tmp_path_factory.mktemp("probe") / "probe.onnx"
    write_probe(probe)
    size = block_size(probe)
    if size is None:
        pytest.skip("this CPU's ONNX Runtime has no blocked layout")
    return size


@pytest.fixture
def layout(block: int) -> list[Any]:
    return [ShapeInferencePass(), BlockedLayout(block)]


def test_it_is_the_same_without_a_reorder(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    model = graph(TEXT, WEIGHTS)
    same(model, layout, noise(2, 3, 16, 16), 1e-5)
    assert count(model) == {
        CONV: 4,
        "Split": 1,
        "Gelu": 1,
        "Concat": 1,
        f"{NCHWC}:GlobalAveragePool": 1,
        "Reshape": 1,
        "Gemm": 1,
    }


def test_the_convolution_takes_the_addition(
    graph: Callable[..., ir.Model], layout: list[Any]
) -> None:
    model = graph(TEXT, WEIGHTS)
    optimize(model, layout)
    convs = [n for n in model.graph if n.domain == NCHWC and n.op_type == "Conv"]
    assert [len(n.inputs) for n in convs].count(4) == 1


def test_what_cannot_be_cut_into_blocks_stays_plain(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    text = """
    g (float[N, 3, 8, 8] x) => (float[N, 24, 8, 8] y, float[N, 32, 8, 8] z) {
        z = Conv (x, w1)
        t = Conv (z, w2)
        y = Relu (t)
    }
    """
    model = graph(text, {"w1": (32, 3, 1, 1), "w2": (24, 32, 1, 1)})
    if layout[1].block == 8:
        pytest.skip("24 channels are whole blocks of 8")
    same(model, layout, noise(2, 3, 8, 8), 1e-6)
    counted = count(model)
    assert (counted[CONV], counted["Conv"], counted[f"{NCHWC}:ReorderOutput"]) == (1, 1, 1)


def test_a_broadcast_addition_stays_plain(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    text = """
    g (float[N, 16, 4, 4] x) => (float[N, 16, 4, 4] y) {
        a = Conv (x, w)
        y = Add (a, c)
    }
    """
    model = graph(text, {"w": (16, 16, 1, 1), "c": (16, 1, 1)})
    same(model, layout, noise(2, 16, 4, 4), 1e-5)
    assert count(model)[CONV] == 1


def test_activations_and_pools(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    text = """
    g (float[N, 16, 8, 8] x) => (float[N, 16, 1, 1] y) {
        a = Conv (x, w)
        r = Relu (a)
        p = MaxPool <kernel_shape: ints = [3, 3], strides: ints = [2, 2]> (r)
        b = Conv (p, w)
        s = Add (b, p)
        t = Relu (s)
        y = GlobalAveragePool (t)
    }
    """
    model = graph(text, {"w": (16, 16, 1, 1)})
    same(model, layout, noise(2, 16, 8, 8), 1e-5)
    counted = count(model)
    assert (counted["Relu"], counted["Add"], counted[CONV]) == (0, 0, 2)
    assert counted[f"{NCHWC}:MaxPool"] == 1


def test_a_convolution_after_the_mean(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    text = """
    g (float[N, 16, 4, 4] x) => (float[N, 10] y) {
        a = Conv (x, w)
        m = ReduceMean <keepdims: int = 1> (a, axes)
        b = Conv (m, w)
        f = Flatten (b)
        y = Gemm (f, head)
    }
    """
    weights = {"w": (16, 16, 1, 1), "axes": np.array([-1, -2]), "head": (16, 10)}
    model = graph(text, weights)
    same(model, layout, noise(2, 16, 4, 4), 1e-5)
    assert count(model)[CONV] == 2


def test_outputs_keep_their_names_and_layout(
    graph: Callable[..., ir.Model],
    run: Callable[..., Any],
    noise: Callable[..., Any],
    layout: list[Any],
) -> None:
    text = "g (float[N, 16, 4, 4] x) => (float[N, 32, 4, 4] out) { out = Conv (x, w) }"
    model = graph(text, {"w": (32, 16, 1, 1)})
    expected = run(model, noise(1, 16, 4, 4))
    optimize(model, layout)
    assert [value.name for value in model.graph.outputs] == ["out"]
    assert np.abs(run(model, noise(1, 16, 4, 4)) - expected).max() < 1e-4


def test_a_graph_without_convolutions_is_left_alone(graph: Callable[..., ir.Model]) -> None:
    model = graph("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }", {})
    assert not BlockedLayout(16)(model).modified
    assert NCHWC not in model.graph.opset_imports


def test_the_wrong_block_size_gives_wrong_numbers(
    graph: Callable[..., ir.Model], run: Callable[..., Any], noise: Callable[..., Any], block: int
) -> None:
    """Why the probe matters: the wrong width gives other numbers, without an error."""
    text = "g (float[N, 32, 4, 4] x) => (float[N, 32, 4, 4] y) { y = Conv (x, w) }"
    wrong = 8 if block == 16 else 16
    model = graph(text, {"w": (32, 32, 1, 1)})
    images = noise(1, 32, 4, 4)
    expected = run(model, images)
    optimize(model, [ShapeInferencePass(), BlockedLayout(wrong)])
    assert np.abs(run(model, images) - expected).max() > 0.1


def test_filters_are_cut_into_blocks() -> None:
    filters = np.arange(4 * 4 * 1 * 2, dtype=np.float32).reshape(4, 4, 1, 2)
    blocked = block_filters(filters, 2).reshape(2, 2, 1, 2, 2, 2)
    for o, i, w in np.ndindex(4, 4, 2):
        assert blocked[o // 2, i // 2, 0, w, i % 2, o % 2] == filters[o, i, 0, w]
    outputs = block_outputs(filters, 2).reshape(2, 4, 1, 2, 2)
    for o, i, w in np.ndindex(4, 4, 2):
        assert outputs[o // 2, i, 0, w, o % 2] == filters[o, i, 0, w]


def test_two_runs_give_the_same_bytes(
    graph: Callable[..., ir.Model], layout: list[Any], tmp_path: Path
) -> None:
    files = []
    for index in range(2):
        model = graph(TEXT, WEIGHTS)
        optimize(model, [type(layout[0])(), BlockedLayout(layout[1].block)])
        files.append(tmp_path / f"{index}.onnx")
        ir.save(model, files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
