"""Depthwise convolutions over whole blocks of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from pipeline.graphs.passes import optimize
from pipeline.graphs.passes.narrow import WidenNarrowMixers


def text(pad: int = 3, memory: str = "memory") -> str:
    return f"""
g (float[N, 32, 6, 6] x) => (float[N, 32, 6, 6] y) {{
    memory, a, b, c = Split <axis: int = 1> (x, sizes)
    a1 = Conv <group: int = 8, pads: ints = [5, 0, 5, 0]> (a, w11, b11)
    a2 = Conv <group: int = 8, pads: ints = [0, 5, 0, 5]> (a, w1, b1)
    a3 = Add (a1, a2)
    b3 = Conv <group: int = 8, pads: ints = [1, 1, 1, 1]> (b, w3)
    c3 = Conv <group: int = 8, pads: ints = [{pad}, 3, 3, 3]> (c, w7, b7)
    mixed = Concat <axis: int = 1> (a3, b3, c3)
    h = Conv (mixed, fc1, fc1b)
    r = Relu (h)
    o = Conv (r, fc2, fc2b)
    s = Add (o, mixed)
    y = Concat <axis: int = 1> ({memory}, s)
}}
"""


WEIGHTS: dict[str, Any] = {
    "sizes": np.array([8, 8, 8, 8]),
    "w11": (8, 1, 11, 1),
    "b11": (8,),
    "w1": (8, 1, 1, 11),
    "b1": (8,),
    "w3": (8, 1, 3, 3),
    "w7": (8, 1, 7, 7),
    "b7": (8,),
    "fc1": (40, 24, 1, 1),
    "fc1b": (40,),
    "fc2": (24, 40, 1, 1),
    "fc2b": (24,),
}


@pytest.mark.parametrize("block", [16, 32])
def test_it_is_the_same(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    block: int,
) -> None:
    model = graph(text(), WEIGHTS)
    same(model, [ShapeInferencePass(), WidenNarrowMixers(block)], noise(2, 32, 6, 6), 5e-6)
    # One block of memory and a (two sums), one of b and c; or all in one.
    assert count(model)["Conv"] == {16: 5, 32: 4}[block]
    assert count(model)["Concat"] == 1


def test_parts_as_wide_as_a_block_stay(
    graph: Callable[..., ir.Model], count: Callable[[ir.Model], Counter[str]]
) -> None:
    model = graph(text(), WEIGHTS)
    before = count(model)
    optimize(model, [ShapeInferencePass(), WidenNarrowMixers(8)])
    assert count(model) == before


def test_a_part_that_someone_else_reads_stays(
    graph: Callable[..., ir.Model], count: Callable[[ir.Model], Counter[str]]
) -> None:
    model = graph(text(memory="a"), WEIGHTS)
    before = count(model)
    optimize(model, [ShapeInferencePass(), WidenNarrowMixers(16)])
    assert count(model)["Conv"] == before["Conv"]
