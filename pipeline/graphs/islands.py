"""Sums, splits and joins among float nodes: in 8 bits they would be converted to and from.

A sum whose terms come from 8-bit layers, and whose result goes to one, saves conversions in 8 bits.
One that adds up what `Exp` and `Relu` give, for a matrix product in float, needs three where float
needs none, and rounds for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import GraphProto, NodeProto

CARRIERS = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
    | {"Relu", "Clip", "Gelu", "MaxPool", "GlobalAveragePool"}
)
"""Operators that keep 8 bits where they find them: they move values, vanish in a conversion, or
have 8-bit kernels of their own."""


def islands(graph: GraphProto, layers: Collection[int], sums: Collection[int]) -> set[int]:
    """Which sums, splits and joins need fewer conversions in float32 than in 8 bits.

    Those that read one another, directly or behind `CARRIERS`, are in 8 bits together or not at
    all, so that they are counted together.

    Args:
        graph: In topological order.
        layers: Indices of the nodes that are in 8 bits anyway.
        sums: Indices of the sums, splits and joins that may be.
    """
    surroundings = _Surroundings(graph, layers, sums)
    return {
        index
        for group in surroundings.groups()
        if surroundings.conversions(group) > surroundings.conversions_in_float(group)
        for index in group
    }


class _Surroundings:
    """Who writes what nodes read, and who reads what they write, behind carriers."""

    def __init__(self, graph: GraphProto, layers: Collection[int], sums: Collection[int]) -> None:
        self.nodes: list[NodeProto] = list(graph.node)
        self.layers, self.sums = frozenset(layers), frozenset(sums)
        self.able = self.layers | self.sums
        self.constants = {tensor.name for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.writer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(index)

    def groups(self) -> list[set[int]]:
        """Sums, splits and joins that read one another."""
        group_of: dict[int, set[int]] = {}
        for index in sorted(self.sums):
            group = {index}
            for name in self._read([index]):
                before = self._source(name)
                if before in group_of:
                    group |= group_of[before]
            group_of |= dict.fromkeys(group, group)
        return list({id(group): group for group in group_of.values()}.values())

    def conversions(self, group: Collection[int]) -> int:
        """How many tensors have to be converted if a group is in 8 bits."""
        known = self.layers.union(group)
        given = {name for name in self._read(group) if self._source(name) not in known}
        return len(given) + sum(self._is_read_in_float(name) for name in self._made(group))

    def conversions_in_float(self, group: Collection[int]) -> int:
        """How many more tensors have to be converted if a group is in float32."""
        given = {name for name in self._read(group) if self._source(name) in self.layers}
        taken = sum(
            any(reader in self.layers for reader in self._ends(name)) for name in self._made(group)
        )
        return sum(not self._is_read_in_float(name) for name in given) + taken

    def _read(self, group: Collection[int]) -> Iterator[str]:
        """Tensors that a group reads, beside constants."""
        for index in group:
            yield from (n for n in self.nodes[index].input if n and n not in self.constants)

    def _made(self, group: Collection[int]) -> Iterator[str]:
        for index in group:
            yield from filter(None, self.nodes[index].output)

    def _source(self, name: str) -> int | None:
        """The node that writes a tensor, or what it is carried from; None for an input."""
        index = self.writer.get(name)
        while index is not None and self.nodes[index].op_type in CARRIERS:
            index = self.writer.get(self.nodes[index].input[0])
        return index

    def _ends(self, name: str) -> Iterator[int | None]:
        """The nodes that read a tensor, or what it is carried to; None for an output."""
        if name in self.outputs:
            yield None
        for index in self.readers.get(name, ()):
            if self.nodes[index].op_type in CARRIERS:
                yield from self._ends(self.nodes[index].output[0])
            else:
                yield index

    def _is_read_in_float(self, name: str) -> bool:
        return any(index not in self.able for index in self._ends(name))
