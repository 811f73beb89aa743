"""Inserts quantize/dequantize pairs where ONNX Runtime's CPU kernels take them.

Its int8 kernels read unsigned activations and signed weights, one scale a channel, and write 8
bits: a node is quantized with its inputs, its output and its bias. TensorRT wants another graph: it
reads signed activations and leaves outputs and biases alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from calibration.observe import GraphTensors
from calibration.pairs import safe_weights
from calibration.ranges import (
    ACTIVATIONS_UINT8,
    WEIGHTS_INT8,
    Quantization,
    Range,
    Scheme,
    quantization,
    weight_quantization,
)
from pipeline.emulate.onnx.graph import block_of
from pipeline.graphs.islands import islands
from pipeline.graphs.links import Links, attribute
from pipeline.graphs.pairs import Pairs, dequantized

_INT32 = np.iinfo(np.int32)


class Kind(StrEnum):
    """Kinds of nodes that have 8-bit kernels."""

    CONVOLUTION = "convolutions"
    DEPTHWISE = "depthwise convolutions"
    LINEAR = "linear layers"
    ADDITION = "additions"
    JOINT = "splits and concatenations"


_LAYERS = (Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.LINEAR)


@dataclass(frozen=True)
class Candidate:
    """A node that can be quantized.

    Attributes:
        index: Of the node in the graph.
        kind: Its kind.
        block: The block of the network that it belongs to.
    """

    index: int
    kind: Kind
    block: str


def candidates_of(model: onnx.ModelProto) -> list[Candidate]:
    """All nodes that can be quantized, in the order of the graph.

    What they read beside constants is of floating point and depends on the input: exporters join
    and add up integers of shapes, too. Sums, splits and joins among float nodes are none, see
    `pipeline.graphs.islands`; nor is a depthwise convolution of which only means are taken, in
    float: its result would be rounded for nothing, and in float32 it takes no longer. The name of a
    layer's weight names its block; nodes without weights belong to the block of the layer before
    them.
    """
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    tensors = frozenset(GraphTensors(model).names)
    links = Links(model.graph)
    found, block = [], "network"
    for index, node in enumerate(model.graph.node):
        kind = _kind(node, weights)
        if any(name not in tensors for name in node.input if name and name not in weights):
            kind = None
        if kind in _LAYERS and "." in node.input[1]:
            block = block_of(node.input[1])
        if kind is Kind.DEPTHWISE and _is_only_averaged(links, node.output[0]):
            kind = None
        if kind is not None:
            found.append(Candidate(index, kind, block))
    layers = [candidate.index for candidate in found if candidate.kind in _LAYERS]
    others = [candidate.index for candidate in found if candidate.kind not in _LAYERS]
    left = islands(model.graph, layers, others)
    return [candidate for candidate in found if candidate.index not in left]


def _is_only_averaged(links: Links, name: str) -> bool:
    readers = {node.op_type for node in links.readers[name]}
    return readers == {"ReduceMean"} and name not in links.outputs


def _kind(node: onnx.NodeProto, weights: Mapping[str, Sequence[int]]) -> Kind | None:
    constants = [name in weights for name in node.input]
    if node.op_type == "Conv" and all(constants[1:]):
        one_each = weights[node.input[1]][1] == 1 and weights[node.input[1]][0] > 1
        return Kind.DEPTHWISE if one_each else Kind.CONVOLUTION
    if node.op_type == "Gemm" and all(constants[1:]):
        return Kind.LINEAR
    if node.op_type == "Add" and not any(constants):
        return Kind.ADDITION
    if node.op_type in ("Concat", "Split") and not constants[0]:
        return Kind.JOINT
    return None


class StoredWeights:
    """Weights in 8 bits, each computed once.

    A search makes dozens of graphs of one network; finding safe weights is most of what each costs.

    Args:
        scheme: How weights are stored.
    """

    def __init__(self, scheme: Scheme = WEIGHTS_INT8) -> None:
        self.scheme = scheme
        self._known: dict[object, tuple[Quantization, npt.NDArray[np.int8]]] = {}

    def __call__(
        self, weight: npt.NDArray[np.float32], axis: int, *, safe: bool
    ) -> tuple[Quantization, npt.NDArray[np.int8]]:
        """Scales and stored values of a weight.

        Args:
            weight: Of a layer.
            axis: Axis of its output channels.
            safe: No activations shall make its products saturate, see `calibration.pairs`.
        """
        content = hashlib.sha256(weight.tobytes()).digest()
        key = (content, weight.shape, axis, safe)
        if key not in self._known:
            self._known[key] = stored_weight(weight, axis, self.scheme, safe=safe)
        return self._known[key]


def stored_weight(
    weight: npt.NDArray[np.float32], axis: int, scheme: Scheme, *, safe: bool
) -> tuple[Quantization, npt.NDArray[np.int8]]:
    """Scales and stored values of a weight; see `StoredWeights`."""
    found = weight_quantization(weight, axis, scheme)
    return safe_weights(weight, found) if safe else (found, found.quantize(weight))


def stored_bias(
    bias: npt.NDArray[np.float32], activation: Quantization, weight: Quantization
) -> tuple[Quantization, npt.NDArray[np.int32]]:
    """Scales and stored values of a bias: it is added where products are added up, in 32 bits."""
    scale = (activation.scale * weight.scale).astype(np.float32)
    steps = np.rint(bias.astype(np.float64) / scale)
    stored = np.clip(steps, _INT32.min, _INT32.max).astype(np.int32)
    return Quantization(Scheme(), scale, np.zeros(len(scale), np.int32), 0), stored


@dataclass(frozen=True)
class StoredLayer:
    """A layer in 8 bits, as a graph with pairs has it.

    Attributes:
        weight: Its weight in the float32 graph.
        weight_read: What it reads in its place: the dequantized form of the stored one.
        bias: Its bias in the float32 graph; empty for none.
        bias_read: What it reads in its place.
        activation: How its input is quantized.
        axis: Axis of the weight's output channels.
        safe: No activations shall make its products saturate, see `calibration.pairs`.
    """

    weight: str
    weight_read: str
    bias: str
    bias_read: str
    activation: Quantization
    axis: int
    safe: bool


@dataclass(frozen=True)
class Inserted:
    """A graph with some nodes in 8 bits, and what is stored in it.

    Attributes:
        model: The graph.
        layers: Its layers in 8 bits, in the order of the graph.
        scheme: How their weights are stored.
    """

    model: onnx.ModelProto
    layers: tuple[StoredLayer, ...]
    scheme: Scheme


def insert_pairs(
    source: onnx.ModelProto,
    ranges: Mapping[str, Range],
    chosen: Sequence[Candidate],
    safe: Collection[str] = frozenset(),
    weights: StoredWeights | None = None,
) -> onnx.ModelProto:
    """Make a graph with some nodes in 8 bits.

    Args:
        source: The float32 graph; left unchanged.
        ranges: Of the tensors that `activations` names.
        chosen: Which nodes, in the order of the graph.
        safe: Outputs of layers whose weights no activations shall make saturate, see
            `calibration.pairs`.
        weights: Those that other graphs of the same network had already, and now this one's too.
    """
    return insert(source, ranges, chosen, safe, weights).model


def insert(
    source: onnx.ModelProto,
    ranges: Mapping[str, Range],
    chosen: Sequence[Candidate],
    safe: Collection[str] = frozenset(),
    weights: StoredWeights | None = None,
) -> Inserted:
    """As `insert_pairs`, and say what is stored in the graph."""
    stored = weights or StoredWeights()
    insertion = _Insertion(source, ranges, chosen, safe, stored)
    model = insertion.run()
    return Inserted(model, tuple(insertion.layers), stored.scheme)


def activations(model: onnx.ModelProto) -> list[str]:
    """Tensors that may be quantized: all that candidates read and write, each once."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    names: dict[str, None] = {}
    for candidate in candidates_of(model):
        node = model.graph.node[candidate.index]
        names |= dict.fromkeys(
            n for n in (*node.input, *node.output) if n not in initializers | outputs
        )
    return list(names)


class _Insertion:
    """One graph in the making."""

    def __init__(
        self,
        source: onnx.ModelProto,
        ranges: Mapping[str, Range],
        chosen: Sequence[Candidate],
        safe: Collection[str],
        weights: StoredWeights,
    ) -> None:
        self.safe, self.weights = safe, weights
        self.layers: list[StoredLayer] = []
        self.model = onnx.ModelProto()
        self.model.CopyFrom(source)
        graph = self.model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
        self.chosen = {c.index: c.kind for c in chosen}
        self.outputs = {value.name for value in graph.output}
        nodes = list(graph.node)
        inputs = [n for i in self.chosen for n in nodes[i].input if n not in self.constants]
        results = [n for i in self.chosen for n in nodes[i].output if n not in self.outputs]
        self.written = set(results)
        self.parameters = {
            name: quantization(ranges[name], ACTIVATIONS_UINT8)
            for name in dict.fromkeys([*inputs, *results])
        }
        self._share_ranges(nodes)
        self.pairs = Pairs(graph)

    def _share_ranges(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """A join or a split moves 8-bit values only if the parts have the scale of the whole.

        What a Concat alone reads is rounded to its scale in any case: so it is from the beginning.
        """
        readers = Counter(name for node in nodes for name in dict.fromkeys(node.input))
        joints = [nodes[i] for i, kind in sorted(self.chosen.items()) if kind is Kind.JOINT]
        for node in reversed(joints):
            whole = self.parameters.get(node.output[0])
            if node.op_type == "Concat" and whole is not None:
                alone = (n for n in node.input if n in self.parameters and readers[n] == 1)
                self.parameters |= dict.fromkeys(set(alone) - self.outputs, whole)
        for node in joints:
            if node.op_type == "Split":
                whole = self.parameters[node.input[0]]
                self.parameters |= {n: whole for n in node.output if n in self.parameters}

    def run(self) -> onnx.ModelProto:
        graph = self.model.graph
        nodes: list[onnx.NodeProto] = []
        for value in graph.input:
            if value.name in self.parameters:
                nodes += self.pairs.pair(value.name, self.parameters[value.name])
        for index, node in enumerate(list(graph.node)):
            kind = self.chosen.get(index)
            if kind in _LAYERS:
                nodes += self._weights(node, kind)
            self._redirect(node, quantized=kind is not None)
            nodes.append(node)
            for name in node.output:
                if name in self.parameters:
                    nodes += self.pairs.pair(name, self.parameters[name])
        del graph.node[:]
        graph.node.extend(nodes)
        self._drop_unused()
        return self.model

    def _redirect(self, node: onnx.NodeProto, *, quantized: bool) -> None:
        """Let a node read the dequantized form of its inputs.

        Float nodes read it too where an 8-bit kernel writes the tensor: there is no other.
        """
        for place, name in enumerate(node.input):
            if name in self.parameters and (quantized or name in self.written):
                node.input[place] = dequantized(name)

    def _weights(self, node: onnx.NodeProto, kind: Kind) -> list[onnx.NodeProto]:
        """Store a layer's weight in 8 bits and its bias in 32; returns what reads them back."""
        axis = 0 if kind is not Kind.LINEAR or attribute(node, "transB", 0) else 1
        source = node.input[1]
        safe = kind is not Kind.DEPTHWISE and node.output[0] in self.safe
        found, stored = self.weights(self.constants[source], axis, safe=safe)
        # A weight can be read by several layers; its bias scale depends on the activation.
        name = f"{source}_of_{node.output[0]}"
        made = [self._constant(name, stored, found)]
        activation = self.parameters[node.input[0]]
        bias, bias_read = "", ""
        if len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
            bias_read = f"{bias}_of_{node.output[0]}"
            of_bias, offset = stored_bias(self.constants[bias], activation, found)
            made.append(self._constant(bias_read, offset, of_bias))
            node.input[2] = bias_read = dequantized(bias_read)
        node.input[1] = dequantized(name)
        layer = StoredLayer(source, node.input[1], bias, bias_read, activation, axis, safe)
        self.layers.append(layer)
        return made

    def _constant(
        self, name: str, stored: npt.NDArray[np.generic], found: Quantization
    ) -> onnx.NodeProto:
        node = self.pairs.dequantize(name, f"{name}_stored", found)
        self.pairs.store(f"{name}_stored", stored)
        return node

    def _drop_unused(self) -> None:
        graph = self.model.graph
        read = {name for node in graph.node for name in node.input} | self.outputs
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
