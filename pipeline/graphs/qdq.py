"""Inserts quantize/dequantize pairs into a float32 graph and rewrites the rest in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from calibration.ranges import Quantization, Range, Scheme, quantization, weight_quantization
from pipeline.core.errors import BuildError
from pipeline.emulate.onnx.graph import load_graph
from pipeline.graphs import float16
from pipeline.graphs.links import attribute
from pipeline.graphs.pairs import Pairs, dequantized

SMALLEST_SCALE = float16.FLOAT16.smallest_normal
"""Below it a float16 scale loses bits, and hardware may take it for zero."""


Convert = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, float16.HalfFacts]]
"""Gives the nodes of a float32 graph other types."""


@dataclass(frozen=True)
class Layer:
    """A node with weights that can be quantized.

    Attributes:
        node: Index of the node.
        name: Its name.
        activation: The tensor that it reads.
        weight: The initializer that it reads.
        axis: Axis of the weight's output channels.
        block: Block of the network that it belongs to.
        groups: Groups of a convolution: as many as channels in a depthwise one.
        channels: Its input or its output channels, whichever are fewer.
    """

    node: int
    name: str
    activation: str
    weight: str
    axis: int
    block: str
    groups: int
    channels: int


def _in_float16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, float16.HalfFacts]:
    return float16.to_half(model, float16.FLOAT16)


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """Convolutions and matrix products with constant weights, in the order of the graph."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    blocks = {node.name: node.block for node in load_graph(model).nodes}
    layers = []
    for i, node in enumerate(model.graph.node):
        axis = _channel_axis(node, weights)
        if axis is None:
            continue
        name = node.name or node.output[0]
        activation, weight, *_ = node.input
        groups = attribute(node, "group", 1)
        outputs, inputs = weights[weight][axis], weights[weight][1 - axis] * groups
        layers.append(
            Layer(
                node=i,
                name=name,
                activation=activation,
                weight=weight,
                axis=axis,
                block=blocks.get(name) or "network",
                groups=groups,
                channels=min(outputs, inputs),
            )
        )
    return layers


def activations(layers: Sequence[Layer]) -> list[str]:
    """Tensors that layers read, each once."""
    return list(dict.fromkeys(layer.activation for layer in layers))


def _channel_axis(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> int | None:
    """Axis of the output channels of a node's weight; None if it has none to quantize."""
    if len(node.input) < 2 or node.input[1] not in weights or node.input[0] in weights:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    if node.op_type == "MatMul" and len(weights[node.input[1]]) == 2:
        return 1
    return None


class Quantizer:
    """Makes 8-bit graphs with some blocks left in float16.

    Args:
        source: The float32 graph.
        layers: What can be quantized.
        ranges: Ranges of the activations.
        activation_scheme: How activations are stored.
        weight_scheme: How weights are stored.
        convert: Gives what is not quantized its types; default: all float16.

    Attributes:
        blocks: The blocks that hold layers, in the order of the graph.
    """

    def __init__(
        self,
        source: onnx.ModelProto,
        layers: Sequence[Layer],
        ranges: Mapping[str, Range],
        activation_scheme: Scheme,
        weight_scheme: Scheme,
        convert: Convert | None = None,
    ) -> None:
        self._convert = convert or _in_float16
        self.blocks = list(dict.fromkeys(layer.block for layer in layers))
        self._source, self._layers, self._ranges = source, layers, ranges
        self._schemes = activation_scheme, weight_scheme
        initializers = {tensor.name: tensor for tensor in source.graph.initializer}
        self._weights = {
            layer.weight: _halved(
                weight_quantization(
                    numpy_helper.to_array(initializers[layer.weight]), layer.axis, weight_scheme
                )
            )
            for layer in layers
        }
        self._initializers = initializers

    def build(self, excluded: frozenset[str]) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """Make the graph.

        Args:
            excluded: Blocks that stay in float16.

        Returns:
            The model, checked, and facts about it.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._source)
        chosen = {layer.node: layer for layer in self._layers if layer.block not in excluded}
        nodes: list[onnx.NodeProto] = []
        pairs, done = Pairs(model.graph), set[str]()
        for i, node in enumerate(model.graph.node):
            if i in chosen:
                nodes += self._quantize(node, chosen[i], pairs, done)
            nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        converted, facts = self._convert(model)
        return converted, {
            **facts.to_dict(),
            "quantized_layers": len(chosen),
            "float16_layers": [x.name for x in self._layers if x.node not in chosen],
            "coarse_channels": sum(
                int((self._weights[x.weight].scale <= SMALLEST_SCALE).sum())
                for x in chosen.values()
            ),
        }

    def _quantize(
        self, node: onnx.NodeProto, layer: Layer, pairs: Pairs, done: set[str]
    ) -> list[onnx.NodeProto]:
        """Let a node read the dequantized forms of its activation and its weight.

        Args:
            node: Is changed.
            layer: What is known of it.
            pairs: Of its graph.
            done: Tensors that have such a form already; those that get one are added.

        Returns:
            What makes these forms.
        """
        made: list[onnx.NodeProto] = []
        if layer.activation not in done:
            found = _halved(quantization(self._ranges[layer.activation], self._schemes[0]))
            made += pairs.pair(layer.activation, found)
        if layer.weight not in done:
            found = self._weights[layer.weight]
            values = numpy_helper.to_array(self._initializers[layer.weight])
            stored = f"{layer.weight}_{found.scheme.dtype}"
            pairs.store(stored, found.quantize(values))
            made.append(pairs.dequantize(layer.weight, stored, found))
        done |= {layer.activation, layer.weight}
        node.input[0], node.input[1] = dequantized(layer.activation), dequantized(layer.weight)
        return made


def _halved(found: Quantization) -> Quantization:
    """The same with scales that float16 holds exactly."""
    scale = np.maximum(found.scale.astype(np.float16), np.float16(SMALLEST_SCALE))
    if not np.isfinite(scale).all():
        raise BuildError(
            f"a quantization scale of {found.scale.max():.3g} lies beyond float16: the network's "
            "activations are too large for an 8-bit form; build fp32 or bf16"
        )
    return replace(found, scale=scale.astype(np.float32))
