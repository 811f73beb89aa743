"""Small reads and edits of ONNX graphs that quantization and what prepares it share."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

FloatArray = npt.NDArray[np.floating[Any]]


class Links:
    """Who makes and who reads the tensors of a graph; make a new one after an edit of its nodes."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that reads a tensor, if nothing else does."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def constant(self, node: NodeProto, place: int) -> FloatArray | None:
        """Value of an input that is an initializer of floating point, or None."""
        from onnx import numpy_helper

        if place >= len(node.input) or node.input[place] not in self.constants:
            return None
        value: npt.NDArray[Any] = numpy_helper.to_array(self.constants[node.input[place]])
        return value if value.dtype.kind == "f" else None

    def integers(self, node: NodeProto, place: int) -> list[int] | None:
        """Values of an input that is an initializer of integers, or None."""
        from onnx import numpy_helper

        if place >= len(node.input) or node.input[place] not in self.constants:
            return None
        value = numpy_helper.to_array(self.constants[node.input[place]])
        return [int(each) for each in value.reshape(-1)] if value.dtype.kind == "i" else None

    def channels(self, name: str) -> int | None:
        """Channels of images, (batch, channels, height, width), if the graph states them."""
        for value in (*self.graph.value_info, *self.graph.input):
            if value.name == name:
                dims = value.type.tensor_type.shape.dim
                known = len(dims) == 4 and dims[1].HasField("dim_value")
                return int(dims[1].dim_value) if known else None
        return None

    def replace(self, node: NodeProto, place: int, value: FloatArray) -> None:
        """Give an input of a node another constant; other readers keep the old one."""
        from onnx import numpy_helper

        old = node.input[place] if place < len(node.input) else ""
        if old in self.constants and len(self.readers[old]) == 1 and old not in self.outputs:
            self.constants[old].CopyFrom(numpy_helper.from_array(value, old))
            return
        name = self._fresh(f"{node.output[0]}_constant{place}")
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.constants[name] = self.graph.initializer[-1]
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = name
        if old:
            self.readers[old] = [reader for reader in self.readers[old] if reader is not node]
        self.readers[name] = [node]

    def _fresh(self, name: str) -> str:
        taken = {*self.constants, *self.producer, *self.readers, *self.outputs}
        while name in taken:
            name += "_"
        return name


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute, or the default."""
    from onnx import helper

    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default
