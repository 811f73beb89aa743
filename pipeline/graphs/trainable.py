"""A graph with pairs that learns: the very quantize and dequantize nodes, with gradients.

    codes = Codes(weights)                     # in the places of the weights
    prepared = prepare(codes.decoded(coded))   # the graph that is built
    copies = codes.copies(prepare(coded))      # where its constants come from
    graph = TrainableGraph(insert(prepared, ranges, chosen), copies)
    logits = graph(weights, images)

Weights and biases are stored anew at each call, by the functions that store them in the graph that
is built. What rounds passes gradients on as they come (straight-through, Bengio et al., 2013); what
is clipped passes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.autograd.function import once_differentiable

from calibration.ranges import Quantization
from pipeline.core.errors import ModelError
from pipeline.emulate.onnx.executor import OnnxExecutor, apply
from pipeline.emulate.onnx.module import PLAIN
from pipeline.emulate.onnx.plan import Step
from pipeline.graphs.qdq_ort import Inserted, StoredLayer, stored_bias, stored_weight

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

_FIRST_CODE = 0x5A000001
"""Bits of the float32 that stands for the first weight, about 9e15: no weight is so large, and the
patterns that follow, all of them finite, are enough for 600 million weights."""

_NO_CODE = -1


@dataclass(frozen=True, eq=False)
class Copy:
    """A constant of a rewritten graph, of which some values are weights of the network.

    Attributes:
        shape: Its shape.
        places: Where each value stands among all weights, flat; -1 for one that is no weight.
        values: Those that are no weights, flat; zeros in the other places.
        whole: The weight that it is as a whole, in that order; empty for none.
    """

    shape: tuple[int, ...]
    places: Tensor
    values: Tensor
    whole: str


class Copies:
    """How the constants of a rewritten graph follow from the weights of the network.

    Args:
        names: The weights, in the order of their places.
        copies: The constants, by name.
    """

    def __init__(self, names: Sequence[str], copies: Mapping[str, Copy]) -> None:
        self._names, self._copies = tuple(names), dict(copies)

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The constants that hold weights, with gradients to these."""
        whole = {name: copy for name, copy in self._copies.items() if copy.whole}
        made = {n: weights[copy.whole].reshape(copy.shape) for n, copy in whole.items()}
        if len(whole) < len(self._copies):
            flat = torch.cat([weights[name].reshape(-1) for name in self._names])
            others = {n: copy for n, copy in self._copies.items() if not copy.whole}
            made |= {name: self._gathered(copy, flat) for name, copy in others.items()}
        return made

    def _gathered(self, copy: Copy, flat: Tensor) -> Tensor:
        places, values = copy.places.to(flat.device), copy.values.to(flat.device)
        taken = flat[places.clamp(min=0)]
        return torch.where(places < 0, values, taken).reshape(copy.shape)


class Codes:
    """Numbers that stand for weights while a graph is made and rewritten.

    Where one of them turns up, a weight was copied. Weights that happen to be equal, which tools
    store once, keep apart so.

    Args:
        weights: Those that learn, by name.
    """

    def __init__(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._weights = dict(weights)
        ends = np.cumsum([0, *(values.size for values in weights.values())])
        self._starts = dict(zip(weights, map(int, ends), strict=False))
        self._total = int(ends[-1])

    def of(self, name: str) -> npt.NDArray[np.float32]:
        """The numbers in the place of a weight."""
        shape = self._weights[name].shape
        bits = _FIRST_CODE + self._starts[name] + np.arange(math.prod(shape))
        return bits.astype(np.uint32).view(np.float32).reshape(shape)

    def decoded(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A graph with the weights in the places of the numbers."""
        flat = np.concatenate([values.reshape(-1) for values in self._weights.values()])
        made = onnx.ModelProto()
        made.CopyFrom(model)
        for tensor in made.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values, places = self._places(tensor)
                real = np.where(places == _NO_CODE, values, flat[places])
                tensor.CopyFrom(numpy_helper.from_array(real, tensor.name))
        return made

    def copies(self, model: onnx.ModelProto) -> Copies:
        """How the constants of a graph follow from the weights.

        Raises:
            ModelError: A weight is not in it: something computed with it.
        """
        found = {
            tensor.name: self._places(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        }
        self._require_all([places for _, places in found.values()])
        copies = {
            name: self._copy(values, places)
            for name, (values, places) in found.items()
            if (places != _NO_CODE).any()
        }
        return Copies(list(self._weights), copies)

    def _places(self, tensor: onnx.TensorProto) -> Found:
        """A constant, and for each of its values which weight that is."""
        values = np.ascontiguousarray(numpy_helper.to_array(tensor))
        bits = values.view(np.uint32).astype(np.int64) - _FIRST_CODE
        return values, np.where((bits >= 0) & (bits < self._total), bits, _NO_CODE)

    def _require_all(self, found: list[npt.NDArray[np.int64]]) -> None:
        seen = np.zeros(self._total, dtype=bool)
        for places in found:
            seen[places[places != _NO_CODE]] = True
        for name, start in self._starts.items():
            if not seen[start : start + self._weights[name].size].all():
                raise ModelError(
                    f"{name} is not in the graph as it is trained, since a norm is folded into it, "
                    "or the like: fine-tune a network of care, or one without BatchNorm"
                )

    def _copy(self, values: npt.NDArray[np.float32], places: npt.NDArray[np.int64]) -> Copy:
        flat = places.reshape(-1)
        first = int(flat[0])
        name = next((name for name, start in self._starts.items() if start == first), "")
        is_whole = name and flat.size == self._weights[name].size and (np.diff(flat) == 1).all()
        others = np.where(flat == _NO_CODE, values.reshape(-1), np.float32(0))
        return Copy(
            values.shape,
            torch.from_numpy(flat.copy()),
            torch.from_numpy(others),
            name if is_whole else "",
        )


class TrainableGraph:
    """A classifier's graph with pairs, as a function of the network's weights.

    Args:
        inserted: The graph.
        copies: How the constants of the float32 graph follow from the network's weights.
    """

    def __init__(self, inserted: Inserted, copies: Copies) -> None:
        executor = OnnxExecutor(inserted.model)
        self._copies, self._inserted = copies, inserted
        self._steps = executor.steps()
        self._input, self._output = executor.input.name, executor.outputs[0].name
        # They were made in inference mode, out of which autograd takes nothing.
        self._constants = {name: value.clone() for name, value in executor.held().items()}

    @property
    def model(self) -> onnx.ModelProto:
        """The graph, with the weights that it was made with."""
        return self._inserted.model

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableGraph:
        """Nothing in it changes: a copy of a network shares it."""
        return self

    def __call__(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits, (batch, classes), of preprocessed images, (batch, channels, height, width).

        Args:
            weights: Of the network, float32, on the device of the images.
            images: Normalized.
        """
        values = self._values(weights, images.device)
        values[self._input] = images
        for step in self._steps:
            self._run(step, values)
            for name in step.dead:
                values.pop(name, None)
        return values[self._output]

    def _values(self, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """What does not depend on the images."""
        own = self._copies(weights)
        values = {
            name: value.to(device) if value.is_floating_point() else value
            for name, value in self._constants.items()
        }
        values |= {name: value for name, value in own.items() if name in values}
        for layer in self._inserted.layers:
            values |= self._stored(layer, own)
        return values

    def _stored(self, layer: StoredLayer, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a layer reads in the place of its weight and its bias."""
        weight = own[layer.weight]
        found, stored = stored_weight(
            _array(weight), layer.axis, self._inserted.scheme, safe=layer.safe
        )
        made = {layer.weight_read: _read_back(weight, found, stored)}
        if layer.bias in own:
            bias = own[layer.bias]
            of_bias, offset = stored_bias(_array(bias), layer.activation, found)
            made[layer.bias_read] = _read_back(bias, of_bias, offset)
        return made

    def _run(self, step: Step, values: dict[str, Tensor]) -> None:
        node = step.node
        inputs = [values[name] if name else None for name in node.inputs]
        if node.op_type == "QuantizeLinear":
            x, scale, zero_point = inputs
            assert x is not None
            assert scale is not None
            assert zero_point is not None
            limits = torch.iinfo(zero_point.dtype)
            parameters = (scale, zero_point.to(x), limits.min, limits.max)
            # In the place of stored values: what they stand for.
            values[node.outputs[0]] = _Pair.apply(x, *parameters)
        elif node.op_type == "DequantizeLinear":
            assert inputs[0] is not None
            values[node.outputs[0]] = inputs[0]
        else:
            outputs = apply(step, inputs, PLAIN.get(node.op_type))
            values.update(zip(node.outputs, outputs, strict=False))


class _Pair(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes where nothing is clipped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
    ) -> Tensor:
        """What stays of x."""
        position = (x / scale).round_().add_(zero_point)
        kept = position.clamp(low, high)
        ctx.save_for_backward(position == kept)
        return kept.sub_(zero_point).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Of x alone."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


class _Straight(torch.autograd.Function):
    """Other values in the place of some, with the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        """The value."""
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of x as of the value."""
        return gradient, None


def _array(weight: Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = weight.detach().cpu().numpy()
    return values


def _read_back(weight: Tensor, found: Quantization, stored: npt.NDArray[Any]) -> Tensor:
    value = torch.from_numpy(found.dequantize(stored)).to(weight.device)
    result: Tensor = _Straight.apply(weight, value)
    return result
