"""A factor per channel as a convolution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from pipeline.graphs.passes import optimize
from pipeline.graphs.passes.layer_scale import LayerScale


def text(mul: str = "Mul (x, gamma)", after: str = "Add (m, x)") -> str:
    return f"g (float[N, 8, 5, 5] x) => (float[N, 8, 5, 5] y) {{ m = {mul}\n y = {after} }}"


@pytest.mark.parametrize("mul", ["Mul (x, gamma)", "Mul (gamma, x)"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1)])
def test_it_is_the_same(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
    mul: str,
    shape: tuple[int, ...],
) -> None:
    model = graph(text(mul), {"gamma": shape})
    same(model, [LayerScale()], noise(2, 8, 5, 5), 1e-7)
    assert count(model) == {"Conv": 1, "Add": 1}


def test_the_weight_says_where_it_comes_from(graph: Callable[..., ir.Model]) -> None:
    model = graph(text(), {"gamma": (8, 1, 1)})
    optimize(model, [LayerScale()])
    assert any(name.startswith("gamma/") for name in model.graph.initializers)


@pytest.mark.parametrize(
    ("after", "shape"),
    [("Relu (m)", (8, 1, 1)), ("Add (m, x)", (1, 1, 5)), ("Add (m, x)", (1, 1, 1, 1))],
)
def test_other_products_stay(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    after: str,
    shape: tuple[int, ...],
) -> None:
    model = graph(text(after=after), {"gamma": shape})
    optimize(model, [LayerScale()])
    assert count(model)["Mul"] == 1
