"""What the network inside an engine consists of.

An engine tells nothing about itself without a GPU, and on one the kernels have been fused. These
facts are of the network as the builder gets it: layers and the types that they compute in. Memory
is what the builder says of the engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
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


def summary(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of layers, by kind and by type, without those that only arrange data.

    Args:
        layers: The layers, as the builder lists them.
    """
    arranging = {"CONSTANT", "SHUFFLE", "SHAPE", "IDENTITY"}
    computing = [layer for layer in layers if layer["kind"] not in arranging]
    return {
        "layers": len(layers),
        "computing": len(computing),
        "by_kind": dict(Counter(layer["kind"] for layer in computing).most_common()),
        "by_precision": dict(Counter(layer["precision"] for layer in computing).most_common()),
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
