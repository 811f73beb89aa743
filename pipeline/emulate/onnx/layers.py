"""Where a graph departs from the float32 graph that it was made from, layer by layer.

Rewriting a graph into another precision keeps the names of its tensors: those that both graphs have
are compared. The graph runs twice: as it is, so that errors add up as they do on a device; and with
the reference's value in the place of each such tensor as soon as it is computed, which shows what
each layer errs by itself.

    errors = compare(Path("precision/float16/model.onnx"), Path("onnx/model.onnx"), images)
    first = jump(errors)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Images, whole_batches
from pipeline.emulate import rounding
from pipeline.emulate.layers import LayerError
from pipeline.emulate.onnx.executor import OnnxExecutor, check_images
from pipeline.emulate.onnx.graph import Node, graph_name, refuse_nan

Array = npt.NDArray[Any]
Values = Mapping[str, Array]

_CLOSE = 0.25
"""Relative error up to which a tensor counts as the reference's in other units."""


def compare(
    built: Path | onnx.ModelProto,
    reference: Path | onnx.ModelProto,
    images: Images,
    *,
    tf32: bool = False,
) -> list[LayerError]:
    """Compare the tensors that two graphs of one network share.

    Args:
        built: The graph in its precision.
        reference: The float32 graph that it was made from.
        images: Preprocessed images, (batch, channels, height, width); a graph with a fixed batch
            gets the first ones again where they fill no whole one.
        tf32: See `GraphExecutor`.

    Returns:
        In the order of the graph: every floating-point tensor that the reference has too.

    Raises:
        ArtifactError: A graph cannot be read or run; the two are of different networks; a constant
            or a tensor of the reference is not finite, so that nothing can be compared.
        DataError: The images do not fit.
    """
    return Comparison(built, reference, tf32=tf32).errors(images)


class Comparison:
    """Two graphs of one network, ready to be compared.

    Args and errors: as for `compare`.
    """

    def __init__(
        self,
        built: Path | onnx.ModelProto,
        reference: Path | onnx.ModelProto,
        *,
        tf32: bool = False,
    ) -> None:
        self.titles = graph_name(built), graph_name(reference)
        refuse_nan(reference)
        refuse_nan(built)
        self.built = OnnxExecutor(built, tf32=tf32)
        self.reference = OnnxExecutor(reference)
        self._quantized = any(step.op_type == "DequantizeLinear" for step in self.built.nodes())
        self._makers: dict[str, Node] = {}
        self._units: dict[str, Array] = {}

    def errors(self, images: Images) -> list[LayerError]:
        """See `compare`."""
        check_images(images, self.reference.input)
        size = self.built.input.shape[0] or self.reference.input.shape[0] or 1
        filled = whole_batches(images, size)
        layers: dict[str, _Layer] = {}
        for start in range(0, len(filled), size):
            part = filled[start : start + size]
            check_images(part, self.built.input)
            expected = self.expected(part)
            self._own(part, expected, layers)
            self._accumulated(part, expected, layers)
        if not layers:
            raise ArtifactError(
                f"{self.titles[0]} has no tensor of {self.titles[1]}: it is of another network"
            )
        return [layer.error() for layer in layers.values()]

    def expected(self, images: Images) -> dict[str, Array]:
        """Every floating-point tensor of the reference, by name.

        Raises:
            ArtifactError: One is not finite.
        """
        values: dict[str, Array] = {}
        for node, written in self.reference.trace({self.reference.input.name: images}):
            for name, value in written.items():
                if value.dtype.kind != "f":
                    continue
                if not np.isfinite(value).all():
                    raise ArtifactError(
                        f"{self.titles[1]}: {name} ({node.op_type}) is not finite in float32: the "
                        "network itself is out of any range, and no precision mends that"
                    )
                values[name] = value
                self._makers[name] = node
        return values

    def forced(self, images: Images, expected: Values) -> Iterator[tuple[Node, Values]]:
        """Run what was built with each tensor replaced by the reference's; see `trace`."""
        known = {name: value for name, value in expected.items() if name != self.built.input.name}
        for node, written in self.built.trace({self.built.input.name: images}, known):
            for name in written.keys() & known.keys():
                # Of later batches too: these are read after the next step only.
                known[name] = self._in_units(name, written[name], expected[name])
            yield node, written

    def _in_units(self, name: str, found: Array, expected: Array) -> Array:
        """The reference's value in the units that a quantized graph may hold a tensor in."""
        if name not in self._units:
            self._units[name] = _units(found, expected) if self._quantized else np.ones(1)
        return (expected * self._units[name]).astype(expected.dtype)

    def _own(self, images: Images, expected: Values, layers: dict[str, _Layer]) -> None:
        # What has no counterpart belongs to the layer that reads it.
        passed: dict[str, str] = {}
        for line, (node, written) in enumerate(self.forced(images, expected), 1):
            read = [passed[name] for name in node.inputs if name in passed]
            for name, value in written.items():
                dtype = _narrowest([rounding.name(self.built.dtype(name)), *read])
                if name in expected and value.dtype.kind == "f":
                    layer = layers.setdefault(name, _Layer(self._makers[name], name, line, dtype))
                    layer.own.add(value, self._in_units(name, value, expected[name]))
                else:
                    passed[name] = dtype

    def _accumulated(self, images: Images, expected: Values, layers: dict[str, _Layer]) -> None:
        left = {name for name in layers if name in expected}
        try:
            for _, written in self.built.trace({self.built.input.name: images}):
                for name in left & written.keys():
                    value = written[name]
                    layers[name].whole.add(value, self._in_units(name, value, expected[name]))
                    left.discard(name)
        except ArtifactError:
            # A shape that is wrong in one layer does not fit the next: what comes is unknown.
            for name in left:
                layers[name].whole.unknown()


@dataclass
class _Error:
    """The error of a tensor over several batches."""

    difference: float = 0.0
    norm: float = 0.0
    largest: float = 0.0

    def unknown(self) -> None:
        self.difference = self.largest = float("nan")

    def add(self, found: Array, expected: Array) -> None:
        if found.shape != expected.shape:
            self.unknown()
            return
        with np.errstate(invalid="ignore"):
            difference = found.astype(np.float64) - expected.astype(np.float64)
        if not np.isfinite(difference).all():
            difference = np.full(1, np.nan)
        self.difference += float((difference**2).sum())
        self.norm += float((expected.astype(np.float64) ** 2).sum())
        self.largest = float(np.maximum(self.largest, np.abs(difference).max(initial=0.0)))

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.difference / max(self.norm, float(np.finfo(np.float32).tiny))))


@dataclass
class _Layer:
    """One tensor that both graphs have.

    Attributes:
        maker: The reference's node that makes it, which knows its module.
        tensor: Its name.
        line: Place of its node in what was built.
        dtype: See `LayerError`.
        own: See `LayerError`.
        whole: The error that has added up.
    """

    maker: Node
    tensor: str
    line: int
    dtype: str
    own: _Error = field(default_factory=_Error)
    whole: _Error = field(default_factory=_Error)

    def error(self) -> LayerError:
        return LayerError(
            self.maker.module or self.maker.name,
            self.tensor,
            self.maker.op_type,
            self.line,
            self.whole.relative,
            self.whole.largest,
            self.own.relative,
            self.dtype,
        )


def _units(found: Array, expected: Array) -> Array:
    """By what each channel was multiplied, to fit a tensor in 8 bits; one for all if by nothing.

    Equalization takes powers of two that differ from channel to channel, and the layer that reads
    the tensor undoes them. One factor for all channels is none of its doing.
    """
    same = np.ones(1)
    if found.shape != expected.shape or found.ndim < 2:
        return same
    axis = 1 if found.ndim == 4 else found.ndim - 1
    others = tuple(a for a in range(found.ndim) if a != axis)
    wide, right = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(all="ignore"):
        ratio = (wide * right).sum(others, keepdims=True) / (right**2).sum(others, keepdims=True)
        exponents = np.where(ratio > 0, np.round(np.log2(ratio)), 0.0)
    if not np.isfinite(exponents).all() or np.unique(exponents).size < 2:
        return same
    units: Array = 2.0**exponents
    before, after = _Error(), _Error()
    before.add(found, right)
    after.add(found, right * units)
    fits = after.relative <= min(_CLOSE, before.relative / 2)
    return units if fits else same


def _narrowest(dtypes: list[str]) -> str:
    """The type of the fewest bits, integers of index computations left out."""
    known = [name for name in dtypes if name in _BITS]
    return min(known, key=_BITS.__getitem__, default=dtypes[0])


_BITS = {
    rounding.name(dtype): bits
    for dtype, bits in {
        rounding.INT4: 4,
        rounding.UINT4: 4,
        torch.int8: 8,
        torch.uint8: 8,
        **dict.fromkeys(rounding.FLOAT8, 8),
        torch.float16: 16,
        torch.bfloat16: 16,
        torch.float32: 32,
        torch.float64: 64,
    }.items()
}
