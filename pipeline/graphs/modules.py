"""The parts of a graph that can be raised to a wider type: the nodes of one module of the network.

A module's own nodes are a part, those of the modules inside of it are parts of their own. So the
products of an attention are apart from the layers that make its queries, and a block's sums are
apart from what they add up. A node of which no module is known is a part by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from pipeline.emulate.onnx.graph import Node, load_graph
from pipeline.graphs.products import count_products


@dataclass(frozen=True)
class Part:
    """Nodes that are raised together.

    Attributes:
        name: The module, or the node where none is known.
        block: The block of the network around it.
        products: Multiply-accumulates of one image.
    """

    name: str
    block: str
    products: int


class Parts:
    """The parts of a graph, in its order.

    Args:
        model: A graph without functions of its own.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = load_graph(model).nodes
        counted = count_products(model)
        sums: dict[str, int] = defaultdict(int)
        blocks: dict[str, str] = {}
        self._of: dict[str, str] = {}
        self._readers: dict[str, list[str]] = defaultdict(list)
        self._inputs: dict[str, tuple[str, ...]] = {}
        for node in nodes:
            name = _name(node)
            blocks.setdefault(name, node.block or name)
            sums[name] += counted.get(node.outputs[0], 0)
            self._of |= dict.fromkeys(node.outputs, name)
            self._inputs |= dict.fromkeys(node.outputs, node.inputs)
            for tensor in node.inputs:
                self._readers[tensor].append(name)
        self.all = {name: Part(name, block, sums[name]) for name, block in blocks.items()}
        self.total = sum(sums.values())

    def of(self, tensor: str) -> str:
        """The part that writes a tensor; "" for none, such as an input of the graph."""
        return self._of.get(tensor, "")

    def around(self, tensor: str) -> set[str]:
        """The parts that write or read a tensor."""
        return ({self.of(tensor)} | set(self._readers[tensor])) - {""}

    def reading(self, tensor: str) -> set[str]:
        """The parts that read a tensor."""
        return set(self._readers[tensor])

    def before(self, tensor: str, known: Collection[str]) -> set[str]:
        """The nearest parts that a tensor is made from, but for those that are known."""
        found: set[str] = set()
        seen, waiting = {tensor}, [tensor]
        while waiting:
            for name in set(self._inputs.get(waiting.pop(), ())) - seen:
                seen.add(name)
                if not self.of(name) or self.of(name) in known:
                    waiting.append(name)
                else:
                    found.add(self.of(name))
        return found

    def of_block(self, block: str) -> list[str]:
        """The parts of a block."""
        return [part.name for part in self.all.values() if part.block == block]

    @property
    def blocks(self) -> list[str]:
        """The blocks, in the order of the graph."""
        return list(dict.fromkeys(part.block for part in self.all.values()))

    def share(self, names: Iterable[str]) -> float:
        """Share of all products that these parts hold; 0 where the graph has none."""
        return sum(self.all[name].products for name in set(names)) / max(1, self.total)

    def in_order(self, names: Collection[str]) -> list[str]:
        """Names in the order of the graph."""
        return [name for name in self.all if name in names]


def _name(node: Node) -> str:
    return node.module or node.name


def with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which constants of nodes are initializers, which take any type at no cost."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    left = []
    for node in copy.graph.node:
        held = node.attribute[0] if node.op_type == "Constant" else None
        if held is None or held.name != "value" or held.t.data_type != TensorProto.FLOAT:
            left.append(node)
            continue
        copy.graph.initializer.append(held.t)
        copy.graph.initializer[-1].name = node.output[0]
    del copy.graph.node[:]
    copy.graph.node.extend(left)
    return copy
