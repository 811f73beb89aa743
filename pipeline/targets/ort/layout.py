"""An artifact's files, and which blocked layout this CPU's ONNX Runtime uses, asked from itself.

A model in the blocked layout must meet the width of blocks that it was made for, and the internal
operators of the very version of ONNX Runtime; else its answers are wrong without a word. So neither
is guessed from the CPU's name: a graph of one reorder shows the width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.targets.ort.session import Settings, errors, start

PORTABLE = "model.onnx"
PHOTO = "photo.onnx"
"""The portable file with preprocessing inside, where that is asked for."""
BLOCKED = "model.blocked.onnx"
OTHER_BLOCKED = "model.blocked.other.onnx"
"""The same for the other width of blocks: CPUs with AVX-512 have 16 channels, others 8."""
PROBE = "layout-probe.onnx"
_CHANNELS, _PIXELS = 64, 2


def write_probe(path: Path) -> None:
    """Write the graph that `block_size` runs."""
    import onnx_ir as ir

    from pipeline.graphs.passes.nchwc import NCHWC

    shape = (1, _CHANNELS, 1, _PIXELS)
    x = ir.val("x", ir.DataType.FLOAT, shape)
    node = ir.node("ReorderInput", [x], domain=NCHWC, name="reorder")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 20, NCHWC: 1}, name="probe")
    ir.save(ir.Model(graph, ir_version=10), path)


def block_size(probe: Path) -> int | None:
    """Channels of a block; None if this ONNX Runtime has no blocked layout here."""
    images = np.arange(_CHANNELS * _PIXELS, dtype=np.float32).reshape(1, _CHANNELS, 1, _PIXELS)
    failures: tuple[type[Exception], ...] = (ArtifactError, UnavailableError, *errors())
    try:
        session = start(probe, Settings(threads=1, level="none"), 1)
        order = session.run(None, {"x": images})[0].ravel()
    except failures:
        return None
    # A pixel's channels come first: the second pixel of channel 0 lies one block behind the first.
    block = int(np.flatnonzero(order == 1)[0])
    return block if block > 1 else None
