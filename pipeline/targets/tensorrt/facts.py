"""What the network inside an engine consists of.

An engine tells nothing about itself without a GPU, and on one the kernels have been fused. These
facts are of the network as the builder gets it: layers and the types that they compute in. Memory
is what the builder says of the engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


_SAID = {
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activations_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
}


def memory(log: Sequence[str]) -> dict[str, int]:
    """What the engine needs on the GPU, as its builder says; activations at the largest batch.

    Args:
        log: Lines that the builder wrote. There is no other place where it tells.

    Returns:
        `weights_bytes` and `activations_bytes`, without those of which nothing was said.
    """
    found = ((name, pattern.search("\n".join(log))) for name, pattern in _SAID.items())
    return {name: int(match.group(1)) for name, match in found if match}
