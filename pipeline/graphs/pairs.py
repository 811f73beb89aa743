"""The quantize and dequantize nodes of a graph in the making, and the constants that they read.

Runtimes want pairs at different places: `qdq` puts them for TensorRT, `qdq_ort` for ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

    from calibration.ranges import Quantization


def dequantized(name: str) -> str:
    """Name of a tensor's form that was quantized and is dequantized."""
    return f"{name}_dequantized"


class Pairs:
    """Makes nodes for a graph and adds their constants to it, each once.

    Args:
        graph: Takes the constants; where the nodes go is for the caller to decide.
    """

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._added: set[str] = set()

    def store(self, name: str, array: npt.NDArray[Any]) -> None:
        """Add a constant, if it is not there yet."""
        if name not in self._added:
            self._added.add(name)
            self._graph.initializer.append(numpy_helper.from_array(array, name))

    def pair(self, name: str, found: Quantization) -> list[NodeProto]:
        """Quantize a tensor and dequantize it again: makes `dequantized(name)`."""
        scale, zero = self._parameters(name, found)
        stored = f"{name}_{found.scheme.dtype}"
        return [
            helper.make_node("QuantizeLinear", [name, scale, zero], [stored], f"quantize_{name}"),
            self.dequantize(name, stored, found),
        ]

    def dequantize(self, name: str, stored: str, found: Quantization) -> NodeProto:
        """Dequantize what is stored in few bits: makes `dequantized(name)`.

        Args:
            name: Of the tensor.
            stored: Of its form in few bits.
            found: How it is quantized.
        """
        scale, zero = self._parameters(name, found)
        return helper.make_node(
            "DequantizeLinear",
            [stored, scale, zero],
            [dequantized(name)],
            f"dequantize_{name}",
            axis=found.axis,  # None is left out
        )

    def _parameters(self, name: str, found: Quantization) -> tuple[str, str]:
        """Names of the constants of scale and zero point.

        TensorRT wants zero points to be zero, and they also tell ONNX the stored type.
        """
        scale, zero = f"{name}_scale", f"{name}_zero_point"
        self.store(scale, found.scale)
        self.store(zero, found.zero_point)
        return scale, zero
