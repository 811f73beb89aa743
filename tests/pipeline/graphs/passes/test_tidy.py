"""What no node needs goes; the model's own metadata stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from pipeline.graphs.passes.tidy import Tidy

TEXT = """
g (float[N, 4] x) => (float[N, 4] y) {
    one = Constant <value_float: float = 1.0> ()
    a = Add (x, one)
    b = Add (x, one)
    same = Identity (a)
    unused = Exp (b)
    y = Mul (same, b)
}
"""


def test_repeated_and_unused_nodes_go(
    graph: Callable[..., ir.Model],
    count: Callable[[ir.Model], Counter[str]],
    same: Callable[..., None],
    noise: Callable[..., Any],
) -> None:
    model = graph(TEXT, {})
    same(model, [], noise(3, 4), 0)
    assert count(model) == {"Add": 1, "Mul": 1}


def test_notes_of_nodes_go_and_those_of_the_model_stay(graph: Callable[..., ir.Model]) -> None:
    model = graph(TEXT, {})
    model.metadata_props["labels"] = "[]"
    for node in model.graph:
        node.metadata_props["stack_trace"] = "/home/someone/net.py"
    Tidy()(model)
    assert model.metadata_props["labels"] == "[]"
    assert not any(node.metadata_props for node in model.graph)


def test_a_scalar_stays_a_scalar(
    graph: Callable[..., ir.Model], same: Callable[..., None], noise: Callable[..., Any]
) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Add (x, c) }"
    model = graph(text, {"c": np.array(2, np.float32)})
    same(model, [], noise(2, 4), 0)
    shape = model.graph.initializers["c"].shape
    assert shape is not None
    assert shape.rank() == 0
