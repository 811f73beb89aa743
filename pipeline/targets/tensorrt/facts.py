"""What the network inside an engine consists of.

An engine tells nothing about itself without a GPU, and on one the kernels have been fused. These
facts are of the network as the builder gets it: layers, the types that they compute in, and memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BITS = {
    "FLOAT": 32,
    "HALF": 16,
    "BF16": 16,
    "FP8": 8,
    "INT8": 8,
    "UINT8": 8,
    "BOOL": 8,
    "INT4": 4,
    "FP4": 4,
    "INT32": 32,
    "INT64": 64,
}

_WEIGHT_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    10: "float16",
    16: "bfloat16",
    17: "float8",
}
"""ONNX's numbers of types that weights have here."""


@dataclass(frozen=True)
class Layer:
    """A layer of the network.

    Attributes:
        name: Its name, which begins with that of the ONNX node.
        kind: TensorRT's kind of layer, such as "CONVOLUTION".
        precision: Type of its first output, such as "HALF".
        shape: Shape of its first output; -1 is the batch.
    """

    name: str
    kind: str
    precision: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "precision": self.precision,
            "shape": list(self.shape),
        }


def layers_of(network: Any) -> list[Layer]:
    """All layers of a network, in order."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return [_layer(layer) for layer in layers]


def _layer(layer: Any) -> Layer:
    output = layer.get_output(0) if layer.num_outputs else None
    return Layer(
        layer.name,
        layer.type.name,
        output.dtype.name if output is not None else "",
        _shape(output) if output is not None else (),
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except ValueError:  # what the bindings raise for a rank that is not known
        return ()


def summary(layers: list[Layer]) -> dict[str, Any]:
    """Numbers of layers, by kind and by type, without those that only arrange data."""
    arranging = {"CONSTANT", "SHUFFLE", "SHAPE", "IDENTITY"}
    computing = [layer for layer in layers if layer.kind not in arranging]
    return {
        "layers": len(layers),
        "computing": len(computing),
        "by_kind": dict(Counter(layer.kind for layer in computing).most_common()),
        "by_precision": dict(Counter(layer.precision for layer in computing).most_common()),
    }


def weight_bytes(graph: bytes) -> dict[str, int]:
    """Bytes of the graph's weights, by type.

    Args:
        graph: An ONNX model that holds its weights.
    """
    import onnx
    from onnx import numpy_helper

    sizes: Counter[str] = Counter()
    for tensor in onnx.load_from_string(graph).graph.initializer:
        name = _WEIGHT_TYPES.get(tensor.data_type, f"type {tensor.data_type}")
        sizes[name] += numpy_helper.to_array(tensor).nbytes
    return dict(sizes.most_common())


def activation_bytes(network: Any, batch: int) -> int:
    """Memory for activations if every layer ran by itself, in order.

    An upper bound for the engine, which fuses layers and so never writes many of these tensors.

    Args:
        network: The network.
        batch: What a free dimension stands for.

    Returns:
        Bytes of the largest set of tensors that are alive at the same time.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    last: dict[str, int] = {}
    for i, layer in enumerate(layers):
        for tensor in _inputs(layer):
            last[tensor.name] = i
    alive = {port.name: _bytes(port, batch) for port in _ports(network)}
    largest = sum(alive.values())
    for i, layer in enumerate(layers):
        if layer.type.name == "CONSTANT":
            continue
        alive |= {t.name: _bytes(t, batch) for t in _outputs(layer)}
        largest = max(largest, sum(alive.values()))
        for tensor in _inputs(layer):
            if last[tensor.name] == i:
                alive.pop(tensor.name, None)
    return largest


def _ports(network: Any) -> Iterator[Any]:
    return (network.get_input(i) for i in range(network.num_inputs))


def _inputs(layer: Any) -> list[Any]:
    found = (layer.get_input(i) for i in range(layer.num_inputs))
    return [tensor for tensor in found if tensor is not None]


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(i) for i in range(layer.num_outputs)]


def _bytes(tensor: Any, batch: int) -> int:
    size = 1
    for extent in _shape(tensor):
        size *= batch if extent < 0 else extent
    return size * _BITS.get(tensor.dtype.name, 32) // 8
