"""GELU within 8 bits, for ONNX Runtime: x * sigmoid(slope * x), from tables and 8-bit products.

Between two 8-bit layers a GELU takes three kernels in float: back from 8 bits, the function, and to
8 bits again, about a third of a network's time on a CPU without AVX-512. ONNX Runtime has no 8-bit
GELU, but an 8-bit sigmoid, which is a table of 256 entries whose scale may carry any slope, and an
8-bit product. GELU(x) is x * sigmoid(1.702 * x) to within 0.021 (Hendrycks and Gimpel, 2016,
arXiv:1606.08415). What the graph holds are standard operators between quantize/dequantize pairs:

    x8 -> DequantizeLinear (scale times slope) -> Sigmoid -> QuantizeLinear, DequantizeLinear -> Mul
    x8 -> DequantizeLinear (scale times gain)  ------------------------------------------------> Mul

so that every runtime and the executor take it. An input has only 256 values: for each layer, slope,
gain and a shift of the sigmoid's zero point are those with the smallest squared error over what
calibration saw, all rounding included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from calibration.histogram import Floats, Histogram
from calibration.ranges import ACTIVATIONS_UINT8, Quantization, Range, best_range
from calibration.squares import SquaredErrors
from pipeline.core.plain import Plain

Doubles = npt.NDArray[np.float64]

LEVELS = 256
SIGMOID_SCALE = np.float32(1 / 255)
"""One is stored as 255: large inputs pass unchanged."""

SLOPES = np.arange(1.50, 2.001, 0.02)
GAINS = np.arange(0.97, 1.0301, 0.005)
SHIFTS = tuple(range(-3, 4))

_ENDS = np.linspace(1, 1 / 12, 24)
"""Shares of what was seen at which the range of a GELU's input may end, on either side."""


@dataclass(frozen=True)
class GeluFit(Plain):
    """How one GELU is computed in 8 bits.

    Attributes:
        slope: Factor of the input inside of the sigmoid.
        gain: Factor of the product.
        shift: Added to the zero point of the sigmoid's input.
        error: Root of the mean squared error over what was seen, in steps of the output.
        exact_error: The same of the exact function, rounded to 8 bits.
    """

    slope: float
    gain: float
    shift: int
    error: float
    exact_error: float

    @property
    def excess(self) -> float:
        """Mean squared error beyond that of rounding, in squared steps of the output."""
        return self.error**2 - self.exact_error**2


def gelu(x: Floats) -> Doubles:
    """The exact function, by erf."""
    import torch  # numpy has no erf

    found: Doubles = torch.nn.functional.gelu(torch.from_numpy(np.asarray(x, np.float64))).numpy()
    return found


def levels(histogram: Histogram, found: Quantization) -> Doubles:
    """How often each stored value comes, (256,)."""
    used = np.flatnonzero(histogram.counts)
    stored = found.quantize(histogram.centres[used])
    counts: Doubles = np.bincount(stored, histogram.counts[used], LEVELS).astype(np.float64)
    return counts


def fit(counts: Doubles, source: Quantization, result: Quantization) -> GeluFit:
    """Find slope, gain and shift of one GELU.

    Args:
        counts: How often each stored input comes, (256,).
        source: How the input is stored: uint8, one scale.
        result: How the output is stored, likewise.
    """
    zero = int(source.zero_point)
    x = (np.arange(LEVELS) - zero) * float(source.scale)
    wanted = gelu(x)
    total = max(float(counts.sum()), 1.0)
    exact = _stored(wanted, result)
    step = float(result.scale)

    def errors(values: Doubles) -> Doubles:
        found: Doubles = np.sqrt((counts * ((values - wanted) / step) ** 2).sum(-1) / total)
        return found

    best = GeluFit(1.702, 1.0, 0, np.inf, float(errors(exact)))
    gained = x * GAINS[:, None]
    for slope, shift in itertools.product(SLOPES, SHIFTS):
        if not 0 <= zero + shift < LEVELS:
            continue
        share = sigmoid_levels(slope, shift, source) / 255
        found = errors(_stored(gained * share, result))
        least = int(found.argmin())
        if found[least] < best.error:
            gain, error = float(GAINS[least]), float(found[least])
            best = GeluFit(float(slope), gain, int(shift), error, best.exact_error)
    return best


def input_ranges(model: onnx.ModelProto, histograms: Mapping[str, Histogram]) -> dict[str, Range]:
    """Ranges for tensors that only a GELU reads: what counts is the error behind it.

    Far below zero all inputs give nothing: without that part, the steps of the rest are finer.

    Args:
        model: The float32 graph.
        histograms: What calibration saw, by tensor.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    return {
        name: input_range(histogram)
        for name, histogram in histograms.items()
        if name not in outputs
        and (after := readers.get(name, []))
        and all(node.op_type == "Gelu" and not _is_tanh(node) for node in after)
    }


def input_range(histogram: Histogram) -> Range:
    """The range of a GELU's input with the smallest squared error of its output."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = np.array(list(itertools.product(_ENDS, _ENDS)))
    return best_range(SquaredErrors(histogram, gelu), ACTIVATIONS_UINT8, shares * [low, high])


def sigmoid_levels(slope: float, shift: int, source: Quantization) -> Doubles:
    """The table of the 8-bit sigmoid: what each stored input becomes, (256,)."""
    moved = (np.arange(LEVELS) - int(source.zero_point) - shift) * float(source.scale) * slope
    with np.errstate(over="ignore"):  # far below zero: the sigmoid of it is 0
        table: Doubles = np.rint(255 / (1 + np.exp(-moved)))
    return table


def _stored(values: Doubles, found: Quantization) -> Doubles:
    """Values as they are after storing them."""
    steps = np.rint(values / float(found.scale)) + int(found.zero_point)
    stored: Doubles = (np.clip(steps, 0, LEVELS - 1) - int(found.zero_point)) * float(found.scale)
    return stored


def gelus_of(model: onnx.ModelProto) -> list[str]:
    """Outputs of the GELUs that lie between two 8-bit tensors, in the order of the graph."""
    return [place.node.output[0] for place in _places(model)]


def replace_gelus(model: onnx.ModelProto, fits: Mapping[str, GeluFit]) -> onnx.ModelProto:
    """Compute GELUs in 8 bits.

    Args:
        model: A graph with quantize/dequantize pairs; left unchanged.
        fits: By name of the GELU's output; the others stay as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for place in _places(made):
        found = fits.get(place.node.output[0])
        if found:
            _replace(made, place, found)
    return made


def fit_gelus(model: onnx.ModelProto, histograms: Mapping[str, Histogram]) -> dict[str, GeluFit]:
    """Fit every GELU that lies between two 8-bit tensors.

    Args:
        model: A graph with quantize/dequantize pairs.
        histograms: What calibration saw of the float tensors, by name.

    Returns:
        By name of the GELU's output.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in reversed(model.graph.node) for name in node.input}
    fits = {}
    for place in _places(model):
        before, after = makers[place.source.input[0]], readers[place.node.output[0]]
        histogram = histograms.get(before.input[0]) if before.op_type == "QuantizeLinear" else None
        if histogram is None:
            continue
        source, result = (
            Quantization(ACTIVATIONS_UINT8, constants[node.input[1]], constants[node.input[2]])
            for node in (place.source, after)
        )
        fits[place.node.output[0]] = fit(levels(histogram, source), source, result)
    return fits


@dataclass(frozen=True)
class _Place:
    """A GELU that reads an 8-bit tensor: its node, and the node that dequantizes its input."""

    node: onnx.NodeProto
    source: onnx.NodeProto


def _places(model: onnx.ModelProto) -> list[_Place]:
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    found = []
    for node in graph.node:
        source = makers.get(node.input[0]) if node.op_type == "Gelu" else None
        if source is None or source.op_type != "DequantizeLinear" or _is_tanh(node):
            continue
        after = readers.get(node.output[0], [])
        stays = any(reader.op_type != "QuantizeLinear" for reader in after)
        if after and not stays and node.output[0] not in outputs:
            found.append(_Place(node, source))
    return found


def _is_tanh(node: onnx.NodeProto) -> bool:
    return any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)


def _replace(model: onnx.ModelProto, place: _Place, found: GeluFit) -> None:
    graph = model.graph
    output, (stored, scale_name, zero_name) = place.node.output[0], place.source.input
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scale, zero = (numpy_helper.to_array(constants[name]) for name in (scale_name, zero_name))

    def store(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{output}_{name}"))
        return f"{output}_{name}"

    def node(kind: str, inputs: list[str], result: str) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{output}_{result}"], f"{result}_{output}")

    steep = store("slope_scale", np.float32(scale * np.float32(found.slope)))
    moved = store("slope_zero_point", np.uint8(int(zero) + found.shift))
    gained = store("gain_scale", np.float32(scale * np.float32(found.gain)))
    unit = store("sigmoid_scale", SIGMOID_SCALE)
    none = store("sigmoid_zero_point", np.uint8(0))
    chain = [
        node("DequantizeLinear", [stored, steep, moved], "steep"),
        node("Sigmoid", [f"{output}_steep"], "sigmoid"),
        node("QuantizeLinear", [f"{output}_sigmoid", unit, none], "sigmoid_uint8"),
        node("DequantizeLinear", [f"{output}_sigmoid_uint8", unit, none], "share"),
        node("DequantizeLinear", [stored, gained, zero_name], "gained"),
        helper.make_node(
            "Mul", [f"{output}_gained", f"{output}_share"], [output], f"gelu_{output}"
        ),
    ]
    # A module's name that the exporter noted says to which block a node belongs.
    for made in chain:
        made.metadata_props.extend(place.node.metadata_props)
    index = next(i for i, each in enumerate(graph.node) if each.output[0] == output)
    nodes = list(graph.node)
    nodes[index : index + 1] = chain
    if sum(place.node.input[0] in each.input for each in nodes) == 0:
        nodes = [each for each in nodes if place.node.input[0] not in each.output]
    del graph.node[:]
    graph.node.extend(nodes)
