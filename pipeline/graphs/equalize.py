"""Equalization: scale channels down in one layer and up in the next, without changing the network.

A tensor is quantized with one scale, so a channel with large values costs all others precision.
Between two layers with nothing but positively homogeneous operators, channel c may be divided by
any s > 0 where it is made and multiplied by s where it is read. Ranges come from the weights (Nagel
et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019) or
from the activations (Xiao et al., "SmoothQuant", ICML 2023).

Every s is a power of two: multiplying by it is exact, so the float32 graph gives the same bits as
before. The best s is missed by a factor of at most the square root of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calibration.histogram import Doubles
from pipeline.core.errors import ConfigError, DataError
from pipeline.graphs.links import FloatArray, Links, attribute

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Identity"})
_POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_ROUNDS = 20
_LARGEST_EXPONENT = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers between which channels were scaled.

    Attributes:
        producer: Output of the node that makes the tensor.
        tensor: The tensor that the second layer reads.
        consumer: Output of the node that reads it.
        channels: Number of channels that were scaled.
        spread_before: Largest channel range by the mean of all; 1 means equal channels.
        spread_after: The same after scaling.
    """

    producer: str
    tensor: str
    consumer: str
    channels: int
    spread_before: float
    spread_after: float


@dataclass(frozen=True)
class Equalization:
    """An equalized graph.

    Attributes:
        model: The graph; the one that was given is unchanged.
        pairs: All pairs that were looked at, in the order of the graph.
        scales: By tensor between two layers: what its channels were divided by, (channels,). Ranges
            that were observed before must be divided too, or observed again.
    """

    model: ModelProto
    pairs: tuple[Pair, ...]
    scales: Mapping[str, Doubles]


@dataclass(frozen=True, eq=False)
class _Param:
    """A constant of a node and the axis of the channels in it."""

    node: NodeProto
    place: int
    axis: int


@dataclass(frozen=True, eq=False)
class _Chain:
    """The constants that make a tensor and those that read it."""

    producer: NodeProto
    consumer: NodeProto
    tensor: str
    made_by: tuple[_Param, ...]
    read_by: _Param


def equalize(
    model: ModelProto,
    activations: Mapping[str, Doubles] | None = None,
    *,
    strength: float = 0.5,
) -> Equalization:
    """Equalize all pairs of layers of a float32 graph.

    Args:
        model: The graph; left unchanged.
        activations: Largest magnitude of each channel, (channels,), by the tensor that the second
            layer reads, see `tensors`; tensors that are missing are judged by the first layer's
            weights. None judges all of them so.
        strength: How much of the difference moves from the tensor into the weights that read it:
            0 for nothing of it, 1 for all of it.

    Raises:
        ConfigError: `strength` is not between 0 and 1.
        DataError: Activations are not finite or do not fit the tensor's channels.
    """
    from onnx import ModelProto

    if not 0 <= strength <= 1:
        raise ConfigError(f"the strength of equalization is between 0 and 1, not {strength}")
    copy = ModelProto()
    copy.CopyFrom(model)
    links = Links(copy.graph)
    chains = _chains(links)
    ranges = {chain.tensor: _given(links, chain, activations or {}) for chain in chains}
    before = [_spread(_tensor_range(links, chain, ranges)) for chain in chains]
    scales = {chain.tensor: np.ones(_channels(links, chain)) for chain in chains}
    for _ in range(_ROUNDS):
        changes = [_step(links, chain, ranges, scales, strength) for chain in chains]
        if not any(changes):
            break
    pairs = [
        Pair(
            chain.producer.output[0],
            chain.tensor,
            chain.consumer.output[0],
            int((scales[chain.tensor] != 1).sum()),
            spread,
            _spread(_tensor_range(links, chain, ranges)),
        )
        for chain, spread in zip(chains, before, strict=True)
    ]
    return Equalization(copy, tuple(pairs), scales)


def tensors(model: ModelProto) -> dict[str, int]:
    """The tensors that `equalize` scales, to be observed with the axis of their channels."""
    chains = _chains(Links(model.graph))
    return {chain.tensor: 1 if chain.producer.op_type == "Conv" else -1 for chain in chains}


def _step(
    links: Links,
    chain: _Chain,
    ranges: dict[str, Doubles | None],
    scales: dict[str, Doubles],
    strength: float,
) -> bool:
    """Scale one pair; tells whether anything changed."""
    tensor = _tensor_range(links, chain, ranges)
    weight = _channel_range(links, chain.read_by)
    usable = (tensor > 0) & (weight > 0)
    wanted = np.ones(tensor.shape)
    wanted[usable] = tensor[usable] ** strength / weight[usable] ** (1 - strength)
    bound = _LARGEST_EXPONENT
    scale = 2.0 ** np.clip(np.rint(np.log2(wanted)), -bound, bound)
    scale = np.where(_exact(links, chain, scale), scale, 1.0)
    if (scale == 1).all():
        return False
    for param in chain.made_by:
        _multiply(links, param, 1 / scale)
    _multiply(links, chain.read_by, scale)
    known = ranges[chain.tensor]
    ranges[chain.tensor] = None if known is None else known / scale
    scales[chain.tensor] = scales[chain.tensor] * scale
    return True


def _exact(links: Links, chain: _Chain, scale: Doubles) -> npt.NDArray[np.bool_]:
    """For each channel, whether no constant underflows or overflows when scaled."""
    exact = np.ones(scale.shape, dtype=bool)
    params = [(param, 1 / scale) for param in chain.made_by] + [(chain.read_by, scale)]
    for param, factor in params:
        value = _value(links, param)
        shaped = _along(factor, value, param.axis)
        with np.errstate(over="ignore", under="ignore"):
            back = (value * shaped.astype(value.dtype)) / shaped.astype(value.dtype)
        same = np.moveaxis(back == value, param.axis, 0).reshape(scale.size, -1)
        exact &= same.all(1)
    return exact


def _multiply(links: Links, param: _Param, factor: Doubles) -> None:
    value = _value(links, param)
    scaled = value * _along(factor, value, param.axis).astype(value.dtype)
    links.replace(param.node, param.place, scaled)


def _along(factor: Doubles, value: FloatArray, axis: int) -> Doubles:
    shape = [1] * value.ndim
    shape[axis] = -1
    return factor.reshape(shape)


def _value(links: Links, param: _Param) -> FloatArray:
    value = links.constant(param.node, param.place)
    if value is None:
        raise DataError(f"input {param.place} of {param.node.output[0]} is no constant")
    return value


def _channel_range(links: Links, param: _Param) -> Doubles:
    value = np.abs(_value(links, param).astype(np.float64))
    rows: Doubles = np.moveaxis(value, param.axis, 0).reshape(value.shape[param.axis], -1).max(1)
    return rows


def _channels(links: Links, chain: _Chain) -> int:
    return int(_value(links, chain.read_by).shape[chain.read_by.axis])


def _given(links: Links, chain: _Chain, activations: Mapping[str, Doubles]) -> Doubles | None:
    if chain.tensor not in activations:
        return None
    given = np.asarray(activations[chain.tensor], dtype=np.float64)
    channels = _channels(links, chain)
    if given.shape != (channels,) or not np.isfinite(given).all() or (given < 0).any():
        raise DataError(
            f"the magnitudes of {chain.tensor} have the shape {given.shape}, or are not finite: "
            f"{channels} numbers of at least 0 are needed"
        )
    return given


def _tensor_range(links: Links, chain: _Chain, ranges: Mapping[str, Doubles | None]) -> Doubles:
    known = ranges[chain.tensor]
    return _channel_range(links, chain.made_by[0]) if known is None else known


def _spread(ranges: Doubles) -> float:
    mean = float(ranges.mean())
    return float(ranges.max()) / mean if mean else 1.0


def _chains(links: Links) -> list[_Chain]:
    """All pairs of layers with only homogeneous operators between them."""
    found = []
    for producer in links.graph.node:
        made_by = _producing(links, producer)
        if made_by is None:
            continue
        walked = _walk(links, producer, made_by)
        if walked is None:
            continue
        tensor, consumer, params = walked
        read_by = _reading(links, consumer, tensor, images=producer.op_type == "Conv")
        if read_by is None or not _shapes_agree(links, params, read_by):
            continue
        found.append(_Chain(producer, consumer, tensor, params, read_by))
    return found


def _producing(links: Links, node: NodeProto) -> tuple[_Param, ...] | None:
    """The constants of a node that scale its output's channels, or None if it has no such."""
    weight = links.constant(node, 1)
    if weight is None:
        return None
    if node.op_type == "Conv":
        params = [_Param(node, 1, 0)]
    elif node.op_type == "Gemm" and weight.ndim == 2:
        params = [_Param(node, 1, 0 if attribute(node, "transB", 0) else 1)]
    elif node.op_type == "MatMul" and weight.ndim == 2:
        params = [_Param(node, 1, 1)]
    elif node.op_type == "LayerNormalization" and attribute(node, "axis", -1) == -1:
        params = [_Param(node, 1, 0)]
    else:
        return None
    if len(node.input) > 2 and node.input[2]:
        bias = links.constant(node, 2)
        if bias is None or bias.shape != (weight.shape[params[0].axis],):
            return None
        params.append(_Param(node, 2, 0))
    return tuple(params)


def _walk(
    links: Links, producer: NodeProto, params: tuple[_Param, ...]
) -> tuple[str, NodeProto, tuple[_Param, ...]] | None:
    """Follow the tensor through homogeneous operators to the node that reads it."""
    through = _ELEMENTWISE | (_POOLING if producer.op_type == "Conv" else frozenset())
    tensor = producer.output[0]
    while (reader := links.only_reader(tensor)) is not None:
        if reader.op_type == "Add" and producer.op_type == "MatMul" and len(params) == 1:
            place = 1 - list(reader.input).index(tensor)
            bias = links.constant(reader, place)
            if bias is None or bias.ndim != 1:
                return None
            params += (_Param(reader, place, 0),)
        elif reader.op_type not in through or len(reader.output) > 1:
            return tensor, reader, params
        tensor = reader.output[0]
    return None


def _reading(links: Links, node: NodeProto, tensor: str, images: bool) -> _Param | None:
    """The constant of a node that multiplies the channels of `tensor`, or None."""
    weight = links.constant(node, 1)
    if weight is None or list(node.input).count(tensor) != 1 or node.input[0] != tensor:
        return None
    if node.op_type == "Conv" and images:
        group = attribute(node, "group", 1)
        if group == 1:
            return _Param(node, 1, 1)
        return _Param(node, 1, 0) if weight.shape[:2] == (group, 1) else None
    if images or weight.ndim != 2:
        return None
    if node.op_type == "Gemm" and not attribute(node, "transA", 0):
        return _Param(node, 1, 1 if attribute(node, "transB", 0) else 0)
    return _Param(node, 1, 0) if node.op_type == "MatMul" else None


def _shapes_agree(links: Links, made_by: tuple[_Param, ...], read_by: _Param) -> bool:
    sizes = {_value(links, param).shape[param.axis] for param in (*made_by, read_by)}
    return len(sizes) == 1
