"""elu(x) + 1 from vectorized operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.graphs.passes import optimize
from pipeline.graphs.passes.elu import EluPlusOne


def text(elu: str = "Elu (x)", add: str = "Add (e, one)") -> str:
    return f"g (float[N, 4] x) => (float[N, 4] y) {{ e = {elu}\n y = {add} }}"


ONE = {"one": np.array(1, np.float32)}


@pytest.mark.parametrize("add", ["Add (e, one)", "Add (one, e)"])
def test_it_is_the_same(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    add: str,
) -> None:
    model = graph(text(add=add), ONE)
    x = np.array([[-3, -1e-3, 0, 4], [-30, 1e-6, 80, 1e4]], np.float32)
    same(model, [EluPlusOne()], x, 1e-7)
    assert count(model) == {"Clip": 1, "Exp": 1, "Relu": 1, "Add": 1}


def test_large_values_do_not_overflow(
    graph: Callable[..., ir.Model], run: Callable[..., Any]
) -> None:
    model = graph(text(), ONE)
    optimize(model, [EluPlusOne()])
    assert run(model, np.full((1, 4), 1e30, np.float32))[0, 0] == np.float32(1e30)


def test_no_denormal_number_arises(graph: Callable[..., ir.Model], run: Callable[..., Any]) -> None:
    model = graph(text(), ONE)
    optimize(model, [EluPlusOne()])
    made = run(model, np.array([[-39, -60, -88, -1e30]], np.float32))[0]
    np.testing.assert_allclose(made, np.exp(np.array([-39, -40, -40, -40], np.float32)), rtol=1e-6)
    # A product of two, as in attention, is none either.
    assert (made * made >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize(
    ("elu", "add", "weights"),
    [
        ("Elu <alpha: float = 0.5> (x)", "Add (e, one)", ONE),
        ("Elu (x)", "Add (e, one)", {"one": np.array(2, np.float32)}),
        ("Elu (x)", "Add (e, e)", {}),
    ],
)
def test_other_forms_stay(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    elu: str,
    add: str,
    weights: dict[str, Any],
) -> None:
    model = graph(text(elu, add), weights)
    optimize(model, [EluPlusOne()])
    assert count(model) == {"Elu": 1, "Add": 1}
