"""Parts of a graph that run alone: any of its nodes, with the values that they read as inputs.

recorded = Recording(model, {"image": images})
part = recorded.part([3, 4, 5])
outputs = GraphExecutor(part.model).evaluate(part.feeds)
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, inliner, numpy_helper

from pipeline.emulate.onnx.executor import GraphExecutor
from pipeline.emulate.onnx.graph import Node, to_elem_type
from pipeline.emulate.onnx.layers import Comparison

Array = npt.NDArray[Any]

BATCH = "batch"
"""Name of an open axis as long as the batch; one of 8 times that is "8*batch"."""

_INDICES = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
"""Types of shapes, axes and masks: constants where the batch is fixed, as builders want them."""


@dataclass(frozen=True)
class Part:
    """Some nodes of a graph as a graph of their own, all shapes fixed.

    Attributes:
        model: The graph.
        feeds: A value for each input, by name; narrow floating-point types as float32 that holds
            their values.
        expected: What the outputs should be, by name, as far as a reference tells.
    """

    model: onnx.ModelProto
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self.model.graph.node)

    @property
    def size(self) -> tuple[int, int, int]:
        """By which of two parts is the smaller one: nodes, then inputs, then constants."""
        return self.nodes, len(self.feeds), len(self.model.graph.initializer)

    def arrays(self) -> bytes:
        """An .npz file of the inputs, and of what is expected as `expected/NAME`."""
        named = {f"expected/{name}": value for name, value in self.expected.items()}
        stream = io.BytesIO()
        # Not by numpy.savez, which takes names for its own keywords.
        with zipfile.ZipFile(stream, "w") as archive:
            for name, value in {**self.feeds, **named}.items():
                entry = io.BytesIO()
                np.lib.format.write_array(entry, value, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
        return stream.getvalue()


class Recording:
    """A graph, and the value of each of its tensors for some inputs.

    Args:
        model: A graph.
        feeds: A value for each of its inputs: all shapes are those that these lead to.
        comparison: The graph beside its float32 reference, and one input: each node is then
            recorded on the reference's values, see `Comparison.forced`.
        watched: A tensor that every part which makes it shows.
        other: A value for each of its inputs with another batch: parts then leave the axes open
            that grow with the batch, and compute the shapes that do.

    Raises:
        ArtifactError, UnsupportedOperatorError, DataError: As `GraphExecutor` and `Comparison`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: Mapping[str, Array],
        comparison: Comparison | None = None,
        watched: str = "",
        other: Mapping[str, Array] | None = None,
    ) -> None:
        self.model = _plain(model)
        executor = GraphExecutor(model, keep=True) if comparison is None else comparison.built
        constants = executor.constants()
        self._values: dict[str, Array] = {**constants, **feeds}
        self.expected: dict[str, Array] = {}
        steps: Iterator[tuple[Node, Mapping[str, Array]]]
        if comparison is None:
            steps = executor.trace(feeds)
        else:
            images = feeds[comparison.built.input.name]
            self.expected = comparison.expected(images)
            steps = comparison.forced(images, self.expected)
        for _, written in steps:
            for name, value in written.items():
                right = self.expected.get(name, value)
                alike = right.shape == value.shape and right.dtype == value.dtype
                self._values[name] = (right if alike else value).copy()
        self._types = {name: to_elem_type(executor.dtype(name)) for name in self._values}
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._computed = constants.keys()
        self._shown = {watched, *(value.name for value in self.model.graph.output)}
        self._open: dict[str, list[int]] = {}
        self._varying: set[str] = set()
        if other is not None:
            self._compare(executor, feeds, other)

    def _compare(
        self, executor: GraphExecutor, feeds: Mapping[str, Array], other: Mapping[str, Array]
    ) -> None:
        """See what depends on the batch: axes by how much, and shapes that are computed."""
        batch = len(next(iter(feeds.values())))
        values = {**other}
        for _, written in executor.trace(other):
            values |= written
        for name, value in values.items():
            known = self._values[name]
            if self._types[name] in _INDICES and not np.array_equal(known, value):
                self._varying.add(name)
            grows = [left != right for left, right in zip(known.shape, value.shape, strict=True)]
            sizes = zip(known.shape, grows, strict=True)
            self._open[name] = [size // batch if grown else 0 for size, grown in sizes]

    def __len__(self) -> int:
        return len(self.model.graph.node)

    def value(self, name: str) -> Array:
        """What a tensor holds."""
        return self._values[name]

    def like(self, name: str) -> list[str]:
        """Inputs and results of nodes that have a tensor's shape and type."""
        shape, dtype = self._values[name].shape, self._types[name]
        return [
            other
            for other, value in self._values.items()
            if other != name
            and other not in self._initializers
            and (value.shape, self._types[other]) == (shape, dtype)
        ]

    def part(self, nodes: Collection[int]) -> Part | None:
        """Some of the nodes as a graph; None if they read nothing that depends on the images.

        Args:
            nodes: Places of the nodes, in any order.
        """
        chosen = self._with_constants(set(nodes))
        made = {name for node in chosen for name in node.output if name}
        read = [name for node in chosen for name in node.input if name]
        outside = [name for name in dict.fromkeys(read) if name not in made]
        inputs = [name for name in outside if self._is_input(name)]
        outputs = [
            name
            for name in made_in_order(chosen)
            if name in self._values and (name not in read or name in self._shown)
        ]
        if not inputs or not outputs:
            return None
        graph = helper.make_graph(
            chosen,
            self.model.graph.name or "part",
            [self._port(name) for name in inputs],
            [self._port(name) for name in outputs],
            [self._constant(name) for name in outside if name not in inputs],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        expected = {name: self.expected[name] for name in outputs if name in self.expected}
        return Part(model, {name: self._values[name] for name in inputs}, expected)

    def _with_constants(self, nodes: set[int]) -> list[onnx.NodeProto]:
        """The nodes, and those that compute from constants what they read and nobody recorded."""
        known = ({*self._values} - self._varying) | {*self._initializers, ""}
        all_nodes = self.model.graph.node
        maker = {name: i for i, node in enumerate(all_nodes) for name in node.output}
        waiting = list(nodes)
        while waiting:
            for name in all_nodes[waiting.pop()].input:
                if name not in known and maker[name] not in nodes:
                    nodes.add(maker[name])
                    waiting.append(maker[name])
        return [all_nodes[i] for i in sorted(nodes)]

    def _is_input(self, name: str) -> bool:
        depends = name not in self._initializers and name not in self._computed
        return depends and self._types[name] not in _INDICES

    def _port(self, name: str) -> onnx.ValueInfoProto:
        sizes = self._values[name].shape
        times = self._open.get(name, [0] * len(sizes))
        sides = [_side(size, by) for size, by in zip(sizes, times, strict=True)]
        return helper.make_tensor_value_info(name, self._types[name], sides)

    def _constant(self, name: str) -> onnx.TensorProto:
        if name in self._initializers:
            return self._initializers[name]
        dtype = helper.tensor_dtype_to_np_dtype(self._types[name])
        return numpy_helper.from_array(self._values[name].astype(dtype), name)


def _side(size: int, batches: int) -> int | str:
    """An axis of a fixed size, or one that is so many times as long as the batch."""
    if not batches:
        return size
    return BATCH if batches == 1 else f"{batches}*{BATCH}"


def times_batch(side: str) -> int:
    """How many times as long as the batch an open axis of a part is; 0 for one of another name."""
    factor, _, name = side.rpartition("*")
    return int(factor or 1) if name == BATCH and (not factor or factor.isdigit()) else 0


def made_in_order(nodes: Collection[onnx.NodeProto]) -> list[str]:
    """Tensors that nodes write, in their order."""
    return [name for node in nodes for name in node.output if name]


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions, and with its constant nodes as initializers."""
    plain = onnx.ModelProto()
    plain.CopyFrom(inliner.inline_local_functions(model) if model.functions else model)
    left = []
    for node in plain.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = plain.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            left.append(node)
    del plain.graph.node[:]
    plain.graph.node.extend(left)
    return plain


def simpler(part: Part) -> Iterator[tuple[onnx.ModelProto, dict[str, Array]]]:
    """Graphs that compute something else and may be smaller, see `Part.size`.

    A constant takes the place of a node; what reads a node's output reads one of its inputs, or
    another tensor of its shape; a node that takes any number of inputs takes one less; a tensor of
    the same shape takes the place of an input or a constant, and a constant that of an input.
    Whether what is left fits together is for the executor to say.

    Yields:
        A graph, and a value for each of its inputs.
    """
    recorded = Recording(part.model, part.feeds)
    for model in _candidates(recorded, part):
        for open_model in _with_an_input(model):
            ports = [value.name for value in open_model.graph.input]
            yield open_model, {name: recorded.value(name) for name in ports}


def _candidates(recorded: Recording, part: Part) -> Iterator[onnx.ModelProto]:
    model = recorded.model
    for place in reversed(range(len(model.graph.node))):
        yield from _without_node(recorded, place)
    for place, node in reversed(list(enumerate(model.graph.node))):
        for position in range(len(node.input) if node.op_type in _VARIADIC else 0):
            yield _with_less(model, place, position)
    ports = [value.name for value in model.graph.input]
    for read in (*ports, *(tensor.name for tensor in model.graph.initializer)):
        for name in recorded.like(read):
            yield _rewired(model, read, name)
    for port in ports:
        yield _fixed(part, {port})


def _with_an_input(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model; without inputs, once with each of its tensors of channels in the place of one."""
    if model.graph.input:
        yield model
        return
    for tensor in model.graph.initializer:
        if tensor.data_type not in _INDICES and len(tensor.dims) > 1:
            changed = _copy(model)
            port = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            changed.graph.input.append(port)
            _drop_constant(changed, tensor.name)
            yield changed


def _without_node(recorded: Recording, place: int) -> Iterator[onnx.ModelProto]:
    model = recorded.model
    node = model.graph.node[place]
    smaller = recorded.part([i for i in range(len(recorded)) if i != place])
    if smaller is not None and smaller.feeds.keys() & set(node.output):
        yield _fixed(smaller, set(node.output))
    constants = {tensor.name for tensor in model.graph.initializer}
    alike = recorded.like(node.output[0])
    for name in dict.fromkeys([*node.input, *alike]):
        if name and name not in constants and name not in node.output:
            yield _bypassed(model, place, name)


_VARIADIC = ("Concat", "Sum", "Max", "Min", "Mean")


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    return changed


def _bypassed(model: onnx.ModelProto, place: int, source: str) -> onnx.ModelProto:
    changed = _copy(model)
    outputs = changed.graph.node[place].output
    for node in changed.graph.node:
        node.input[:] = [source if name in outputs else name for name in node.input]
    kept = [value for value in changed.graph.output if value.name not in outputs]
    del changed.graph.output[:]
    changed.graph.output.extend(kept)
    del changed.graph.node[place]
    return changed


def _with_less(model: onnx.ModelProto, place: int, position: int) -> onnx.ModelProto:
    changed = _copy(model)
    del changed.graph.node[place].input[position]
    return changed


def _rewired(model: onnx.ModelProto, port: str, source: str) -> onnx.ModelProto:
    """The model with a tensor read in the place of an input or a constant, which goes."""
    changed = _copy(model)
    for node in changed.graph.node:
        node.input[:] = [source if name == port else name for name in node.input]
    _drop_inputs(changed, {port})
    _drop_constant(changed, port)
    return changed


def _fixed(part: Part, names: Collection[str]) -> onnx.ModelProto:
    """The model with the values of inputs in their places."""
    changed = _copy(part.model)
    for value in changed.graph.input:
        if value.name in names:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            array = part.feeds[value.name].astype(dtype)
            changed.graph.initializer.append(numpy_helper.from_array(array, value.name))
    _drop_inputs(changed, names)
    return changed


def _drop_inputs(model: onnx.ModelProto, names: Collection[str]) -> None:
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _drop_constant(model: onnx.ModelProto, name: str) -> None:
    left = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
