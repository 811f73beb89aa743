"""Equalization: channels are divided where they are made and multiplied where they are read.

A tensor is quantized with one scale, so a channel with large values costs all others precision.
Between layers with nothing but positively homogeneous operators, channel c may be divided by any
s > 0 where it is made and multiplied by s where it is read. What lies between may branch: channels
that are added to each other, joined and split again have one s (a class), which all layers that
make them or read them take in; a class that meets any other operator, or leaves the graph, stays.

Scales follow from the activations (Xiao et al., "SmoothQuant", ICML 2023), those of classes
generalize the pairs of layers of Nagel et al., "Data-free quantization through weight equalization
and bias correction", ICCV 2019.

Every s is a power of two: multiplying by it is exact, so the float32 graph gives the same bits as
before. The best s is missed by a factor of at most the square root of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibration.histogram import Doubles
from pipeline.core.errors import ConfigError, DataError
from pipeline.graphs.links import FloatArray, Links, attribute

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Ids = npt.NDArray[np.int64]

STRENGTH = 0.85
"""How much of the difference between channels moves into the weights that read them. Weights have a
scale for each output channel, tensors have one: what moves costs less there. See docs/decisions.md
for what was measured."""

IMAGES = 1
"""Axis of the channels of what convolutions make; linear layers have them last."""

_ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Identity"})
_POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_PASSES = 2
"""The second sees the ranges that the first left. With more, channels drift away from those that
have to stay as they are."""

_LARGEST_EXPONENT = 10


@dataclass(frozen=True)
class Equalization:
    """An equalized graph.

    Attributes:
        model: The graph; the one that was given is unchanged.
        scales: By tensor: what its channels were divided by, (channels,); tensors that stay as they
            are are missing. Ranges that were observed before do not hold.
    """

    model: ModelProto
    scales: Mapping[str, Doubles]


@dataclass(frozen=True, eq=False)
class _Param:
    """A constant of a node, the axis of the channels in it, and the class of each of them."""

    node: NodeProto
    place: int
    axis: int
    classes: Ids


class _Classes:
    """The channels of a graph, by what has to be scaled alike.

    Attributes:
        links: The graph.
        of: By tensor: the class of each of its channels.
        axes: By tensor: the axis of its channels.
        makers: Constants that are divided by a class' scale.
        readers: Constants that are multiplied by it.
        free: For each class, whether it may be scaled at all.
    """

    def __init__(self, links: Links) -> None:
        self.links = links
        self.of: dict[str, Ids] = {}
        self.axes: dict[str, int] = {}
        self.makers: list[_Param] = []
        self.readers: list[_Param] = []
        self._same: list[int] = []
        self._fixed: set[int] = set()
        for node in links.graph.node:
            if any(part.HasField("g") or part.graphs for part in node.attribute):
                self.of.clear()  # what a subgraph reads is not looked at
            elif not (self._makes(node) or self._passes(node)):
                for name in node.input:
                    self._fix(name)
        for name in links.outputs:
            self._fix(name)
        self._settle()

    def _new(self, name: str, axis: int, count: int) -> Ids:
        first = len(self._same)
        self._same.extend(range(first, first + count))
        self._state(name, axis, np.arange(first, first + count, dtype=np.int64))
        return self.of[name]

    def _state(self, name: str, axis: int, classes: Ids) -> None:
        self.of[name], self.axes[name] = classes, axis

    def _fix(self, name: str) -> None:
        self._fixed.update(self.of.get(name, np.zeros(0, np.int64)).tolist())

    def _root(self, one: int) -> int:
        while self._same[one] != one:
            self._same[one] = self._same[self._same[one]]
            one = self._same[one]
        return one

    def _settle(self) -> None:
        """Give every channel the number of its class."""
        roots = np.array([self._root(one) for one in range(len(self._same))], dtype=np.int64)
        self.free = np.ones(len(roots), dtype=bool)
        self.free[[roots[one] for one in self._fixed]] = False
        self.of = {name: roots[ids] for name, ids in self.of.items()}
        for params in (self.makers, self.readers):
            params[:] = [_Param(p.node, p.place, p.axis, roots[p.classes]) for p in params]

    def _makes(self, node: NodeProto) -> bool:
        """A layer: it makes channels of its own, and reads those of its input."""
        places = _producing(self.links, node)
        if places is None:
            return False
        images = node.op_type == "Conv"
        weight = self.links.constant(node, 1)
        assert weight is not None
        made = self._new(node.output[0], IMAGES if images else -1, weight.shape[places[0][1]])
        self.makers += [_Param(node, place, axis, made) for place, axis in places]
        read = self.of.get(node.input[0])
        axis = None if read is None else _reading(self.links, node, len(read), images)
        if read is None or axis is None or (self.axes[node.input[0]] == IMAGES) is not images:
            self._fix(node.input[0])
        else:
            self.readers.append(_Param(node, 1, axis, read))
        return True

    def _passes(self, node: NodeProto) -> bool:
        """An operator that hands channels on, scaled or not."""
        first = node.input[0] if node.input else ""
        if node.op_type == "Concat":
            return self._joins(node)
        if node.op_type == "Add":
            return self._adds(node)
        if first not in self.of:
            return False
        classes, axis = self.of[first], self.axes[first]
        if self._keeps_channels(node, axis, len(classes)):
            self._state(node.output[0], axis, classes)
        elif node.op_type == "ReduceMean" and axis == IMAGES and _is_spatial(self.links, node):
            self._state(node.output[0], axis if attribute(node, "keepdims", 1) else -1, classes)
        elif node.op_type == "Split" and attribute(node, "axis", 0) == axis:
            parts = _parts(self.links, node, len(classes))
            if parts is None:
                return False
            for name, part in zip(node.output, np.split(classes, parts), strict=True):
                self._state(name, axis, part)
        else:
            return False
        return True

    def _keeps_channels(self, node: NodeProto, axis: int, count: int) -> bool:
        """Whether the result has the same channels, on the same axis."""
        if node.op_type == "Reshape":
            shape = self.links.integers(node, 1)
            return axis != IMAGES and shape is not None and shape[-1:] == [count]
        pools = node.op_type in _POOLING and axis == IMAGES
        return len(node.output) == 1 and (node.op_type in _ELEMENTWISE or pools)

    def _adds(self, node: NodeProto) -> bool:
        one, other = node.input
        if one in self.of and other in self.of:
            if self.axes[one] != self.axes[other] or self.of[one].size != self.of[other].size:
                return False
            for mine, its in zip(self.of[one], self.of[other], strict=True):
                self._same[self._root(int(mine))] = self._root(int(its))
            self._state(node.output[0], self.axes[one], self.of[one])
            return True
        place = 1 if one in self.of else 0
        tensor, bias = node.input[1 - place], self.links.constant(node, place)
        if tensor not in self.of or bias is None or self.axes[tensor] == IMAGES:
            return False
        if bias.shape != self.of[tensor].shape:
            return False
        self.makers.append(_Param(node, place, 0, self.of[tensor]))
        self._state(node.output[0], -1, self.of[tensor])
        return True

    def _joins(self, node: NodeProto) -> bool:
        """Channels of images one after another; those of unknown origin stay as they are."""
        known = [name for name in node.input if self.axes.get(name) == IMAGES]
        if attribute(node, "axis", 0) != IMAGES or not known:
            return False
        for name in node.input:
            if name not in self.of:
                count = self.links.channels(name)
                if count is None:
                    return False
                self._fixed.update(self._new(name, IMAGES, count).tolist())
        if any(self.axes[name] != IMAGES for name in node.input):
            return False
        self._state(node.output[0], IMAGES, np.concatenate([self.of[n] for n in node.input]))
        return True


def equalize(
    model: ModelProto, magnitudes: Mapping[str, Doubles], *, strength: float = STRENGTH
) -> Equalization:
    """Equalize the channels of a float32 graph.

    Args:
        model: The graph; left unchanged.
        magnitudes: Largest magnitude of each channel, (channels,), of the tensors that shall have
            equal channels; see `tensors` for those that can.
        strength: How much of the difference moves from the tensors into the weights that read them:
            0 for nothing of it, 1 for all of it.

    Raises:
        ConfigError: `strength` is not between 0 and 1.
        DataError: Magnitudes are not finite or do not fit the tensor's channels.
    """
    from onnx import ModelProto

    if not 0 <= strength <= 1:
        raise ConfigError(f"the strength of equalization is between 0 and 1, not {strength}")
    copy = ModelProto()
    copy.CopyFrom(model)
    found = _Classes(Links(copy.graph))
    known = {name: _checked(found, name, seen) for name, seen in magnitudes.items()}
    total = np.ones(found.free.size)
    for _ in range(_PASSES):
        scale = _scales(found, known, strength)
        for param, factor in _factors(found, scale):
            _multiply(found.links, param, factor)
        known = {name: seen / scale[found.of[name]] for name, seen in known.items()}
        total *= scale
    scales = {name: total[classes] for name, classes in found.of.items()}
    return Equalization(copy, {name: each for name, each in scales.items() if (each != 1).any()})


def tensors(model: ModelProto) -> dict[str, int]:
    """The tensors of which `equalize` can scale channels, with the axis of their channels."""
    found = _Classes(Links(model.graph))
    return {name: found.axes[name] for name, ids in found.of.items() if found.free[ids].any()}


def _scales(found: _Classes, magnitudes: Mapping[str, Doubles], strength: float) -> Doubles:
    """What to divide every class by: powers of two, 1 for those that stay.

    A channel counts by its share of the largest in its tensor, or in the weight that reads it: of
    all tensors and weights, where its share is largest. So no tensor gets a larger range, but for
    the rounding of scales. Weights of depthwise convolutions have a scale for each channel and take
    in any.
    """
    share, read = np.zeros((2, found.free.size))
    for name, seen in magnitudes.items():
        _take_shares(share, found.of[name], seen)
    for param in found.readers:
        if not _is_depthwise(param):
            _take_shares(read, param.classes, _channel_range(found.links, param))
    wanted = np.ones(share.size)
    dense, usable = read > 0, share > 0
    wanted[usable] = share[usable] ** np.where(dense[usable], strength, 1.0)
    wanted[usable & dense] /= read[usable & dense] ** (1 - strength)
    bound = _LARGEST_EXPONENT
    scale = 2.0 ** np.clip(np.rint(np.log2(wanted)), -bound, bound)
    scale[~found.free] = 1.0
    for param, factor in _factors(found, scale):
        scale[param.classes[~_exact(found.links, param, factor)]] = 1.0
    return scale


def _take_shares(share: Doubles, classes: Ids, ranges: Doubles) -> None:
    """Raise each class' share to that of its channel in these."""
    if ranges.size and (largest := ranges.max()) > 0:
        np.maximum.at(share, classes, ranges / largest)


def _factors(found: _Classes, scale: Doubles) -> list[tuple[_Param, Doubles]]:
    """All constants, with what to multiply their channels by."""
    return [(param, 1 / scale[param.classes]) for param in found.makers] + [
        (param, scale[param.classes]) for param in found.readers
    ]


def _is_depthwise(param: _Param) -> bool:
    return param.node.op_type == "Conv" and attribute(param.node, "group", 1) != 1


def _exact(links: Links, param: _Param, factor: Doubles) -> npt.NDArray[np.bool_]:
    """For each channel, whether no value underflows or overflows when scaled."""
    value = _value(links, param)
    shaped = _along(factor, value, param.axis).astype(value.dtype)
    with np.errstate(over="ignore", under="ignore"):
        back = (value * shaped) / shaped
    rows: npt.NDArray[np.bool_] = (
        np.moveaxis(back == value, param.axis, 0).reshape(factor.size, -1).all(1)
    )
    return rows


def _multiply(links: Links, param: _Param, factor: Doubles) -> None:
    if (factor == 1).all():
        return
    value = _value(links, param)
    scaled = value * _along(factor, value, param.axis).astype(value.dtype)
    links.replace(param.node, param.place, scaled)


def _along(factor: Doubles, value: FloatArray, axis: int) -> Doubles:
    shape = [1] * value.ndim
    shape[axis] = -1
    return factor.reshape(shape)


def _value(links: Links, param: _Param) -> FloatArray:
    value = links.constant(param.node, param.place)
    assert value is not None  # a class takes in constants alone
    return value


def _channel_range(links: Links, param: _Param) -> Doubles:
    value = np.abs(_value(links, param).astype(np.float64))
    rows: Doubles = np.moveaxis(value, param.axis, 0).reshape(value.shape[param.axis], -1).max(1)
    return rows


def _checked(found: _Classes, name: str, seen: Any) -> Doubles:
    given = np.asarray(seen, dtype=np.float64)
    classes = found.of.get(name)
    if classes is None:
        raise DataError(f"{name} has no channels that could be scaled: see `tensors`")
    if given.shape != classes.shape or not np.isfinite(given).all() or (given < 0).any():
        raise DataError(
            f"the magnitudes of {name} have the shape {given.shape}, or are not finite: "
            f"{len(classes)} numbers of at least 0 are needed"
        )
    return given


def _producing(links: Links, node: NodeProto) -> list[tuple[int, int]] | None:
    """Places of the constants that scale a layer's output, and their axes; None for no layer."""
    weight = links.constant(node, 1)
    if weight is None:
        return None
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm" and weight.ndim == 2:
        axis = 0 if attribute(node, "transB", 0) else 1
    elif node.op_type == "MatMul" and weight.ndim == 2:
        axis = 1
    elif node.op_type == "LayerNormalization" and attribute(node, "axis", -1) == -1:
        axis = 0
    else:
        return None
    places = [(1, axis)]
    if len(node.input) > 2 and node.input[2]:
        bias = links.constant(node, 2)
        if bias is None or bias.shape != (weight.shape[axis],):
            return None
        places.append((2, 0))
    return places


def _reading(links: Links, node: NodeProto, channels: int, images: bool) -> int | None:
    """Axis of a layer's weight that multiplies the channels of its input; None if none does."""
    weight = links.constant(node, 1)
    assert weight is not None
    axis = None
    if images:
        group = attribute(node, "group", 1)
        if group == 1:
            axis = 1
        elif weight.shape[:2] == (group, 1):
            axis = 0
    elif node.op_type == "Gemm" and not attribute(node, "transA", 0):
        axis = 1 if attribute(node, "transB", 0) else 0
    elif node.op_type == "MatMul":
        axis = 0
    return axis if axis is not None and weight.shape[axis] == channels else None


def _is_spatial(links: Links, node: NodeProto) -> bool:
    """Whether a mean is that of all rows and columns."""
    given = links.integers(node, 1)
    axes = attribute(node, "axes", []) if given is None else given
    return sorted(axis % 4 for axis in axes) == [2, 3] and all(-4 <= axis < 4 for axis in axes)


def _parts(links: Links, node: NodeProto, channels: int) -> list[int] | None:
    """Where a Split cuts so many channels; None if that is not stated."""
    sizes = links.integers(node, 1)
    if sizes is None:
        if len(node.input) > 1 and node.input[1]:
            return None
        sizes = attribute(node, "split", [])
    if not sizes:
        size, left = divmod(channels, len(node.output))
        sizes = [] if left else [size] * len(node.output)
    whole = len(sizes) == len(node.output) and sum(sizes) == channels
    return [int(at) for at in np.cumsum(sizes)[:-1]] if whole else None
