"""What a network's tensors hold over the calibration images.

    statistics = observe("model.onnx", images)
    warnings = check(statistics)

Extremes come from every value. Histograms take all values of small tensors and an evenly spread
part of large ones, otherwise a 224-pixel network would take minutes for a few hundred images.

Parts of the images can be observed apart, in any order and place, and merged:

    first, second = (observe(graph, images, between=each) for each in ((0, 256), (256, None)))
    merge([second, first])   # to the bit what observe(graph, images) gives

Parts are whole batches, counts and extremes do not depend on an order, and the edges of histograms
are fixed by the largest value alone, see `calibration.histogram`. So one pass is enough for both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibration.histogram import Doubles, Floats, Histogram
from pipeline.core import machine
from pipeline.core.errors import BuildError, DataError
from pipeline.core.network import whole_batches
from pipeline.core.threads import threads_for

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

    from pipeline.core.network import Images

Tensors = Mapping[str, npt.NDArray[Any]]

VALUES = 16384
"""Values of a tensor that its histogram takes of each image."""

MEMORY = 2**28
"""Bytes that the observed tensors of one call may take together. More is no faster."""

_FLOAT_TYPES = (1, 10, 11)  # onnx.TensorProto FLOAT, FLOAT16, DOUBLE


class Statistics:
    """What was seen of one tensor.

    Args:
        name: Of the tensor.
        axis: Axis of the channels, to keep their extremes apart; None for no channels.
        values: Values of each image that the histogram takes.
        first: How many images stand before the first one that is added.

    Attributes:
        histogram: Of the finite values; its `low` and `high` are those of all of them.
        nan: Number of values that are not a number.
        infinite: Number of infinite values.
        channel_low: Smallest value of every channel, (channels,); None without an axis.
        channel_high: Largest value of every channel, (channels,); None without an axis.
    """

    def __init__(
        self, name: str, axis: int | None = None, values: int = VALUES, first: int = 0
    ) -> None:
        self.name = name
        self.axis = axis
        self.histogram = Histogram()
        self.nan = 0
        self.infinite = 0
        self.channel_low: Doubles | None = None
        self.channel_high: Doubles | None = None
        self._values = values
        self._rows = first

    @property
    def low(self) -> float:
        """Smallest finite value; infinite if there was none."""
        return self.histogram.low

    @property
    def high(self) -> float:
        """Largest finite value; minus infinity if there was none."""
        return self.histogram.high

    @property
    def constant(self) -> bool:
        """Only a single value was seen."""
        return self.low == self.high

    @property
    def channel_magnitudes(self) -> Doubles | None:
        """Largest magnitude of every channel, (channels,); None without an axis or a value."""
        if self.channel_low is None or self.channel_high is None:
            return None
        largest: Doubles = np.maximum(-self.channel_low, self.channel_high)
        return largest

    @property
    def finite(self) -> bool:
        """Neither NaN nor infinite values were seen."""
        return not (self.nan or self.infinite)

    def add(self, tensor: npt.NDArray[Any]) -> None:
        """Take in a batch; images lie along the first axis.

        Raises:
            DataError: The tensor is not of floating point.
        """
        if tensor.dtype.kind != "f":
            raise DataError(
                f"tensor {self.name} holds {tensor.dtype}, which has no range to observe"
            )
        if not tensor.size:
            return
        rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
        first, self._rows = self._rows, self._rows + len(rows)
        with np.errstate(invalid="ignore"):
            low, high = float(rows.min()), float(rows.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            self._count_non_finite(rows)
            rows = rows[np.isfinite(rows)][None]
            if not rows.size:
                return
            low, high = float(rows.min()), float(rows.max())
        self.histogram.add_part(self._thinned(rows, first), low, high)
        if self.axis is not None:
            self._add_channels(tensor, self.axis)

    def _count_non_finite(self, rows: Floats) -> None:
        nan = np.isnan(rows)
        self.nan += int(nan.sum())
        self.infinite += int((~np.isfinite(rows) & ~nan).sum())

    def merge(self, other: Statistics) -> None:
        """Take in what was seen of the same tensor on other images, whichever come first.

        Raises:
            DataError: It is another tensor, or its channels lie along another axis.
        """
        if (other.name, other.axis) != (self.name, self.axis):
            raise DataError(
                f"what was seen of tensor {other.name} (axis {other.axis}) says nothing of "
                f"{self.name} (axis {self.axis})"
            )
        self.histogram.merge(other.histogram)
        self.nan += other.nan
        self.infinite += other.infinite
        if other.channel_low is not None and other.channel_high is not None:
            self._merge_channels(other.channel_low, other.channel_high)

    def _thinned(self, rows: Floats, first: int) -> Floats:
        """Every n-th value of each image, starting elsewhere in each one.

        n is a prime, so that it does not always meet the same channel, row or column.
        """
        stride = _next_prime(math.ceil(rows.shape[1] / self._values))
        if stride == 1:
            return rows
        return np.concatenate([row[(first + i) % stride :: stride] for i, row in enumerate(rows)])

    def _add_channels(self, tensor: Floats, axis: int) -> None:
        if not -tensor.ndim <= axis < tensor.ndim:
            raise DataError(f"tensor {self.name} of shape {tensor.shape} has no axis {axis}")
        others = tuple(i for i in range(tensor.ndim) if i != axis % tensor.ndim)
        finite = np.isfinite(tensor)
        low = tensor.min(others, where=finite, initial=np.inf).astype(np.float64)
        high = tensor.max(others, where=finite, initial=-np.inf).astype(np.float64)
        self._merge_channels(low, high)

    def _merge_channels(self, low: Doubles, high: Doubles) -> None:
        if self.channel_low is None or self.channel_high is None:
            self.channel_low, self.channel_high = low, high
        else:
            self.channel_low = np.minimum(self.channel_low, low)
            self.channel_high = np.maximum(self.channel_high, high)


def merge(parts: Sequence[Mapping[str, Statistics]]) -> dict[str, Statistics]:
    """Statistics of all images, from those of parts of them, in any order.

    Args:
        parts: See `observe`; left unchanged.

    Raises:
        DataError: There is no part, or they are of other tensors.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        raise DataError("only what was observed of the same tensors can be merged")
    total = {name: Statistics(name, seen.axis) for name, seen in parts[0].items()}
    for part in parts:
        for name, seen in part.items():
            total[name].merge(seen)
    return total


def _next_prime(number: int) -> int:
    """The smallest prime that is at least `number`; 1 for 1."""
    while any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def observe_callable(
    run: Callable[[Images], Tensors],
    images: Images,
    *,
    batch: int = 16,
    channels: Mapping[str, int] | None = None,
    values: int = VALUES,
    between: tuple[int, int | None] = (0, None),
) -> dict[str, Statistics]:
    """Statistics of whatever tensors `run` gives.

    Args:
        run: Gives tensors by name for a batch of images.
        images: (images, channels, height, width).
        batch: Images of one call.
        channels: Axis of the channels of those tensors whose channels are kept apart.
        values: Values of each image that a histogram takes.
        between: Only these images: the first, and the one after the last, both rounded up to whole
            batches; None for all that follow.

    Raises:
        DataError: There are no images, a tensor is not of floating point, or one of `channels`
            was not given by `run`.
    """
    first, last = (None if at is None else -(-at // batch) * batch for at in between)
    start, end = first or 0, len(images) if last is None else min(last, len(images))
    if not 0 <= start < end:
        raise DataError("there are no calibration images to observe")
    axes = channels or {}
    statistics: dict[str, Statistics] = {}
    for at in range(start, end, batch):
        for name, tensor in run(images[at : min(at + batch, end)]).items():
            if name not in statistics:
                statistics[name] = Statistics(name, axes.get(name), values, start)
            statistics[name].add(tensor)
    if missing := sorted(set(axes) - set(statistics)):
        raise DataError(f"the network has no tensor {missing[0]}: check its name")
    return statistics


def observe(
    model: Path | ModelProto,
    images: Images,
    tensors: Sequence[str] | None = None,
    *,
    batch: int = 16,
    channels: Mapping[str, int] | None = None,
    memory: int = MEMORY,
    threads: int | None = None,
    values: int = VALUES,
    between: tuple[int, int | None] = (0, None),
) -> dict[str, Statistics]:
    """Statistics of the tensors of an ONNX graph, run by ONNX Runtime on the CPU.

    The batch shrinks until the observed tensors fit into `memory`; if those of a single image do
    not, the graph runs several times, each time for a part of the tensors.

    Args:
        model: The float32 graph, with one input.
        images: (images, channels, height, width).
        tensors: Which ones; None for all of floating point that depend on the input.
        batch: Most images of one call; a graph with a fixed batch takes its own, and the last one
            is filled up with the first images.
        channels: Axis of the channels of those tensors whose channels are kept apart.
        memory: Bytes that the observed tensors of one call may take together.
        threads: CPU threads; None for as many as make a difference on images of this size.
        values: Values of each image that a histogram takes.
        between: Only these images, see `observe_callable`; `merge` joins what several calls saw.
            Of few large batches none may begin in a part: then nothing was seen there.

    Returns:
        Statistics by tensor, in the order of the graph.

    Raises:
        DataError: Images do not fit the graph, or it has no such tensor.
        BuildError: ONNX Runtime refuses the graph.
    """
    graph = GraphTensors(model)
    wanted = graph.select(tensors)
    if missing := sorted(set(channels or {}) - set(wanted)):
        raise DataError(f"the graph has no observed tensor {missing[0]}: check its name")
    graph.check(images)
    images = whole_batches(images, graph.fixed_batch or 1)
    size, groups = graph.plan(wanted, batch, memory)
    if _is_empty(between, size, len(images)):
        return {name: Statistics(name, (channels or {}).get(name), values) for name in wanted}
    statistics: dict[str, Statistics] = {}
    for group in groups:
        axes = {name: axis for name, axis in (channels or {}).items() if name in group}
        run = graph.runner(group, threads)
        statistics |= observe_callable(
            run, images, batch=size, channels=axes, values=values, between=between
        )
    return {name: statistics[name] for name in wanted}


def magnitudes(
    model: Path | ModelProto, images: Images, axes: Mapping[str, int]
) -> dict[str, Doubles]:
    """Largest magnitude of every channel, (channels,), of tensors of an ONNX graph.

    Args:
        model: The float32 graph, with one input.
        images: (images, channels, height, width).
        axes: The tensors, with the axis of their channels. One that has no finite value is left
            out.

    Raises:
        DataError, BuildError: See `observe`.
    """
    if not axes:
        return {}
    seen = observe(model, images, list(axes), channels=axes, values=1)
    found = ((name, each.channel_magnitudes) for name, each in seen.items())
    return {name: largest for name, largest in found if largest is not None}


def _is_empty(between: tuple[int, int | None], batch: int, total: int) -> bool:
    """Whether no batch begins in a part of the images, which begins among them."""
    first, last = (None if at is None else -(-at // batch) for at in between)
    batches = -(-total // batch) if last is None else last
    return 0 < between[0] < total and first is not None and first >= batches


class GraphTensors:
    """The tensors of an ONNX graph that depend on its input, and runs that return them.

    Args:
        model: The graph, or its file.

    Attributes:
        model: The graph.
        names: The tensors of floating point, in the order of the graph.

    Raises:
        DataError: The graph does not have exactly one input.
    """

    def __init__(self, model: Path | ModelProto) -> None:
        import onnx

        self.model = onnx.load(os.fspath(model)) if isinstance(model, Path) else model
        graph = self.model.graph
        initializers = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in initializers]
        if len(inputs) != 1:
            raise DataError(
                f"the graph has {len(inputs)} inputs where calibration needs exactly one"
            )
        self._input = inputs[0]
        self._infer()
        known = [n for n in _dependents(graph, self._input.name) if self._is_float(n)]
        self.names = tuple(known)

    def _infer(self) -> None:
        """Types and bytes for one image, as far as shape inference finds them."""
        import onnx

        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        self._types: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            tensor = value.type.tensor_type
            self._types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                dims = [dim.dim_value or None for dim in tensor.shape.dim]
                if None not in dims[1:]:
                    self._bytes[value.name] = 4 * math.prod(dim or 1 for dim in dims)

    def _is_float(self, name: str) -> bool:
        return self._types.get(name, _FLOAT_TYPES[0]) in _FLOAT_TYPES

    def select(self, tensors: Sequence[str] | None) -> tuple[str, ...]:
        """The asked for tensors in the order of the graph.

        Raises:
            DataError: The graph has no such tensor of floating point that depends on its input.
        """
        if tensors is None:
            return self.names
        if missing := sorted(set(tensors) - set(self.names)):
            raise DataError(
                f"the graph has no tensor {missing[0]} of floating point that depends on its input"
            )
        asked = frozenset(tensors)
        return tuple(name for name in self.names if name in asked)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the graph demands, or None if it takes any."""
        return _batch_of(self._input)

    def check(self, images: Images) -> None:
        """Raise DataError if the graph does not take these images."""
        dims = [int(dim.dim_value) for dim in self._input.type.tensor_type.shape.dim]
        if images.dtype != np.float32 or images.ndim != len(dims):
            raise DataError(
                f"the calibration images are {images.dtype} of shape {images.shape}, the graph "
                f"takes float32 with {len(dims)} axes"
            )
        for axis, (dim, found) in enumerate(zip(dims[1:], images.shape[1:], strict=True), 1):
            if dim and dim != found:
                raise DataError(f"axis {axis} of the images is {found}, the graph takes {dim}")

    def plan(
        self, names: Sequence[str], batch: int, memory: int
    ) -> tuple[int, list[tuple[str, ...]]]:
        """Batch size and groups of tensors with which a call stays within `memory` bytes.

        A tensor of unknown size gets a group of its own.
        """
        known = [name for name in names if name in self._bytes]
        total = sum(self._bytes[name] for name in known)
        size = self.fixed_batch or max(1, min(batch, memory // max(total, 1)))
        # Sizes that shape inference gives of a graph with a fixed batch are those of the batch.
        room = memory // (1 if self.fixed_batch else size)
        groups: list[list[str]] = [[]]
        used = 0
        for name in known:
            if groups[-1] and used + self._bytes[name] > room:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += self._bytes[name]
        groups += [[name] for name in names if name not in self._bytes]
        return size, [tuple(group) for group in groups if group]

    def runner(
        self, names: Sequence[str], threads: int | None = None
    ) -> Callable[[Images], dict[str, npt.NDArray[Any]]]:
        """A function from images to these tensors.

        Raises:
            BuildError: ONNX Runtime refuses the graph.
        """
        # ONNX Runtime does not return an input as it is, so that is left out.
        computed = [name for name in names if name != self._input.name]
        if not computed:
            return lambda images: {self._input.name: images}
        session = open_session(self.model, computed, threads)

        def run(images: Images) -> dict[str, npt.NDArray[Any]]:
            given = {self._input.name: images} if self._input.name in names else {}
            return given | session(images)

        return run


def fixed_batch(model: ModelProto) -> int | None:
    """The batch size that a graph demands, or None if it takes any. Images are its first input."""
    return _batch_of(_images_of(model.graph))


def _images_of(graph: GraphProto) -> ValueInfoProto:
    initializers = {tensor.name for tensor in graph.initializer}
    return next(value for value in graph.input if value.name not in initializers)


def _batch_of(value: ValueInfoProto) -> int | None:
    shape = value.type.tensor_type.shape
    return int(shape.dim[0].dim_value) or None if shape.dim else None


def open_session(
    model: ModelProto, outputs: Sequence[str], threads: int | None = None
) -> Callable[..., dict[str, npt.NDArray[Any]]]:
    """Open a graph in ONNX Runtime, on the CPU, to return any of its tensors.

    Args:
        model: The graph; left unchanged. Images are its first input.
        outputs: The tensors to return.
        threads: CPU threads; None for as many as make a difference on images of this size.

    Returns:
        A function from images, and a mapping of further inputs if there are any, to the tensors.

    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    import onnx
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    images_of = _images_of(copy.graph)
    first = images_of.name
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _threads_for(images_of) or machine.granted()
    # Spinning threads would starve the other sessions and processes of this machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own exceptions share no other base
        reason = str(error).splitlines()[0]
        raise BuildError(f"ONNX Runtime refuses the graph to calibrate: {reason}") from error

    def run(
        images: Images, others: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        results = session.run(list(outputs), {first: images, **(others or {})})
        return dict(zip(outputs, results, strict=True))

    return run


def _threads_for(images: ValueInfoProto) -> int | None:
    """Threads that make a difference; None for all, as for images whose size is left open."""
    sides = [int(dim.dim_value) for dim in images.type.tensor_type.shape.dim[1:]]
    return threads_for(math.prod(sides)) if sides and all(sides) else None


def _dependents(graph: GraphProto, source: str) -> Iterator[str]:
    """The tensors that depend on `source`, itself first, in the order of the graph."""
    found = {source}
    yield source
    for node in graph.node:
        if found.intersection(node.input):
            outputs = [name for name in node.output if name]
            found.update(outputs)
            yield from outputs


def check(
    statistics: Mapping[str, Statistics], exempt: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """Judge whether ranges can be made.

    Args:
        statistics: See `observe`.
        exempt: Tensors that will not be quantized.

    Returns:
        Warnings for a report: tensors that hold one value only.

    Raises:
        DataError: A tensor holds NaN or infinite values; names the first one in the graph.
    """
    judged = [seen for name, seen in statistics.items() if name not in exempt]
    bad = [seen for seen in judged if not seen.finite]
    if bad:
        first = bad[0]
        others = f"; {len(bad) - 1} more after it" if len(bad) > 1 else ""
        raise DataError(
            f"tensor {first.name} has {first.nan} NaN and {first.infinite} infinite values on the "
            f"calibration images{others}: the network overflows, so check the checkpoint, or leave "
            "this tensor in float32"
        )
    return tuple(
        f"tensor {seen.name} is {seen.low:g} on all calibration images: its range says nothing"
        for seen in judged
        if seen.constant
    )
