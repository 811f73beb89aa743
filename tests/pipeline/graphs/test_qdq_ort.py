"""Which nodes can be in 8 bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from pipeline.graphs.qdq_ort import Kind, candidates_of

DEPTHWISE, DENSE = (8, 1, 3, 3), (8, 8, 3, 3)


def kinds(shape: tuple[int, ...], behind: str, outputs: str = "float[N, 8] y") -> list[Kind]:
    """Kinds of the candidates of a convolution and what reads it."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        f"g (float[N, 8, 5, 5] x) => ({outputs}) <int64[2] axes = {{2, 3}}> {{"
        f" a = Conv<group = {8 // shape[1]}, pads = [1, 1, 1, 1]> (x, w)\n {behind} }}"
    )
    weight = np.zeros(shape, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.checker.check_model(model, full_check=True)
    return [candidate.kind for candidate in candidates_of(model)]


MEAN = "y = ReduceMean<keepdims = 0> (a, axes)"


def test_a_depthwise_convolution_of_which_only_means_are_taken_stays_in_float() -> None:
    assert kinds(DEPTHWISE, MEAN) == []


@pytest.mark.parametrize(
    ("shape", "behind", "outputs", "kind"),
    [
        (DENSE, MEAN, "float[N, 8] y", Kind.CONVOLUTION),
        (DEPTHWISE, "y = Relu (a)", "float[N, 8, 5, 5] y", Kind.DEPTHWISE),
        (DEPTHWISE, f"{MEAN}\n z = Relu (a)", "float[N, 8] y, float[N, 8, 5, 5] z", Kind.DEPTHWISE),
        (DEPTHWISE, MEAN, "float[N, 8] y, float[N, 8, 5, 5] a", Kind.DEPTHWISE),
    ],
)
def test_others_do_not(shape: tuple[int, ...], behind: str, outputs: str, kind: Kind) -> None:
    assert kinds(shape, behind, outputs) == [kind]
