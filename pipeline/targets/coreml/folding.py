"""What a network computes of its weights alone, computed before it is converted.

Some networks resize a table of their weights, such as a position embedding, in each call: Core ML
lacks that operation, but the result is the same for every image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.targets.coreml.nodes import kind_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

_RESIZES = ("upsample_", "_upsample_")


def fold_resized_weights(program: ExportedProgram) -> int:
    """Put results of resizes that depend on weights alone in their place, as buffers.

    Args:
        program: A program of ATen operations; changed in place.

    Returns:
        How many were folded.
    """
    values = _Weights(program)
    found = [node for node in program.graph.nodes if _resizes(node) and values.known(node)]
    for number, node in enumerate(found):
        _replace(program, node, values.of(node), f"folded_{number}")
    if found:
        program.graph.eliminate_dead_code()
        program.graph.lint()
        program.graph_module.recompile()
    return len(found)


def _resizes(node: Node) -> bool:
    return node.op == "call_function" and kind_of(node).startswith(_RESIZES)


class _Weights:
    """Values of nodes that depend on weights alone.

    Args:
        program: The program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._values: dict[Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                held = program.state_dict.get(names[node.name])
                held = program.constants.get(names[node.name]) if held is None else held
                if held is not None:
                    self._values[node] = held

    def known(self, node: Node) -> bool:
        """Whether a node's value does not depend on an image."""
        return node in self._values or (
            node.op == "call_function" and all(map(self.known, node.all_input_nodes))
        )

    def of(self, node: Node) -> Tensor:
        """Value of a node that is `known`."""
        import torch
        from torch.fx.node import map_arg

        if node not in self._values:
            args, kwargs = map_arg((node.args, node.kwargs), self.of)
            target: Any = node.target
            with torch.no_grad():
                self._values[node] = target(*args, **kwargs)
        value: Tensor = self._values[node]
        return value


def _replace(program: ExportedProgram, node: Node, value: Tensor, name: str) -> None:
    """Give the users of a node a new buffer with its value."""
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        buffer = program.graph.placeholder(name)
    buffer.meta["val"] = node.meta["val"]
    spec = InputSpec(InputKind.BUFFER, TensorArgument(buffer.name), name, persistent=True)
    program.graph_signature.input_specs.insert(0, spec)
    program.state_dict[name] = value.detach().contiguous()
    node.replace_all_uses_with(buffer)
