"""elu(x) + 1 without the slow Elu kernel.

ONNX Runtime computes Elu one element at a time: 0.17 us per hundred elements and core on an AVX-512
CPU, four times what the four vectorized operations below take together. For x > 0 both forms are
x + 1; below, exp(x) is even the more accurate one, where elu(x) + 1 loses all digits near -17, and
is 0. So nothing is lost where x is held above `LEAST`, and denormal numbers cannot arise, with
which an Intel CPU takes a hundred cycles for a product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graphs.edit import Editor, is_scalar, only_use, producer, replace

LEAST = -40.0
"""Exp of it is 4e-18, and the product of two such still a normal number in float32."""


class EluPlusOne(ir.passes.InPlacePass):
    """Elu(x) + 1 -> Relu(x) + Exp(Clip(x, LEAST, 0))."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        modified = False
        for node in list(model.graph):
            if node.op_identifier() == ("", "Add", ""):
                modified |= _rewrite(node)
        return ir.passes.PassResult(model, modified)


def _rewrite(add: ir.Node) -> bool:
    for value, other in (add.inputs, reversed(add.inputs)):
        elu = producer(value, "Elu")
        if elu is None or value is None or not only_use(value) or not is_scalar(other, 1):
            continue
        alpha = elu.attributes.get("alpha")
        if alpha is not None and alpha.as_float() != 1:
            continue
        x = elu.inputs[0]
        edit = Editor(add, "elu")
        bounds = [edit.constant(np.array(bound, np.float32)) for bound in (LEAST, 0)]
        below = edit.add("Clip", [x, *bounds], like=x)
        below = edit.add("Exp", [below], like=x)
        above = edit.add("Relu", [x], like=x)
        replace(add, edit.add("Add", [above, below], like=x))
        return True
    return False
