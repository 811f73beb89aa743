"""Metadata of the nodes of ONNX graphs, which names the modules that they come from.

Reports name blocks by it. Tools that rewrite graphs drop it: onnxsim, ONNX's own version converter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def carry_metadata(source: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """Give the nodes of `result` the metadata of those of `source` that write the same tensors.

    Args:
        source: The graph before it was rewritten.
        result: The graph after it, which keeps most names of tensors. It is changed.
    """
    known = {name: node.metadata_props for node in source.graph.node for name in node.output}
    for node in result.graph.node:
        written = next((known[name] for name in node.output if name in known), ())
        if not node.metadata_props:
            node.metadata_props.extend(written)
