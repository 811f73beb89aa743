"""Exact graph passes for runtimes that run the ONNX graph itself.

Every pass is one module with one `onnx_ir` pass and computes the same function; its test compares
outputs before and after. A pass that pays only on one runtime says so, with what was measured.

    tidy         no unused, no repeated, no machine-specific content
    narrow       depthwise convolutions over whole blocks of channels
    attention    linear attention with as few operations as float32 needs
    elu          elu(x) + 1 from vectorized operations
    layer_scale  a factor per channel as a convolution that takes the following sum
    linear       linear layers of sequences as Gemm, which has an 8-bit kernel with its bias
    nchwc        ONNX Runtime's blocked layout through the whole network
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Applied:
    """What a pass did.

    Attributes:
        name: The pass.
        nodes_before: Nodes of the graph before it.
        nodes_after: And after it.
    """

    name: str
    nodes_before: int
    nodes_after: int


def optimize(model: ir.Model, passes: Sequence[ir.passes.PassBase]) -> list[Applied]:
    """Run `passes` over a model, in place.

    Args:
        model: An inference graph.
        passes: In order. What they leave unused is removed after each of them.

    Returns:
        What the passes that changed something did.
    """
    from pipeline.graphs.passes.tidy import Tidy

    applied = []
    for step in (Tidy(), *passes):
        before = len(model.graph)
        if step(model).modified:
            Tidy()(model)
            applied.append(Applied(type(step).__name__, before, len(model.graph)))
    return applied


def for_ort(block: int | None) -> list[ir.passes.PassBase]:
    """Passes for ONNX Runtime on a CPU, to a graph that every ONNX runtime accepts.

    The result still holds internal operators: finish it with `finish_portable` or `finish_blocked`.

    Args:
        block: Channels of a block of the CPU's layout, or None if it has no such layout.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    from pipeline.graphs.passes.attention import RecognizeAttention
    from pipeline.graphs.passes.elu import EluPlusOne
    from pipeline.graphs.passes.layer_scale import LayerScale
    from pipeline.graphs.passes.narrow import WidenNarrowMixers

    narrow = [] if block is None else [WidenNarrowMixers(block)]
    return [ShapeInferencePass(), *narrow, RecognizeAttention(), EluPlusOne(), LayerScale()]


def finish_portable() -> list[ir.passes.PassBase]:
    """Passes that end in operators of ONNX itself."""
    from pipeline.graphs.passes.attention import LowerAttention

    return [LowerAttention()]


def finish_blocked(block: int) -> list[ir.passes.PassBase]:
    """Passes that end in ONNX Runtime's blocked layout."""
    from pipeline.graphs.passes.attention import LowerAttention
    from pipeline.graphs.passes.nchwc import BlockedLayout

    return [BlockedLayout(block), LowerAttention()]
