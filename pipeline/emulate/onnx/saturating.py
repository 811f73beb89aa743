"""Executes 8-bit layers as ONNX Runtime's kernels for x86 do, with or without VNNI.

A CPU without VNNI multiplies unsigned activations by signed weights two at a time and adds both
products in 16 bits, with saturation (MLAS: MlasConvSymKernelAvx2, MlasConvSymKernelAvx512Core,
MlasGemmU8S8KernelAvx2 and Avx512Core, by vpmaddubsw, vpmaddwd and vpaddd). Which two: neighbours in
the order (position of the kernel, input channel); see `calibration.pairs`, which stores weights so
that no two can saturate. Depthwise convolutions (MlasConvSymDepthwiseKernelAvx2,
MlasConvDepthwiseKernelAvx2), products of two unsigned factors and everything else are exact.

Sums become 8 bits as in the kernels: sum and bias as float32, times one float32 factor, rounded to
even. What stays in float32 between 8-bit tensors runs in ONNX Runtime's own kernels, one node at a
time, where it is installed: another exponential differs in the last bit, which now and then makes
another step of 8 bits. All else runs as in `GraphExecutor`.

    >>> executor = SaturatingExecutor(Path("engines/care_tiny/ort/int8/model.onnx"))
    >>> logits = executor.run_all(images)
    >>> executor.saturation()["conv2d_5"].share
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.emulate.onnx.plan import MOVERS, Step

LOWEST, HIGHEST = -32768, 32767
"""What 16 bits hold."""

LARGEST = 255

_EXACT = 2**24
"""Integers up to here are exact in float32."""

FLOAT_KERNELS = frozenset(
    {"Exp", "Gelu", "Sigmoid", "Erf", "Tanh", "Softmax", "MatMul", "Gemm", "Conv", "Div"}
    | {"ReduceSum", "ReduceMean", "LayerNormalization"}
)
"""Operators whose last bit depends on who computes them."""

_CHUNK = 1 << 24
"""Products of pairs that are held at a time."""


@dataclass(frozen=True)
class Saturation:
    """What became of the pairs of products of one layer.

    Attributes:
        layer: Name of its output.
        pairs: Pairs that were multiplied.
        saturated: Those of them that saturated.
        largest: Largest magnitude of a pair's sum.
        lost: Sum of the squares of what saturation took from the layer's sums.
        exact: Sum of the squares of these sums without saturation.
    """

    layer: str
    pairs: int = 0
    saturated: int = 0
    largest: int = 0
    lost: float = 0.0
    exact: float = 0.0

    @property
    def share(self) -> float:
        """Share of the pairs that saturated."""
        return self.saturated / self.pairs if self.pairs else 0.0

    @property
    def error(self) -> float:
        """Relative error of the layer's sums, before what is added to them: by saturation alone."""
        return (self.lost / self.exact) ** 0.5 if self.exact else 0.0

    def with_more(self, other: Saturation) -> Saturation:
        """The same after further images."""
        return Saturation(
            self.layer,
            self.pairs + other.pairs,
            self.saturated + other.saturated,
            max(self.largest, other.largest),
            self.lost + other.lost,
            self.exact + other.exact,
        )


@dataclass(frozen=True)
class _Stored:
    """How a tensor is stored in 8 bits: one scale and zero point."""

    scale: np.float32
    zero: int


@dataclass(frozen=True)
class _Layer:
    """A layer that ONNX Runtime runs in 8 bits.

    Attributes:
        weight: Stored weight as integers, output channels first.
        factors: Scale of the sums, (output channels,), in steps of the output where it has 8 bits.
        bias: Stored bias as integers, (output channels,).
        source: How the input is stored.
        result: How the output is stored; None where it stays float32.
    """

    weight: Tensor
    factors: Tensor
    bias: Tensor
    source: _Stored
    result: _Stored | None


class SaturatingExecutor(OnnxExecutor):
    """Runs a graph with quantize/dequantize pairs as ONNX Runtime does on x86.

    Args:
        model: An ONNX file, or a model in memory.
        vnni: The CPU adds products of 8 bits in 32: nothing saturates.

    Raises:
        ArtifactError: The model cannot be read.
        UnsupportedOperatorError: A node that the executor does not know.
    """

    _plain = False

    def __init__(self, model: Path | onnx.ModelProto, *, vnni: bool = False) -> None:
        self._vnni = vnni
        self._layers: dict[str, _Layer] = {}
        self._stored_pairs: dict[str, _Pair] = {}
        self._factors: dict[str, tuple[_Stored, _Stored]] = {}
        self._kernels: _Kernels | None = None
        self._seen: dict[str, Saturation] = {}
        super().__init__(model)
        read = onnx.load(model) if isinstance(model, Path) else model
        self._layers |= _layers(read)
        self._stored_pairs |= _pairs(read)
        self._factors |= _factors(read)
        self._kernels = _Kernels(read)

    def saturation(self) -> dict[str, Saturation]:
        """By output of the layer, what became of its pairs so far; only layers that have any."""
        return dict(self._seen)

    def _execute(self, step: Step, values: dict[str, Tensor]) -> None:
        output = step.node.outputs[0]
        layer = self._layers.get(output)
        if layer is not None:
            values[output] = self._run(step, layer, values[step.node.inputs[0]])
        elif output in self._stored_pairs:
            left, right = (values[name] for name in step.node.inputs)
            values[output] = self._stored_pairs[output].run(left, right)
        elif output in self._factors:
            left, right = (values[name] for name in step.node.inputs)
            values[output] = _multiply(left, right, *self._factors[output])
        elif self._kernels is not None and self._kernels.runs(step):
            inputs = [values[name] if name else None for name in step.node.inputs]
            values[output] = self._kernels.run(step, inputs)
        else:
            super()._execute(step, values)

    def _run(self, step: Step, layer: _Layer, dequantized: Tensor) -> Tensor:
        # What the layer reads has been dequantized: its steps are whole numbers again.
        stored = torch.round(dequantized / float(layer.source.scale)) + layer.source.zero
        if step.node.op_type == "Gemm":
            sums = self._sums(step.node.outputs[0], layer.weight, stored.T)
            shape: tuple[int, ...] = (len(stored), -1)
            sums = sums.T
        else:
            sums, shape = self._convolve(step, layer, stored)
        offset = layer.weight.flatten(1).double().sum(1) * layer.source.zero
        axis = (1, -1) + (1,) * (len(shape) - 2)
        total = sums.reshape(shape) + (layer.bias - offset).reshape(axis)
        scaled = total.float() * layer.factors.reshape(axis)
        if layer.result is None:
            return scaled
        low, high = -layer.result.zero, LARGEST - layer.result.zero
        return torch.round(scaled.clamp(low, high)) * float(layer.result.scale)

    def _convolve(
        self, step: Step, layer: _Layer, stored: Tensor
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Sums of products, and their shape."""
        node, weight = step.node, layer.weight
        top, left, bottom, right = node.attribute("pads", [0, 0, 0, 0])
        padded = torch.nn.functional.pad(
            stored, (left, right, top, bottom), value=float(layer.source.zero)
        )
        stride = tuple(node.attribute("strides", [1, 1]))
        dilation = tuple(node.attribute("dilations", [1, 1]))
        groups = int(node.attribute("group", 1))
        if groups > 1 and weight.shape[1] == 1 and len(weight) == groups:
            sums = torch.nn.functional.conv2d(
                padded.double(), weight.double(), None, stride, 0, dilation, groups
            )
            return sums, tuple(sums.shape)
        kernel = tuple(weight.shape[2:])
        sides = [
            (padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        ]
        parts = []
        for part, own in zip(padded.chunk(groups, 1), weight.chunk(groups), strict=True):
            columns = torch.nn.functional.unfold(part, kernel, dilation, 0, stride)
            # From (channel, position) to MLAS's order (position, channel).
            columns = columns.unflatten(1, (part.shape[1], -1)).transpose(1, 2).flatten(1, 2)
            flat = columns.permute(1, 0, 2).flatten(1)
            ordered = own.permute(0, 2, 3, 1).flatten(1)
            sums = self._sums(node.outputs[0], ordered, flat)
            parts.append(sums.unflatten(1, (len(stored), -1)).transpose(0, 1))
        joined = torch.cat(parts, 1)
        return joined, (len(stored), len(weight), *sides)

    def _sums(self, name: str, weight: Tensor, columns: Tensor) -> Tensor:
        """Products of (outputs, depth) and (depth, places), with saturated pairs."""
        narrow = weight.shape[1] * LARGEST * 128 < _EXACT
        dtype = torch.float32 if narrow else torch.float64
        sums = (weight.to(dtype) @ columns.to(dtype)).double()
        if self._vnni:
            return sums
        if weight.shape[1] % 2:
            weight = torch.nn.functional.pad(weight, (0, 1))
            columns = torch.nn.functional.pad(columns, (0, 0, 0, 1))
        pairs = weight.float().unflatten(1, (-1, 2))
        saturated, largest, change = 0, 0.0, torch.zeros_like(sums)
        for outputs, places in _in_doubt(pairs, columns.shape[1]):
            first, second = (
                pairs[outputs, places, i, None] * columns[2 * places + i].float() for i in (0, 1)
            )
            both = first + second
            over = both.clamp(LOWEST, HIGHEST) - both
            saturated += int((over != 0).sum())
            largest = max(largest, float(both.abs().max()))
            change.index_add_(0, outputs, over.double())
        count = pairs.shape[0] * pairs.shape[1] * columns.shape[1]
        lost, exact = (float(values.square().sum()) for values in (change, sums))
        more = Saturation(name, count, saturated, int(largest), lost, exact)
        self._seen[name] = self._seen.get(name, Saturation(name)).with_more(more)
        return sums + change


def _in_doubt(pairs: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and places of the pairs that some activations would saturate, in chunks."""
    highest = pairs.clamp(min=0).sum(2) * LARGEST
    lowest = pairs.clamp(max=0).sum(2) * LARGEST
    found = torch.nonzero((highest > HIGHEST) | (lowest < LOWEST))
    for chunk in found.split(max(1, _CHUNK // max(1, width))):
        if len(chunk):
            yield chunk[:, 0], chunk[:, 1]


@dataclass(frozen=True)
class _Pair:
    """A product or a sum of two 8-bit tensors that is stored in 8 bits again."""

    kind: str
    left: _Stored
    right: _Stored
    result: _Stored

    def run(self, left: Tensor, right: Tensor) -> Tensor:
        first = torch.round(left / float(self.left.scale))
        second = torch.round(right / float(self.right.scale))
        steps = self._product(first, second) if self.kind == "Mul" else self._sum(first, second)
        limited = torch.round(steps).clamp(0, LARGEST)
        return (limited - self.result.zero) * float(self.result.scale)

    def _product(self, first: Tensor, second: Tensor) -> Tensor:
        """As MlasQLinearMul: the whole product, times one factor."""
        ratio = float(self.left.scale * self.right.scale / self.result.scale)
        return first * second * ratio + float(self.result.zero)

    def _sum(self, first: Tensor, second: Tensor) -> Tensor:
        """As MlasQLinearAdd: stored values, times a factor each, plus what is constant.

        The kernel rounds once for each multiply-add, also in what is constant, where its compiler
        makes one of the first product; float64 holds the products in full.
        """
        one = self.left.scale / self.result.scale
        other = self.right.scale / self.result.scale
        second_zero = np.float32(other * np.float32(self.right.zero))
        both_zeros = np.float32(float(one) * self.left.zero + float(second_zero))
        fixed = np.float32(self.result.zero) - both_zeros
        moved = (second + self.right.zero).double() * float(other) + float(fixed)
        return ((first + self.left.zero).double() * float(one) + moved.float().double()).float()


def _multiply(left: Tensor, right: Tensor, first: _Stored, second: _Stored) -> Tensor:
    """A matrix product of two unsigned tensors, as MatMulIntegerToFloat computes it."""
    whole = (
        torch.round(left / float(first.scale)).double()
        @ torch.round(right / float(second.scale)).double()
    )
    return whole.float() * float(np.float32(first.scale * second.scale))


class _Kernels:
    """ONNX Runtime's own kernels, one session for each node; none where it is not installed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._available = importlib.util.find_spec("onnxruntime") is not None
        self._model = model
        self._nodes = {node.output[0]: node for node in model.graph.node if node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        # Each with the operands that it turns itself.
        self._sessions: dict[str, tuple[Any, frozenset[str]]] = {}

    def runs(self, step: Step) -> bool:
        """Whether a step's operator is one that depends on who computes it."""
        known = step.node.op_type in FLOAT_KERNELS and step.dtypes[0] == torch.float32
        return self._available and known and len(step.node.outputs) == 1

    def run(self, step: Step, inputs: Sequence[Tensor | None]) -> Tensor:
        """The node's output."""
        output = step.node.outputs[0]
        if output not in self._sessions:
            self._sessions[output] = self._open(output)
        session, turned = self._sessions[output]
        feeds = {
            name: (value.mT if name in turned else value).contiguous().numpy()
            for name, value in zip(step.node.inputs, inputs, strict=True)
            if name and value is not None and name not in self._constants
        }
        return torch.from_numpy(session.run(None, feeds)[0])

    def _fused(self, output: str) -> list[onnx.NodeProto]:
        """Transpositions that the runtime makes part of a product, whose sums differ then.

        Those of 8-bit tensors it carries out before it dequantizes.
        """
        node, found = self._nodes[output], []
        for name in dict.fromkeys(node.input) if node.op_type == "MatMul" else ():
            maker = self._nodes.get(name)
            if maker is None or maker.op_type != "Transpose" or not maker.attribute:
                continue
            source, perm = self._nodes.get(maker.input[0]), list(maker.attribute[0].ints)
            turns = perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
            if turns and (source is None or source.op_type != "DequantizeLinear"):
                found.append(maker)
        return found

    def _open(self, output: str) -> tuple[Any, frozenset[str]]:
        import onnxruntime

        node, fused = self._nodes[output], self._fused(output)
        # Weights have to be constants: the blocked layout, which sums otherwise, takes no others.
        names = [name for name in dict.fromkeys(node.input) if name]
        stored = [self._constants[name] for name in names if name in self._constants]
        ports = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in names
            if name not in self._constants
        ]
        result = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        turned = {each.output[0]: f"{each.output[0]}_turned" for each in fused}
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        alone.input[:] = [turned.get(name, name) for name in node.input]
        before = [
            helper.make_node("Transpose", [name], [into], perm=each.attribute[0].ints)
            for each, (name, into) in zip(fused, turned.items(), strict=True)
        ]
        graph = helper.make_graph([*before, alone], "one", ports, [result], stored)
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session, frozenset(turned)


class _Reader:
    """Finds nodes between quantize/dequantize pairs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    def dequantized(self, name: str) -> onnx.NodeProto | None:
        maker = self.makers.get(name)
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def stored(self, node: onnx.NodeProto) -> _Stored | None:
        """Scale and zero point of an unsigned tensor with one of each."""
        scale, zero = (self.constants.get(name) for name in node.input[1:3])
        if scale is None or zero is None or scale.size != 1 or zero.dtype != np.uint8:
            return None
        return _Stored(np.float32(scale.item()), int(zero.item()))

    def activation(self, name: str) -> _Stored | None:
        node = self.dequantized(name)
        return None if node is None else self.stored(node)

    def before_moving(self, name: str) -> str:
        """The tensor whose values were only moved: the runtime moves 8 bits, not what they mean."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in MOVERS:
            name = maker.input[0]
            maker = self.makers.get(name)
        return name

    def result(self, name: str) -> _Stored | None:
        """How a tensor that is only quantized is stored."""
        after = self.readers.get(name, [])
        if name in self.outputs or len(after) != 1 or after[0].op_type != "QuantizeLinear":
            return None
        return self.stored(after[0])


def _layers(model: onnx.ModelProto) -> Iterator[tuple[str, _Layer]]:
    """Layers with 8-bit weights and inputs, by output."""
    reader = _Reader(model)
    for node in reader.nodes:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        source, weights = reader.activation(node.input[0]), reader.dequantized(node.input[1])
        if source is None or weights is None or weights.input[0] not in reader.constants:
            continue
        result = reader.result(node.output[0])
        if result is None and node.op_type == "Conv":
            continue  # an 8-bit convolution writes 8 bits; this one runs in float32
        weight = torch.from_numpy(reader.constants[weights.input[0]].astype(np.float32))
        if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
            weight = weight.T
        scale = reader.constants[weights.input[1]].astype(np.float32).reshape(-1)
        factors = (source.scale * scale).astype(np.float32)
        if result is not None:
            factors = (factors / result.scale).astype(np.float32)
        yield (
            node.output[0],
            _Layer(
                weight,
                torch.from_numpy(np.broadcast_to(factors, (len(weight),)).copy()),
                _bias(reader, node, len(weight)),
                source,
                result,
            ),
        )


def _bias(reader: _Reader, node: onnx.NodeProto, outputs: int) -> Tensor:
    if len(node.input) < 3 or not node.input[2]:
        return torch.zeros(outputs, dtype=torch.float64)
    maker = reader.dequantized(node.input[2])
    assert maker is not None, f"the bias of {node.output[0]} is not stored in integers"
    return torch.from_numpy(reader.constants[maker.input[0]].astype(np.float64))


def _pairs(model: onnx.ModelProto) -> Iterator[tuple[str, _Pair]]:
    """Products and sums of two 8-bit tensors that are 8 bits again, by output."""
    reader = _Reader(model)
    for node in reader.nodes:
        if node.op_type not in ("Mul", "Add"):
            continue
        left, right = (reader.activation(name) for name in node.input)
        result = reader.result(node.output[0])
        if left and right and result:
            yield node.output[0], _Pair(node.op_type, left, right, result)


def _factors(model: onnx.ModelProto) -> Iterator[tuple[str, tuple[_Stored, _Stored]]]:
    """Matrix products of two 8-bit activations whose result stays float32, by output."""
    reader = _Reader(model)
    for node in reader.nodes:
        if node.op_type == "MatMul" and reader.result(node.output[0]) is None:
            left, right = (reader.activation(reader.before_moving(name)) for name in node.input)
            if left and right:
                yield node.output[0], (left, right)
