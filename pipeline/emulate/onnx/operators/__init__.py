"""The ONNX operators that the reference executor knows, one function each.

A function takes the call (attributes, result type) and the node's inputs as tensors, None for an
optional one that is left out, and returns the result as computed, in float32: the executor rounds
it. To add an operator, write the function, decorate it with its name, and run ONNX's own cases of
it (`pytest tests/pipeline/emulate/onnx/test_node_cases.py`):

    @operator("LeakyRelu")
    def _leaky_relu(call: Call, x: Tensor) -> Tensor:
        return kernels.leaky_relu(x, call.attribute("alpha", 0.01))
"""

from __future__ import annotations

# Importing these modules fills the table.
from pipeline.emulate.onnx.operators import (
    attention,
    elementwise,
    indexing,
    layers,
    pooling,
    recurrent,
    reductions,
    resize,
    shapes,
    types,
)
from pipeline.emulate.onnx.operators.table import OPERATORS, Call, Operator

__all__ = [
    "OPERATORS",
    "Call",
    "Operator",
    "attention",
    "elementwise",
    "indexing",
    "layers",
    "pooling",
    "recurrent",
    "reductions",
    "resize",
    "shapes",
    "types",
]
