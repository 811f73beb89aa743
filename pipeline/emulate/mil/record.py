"""What an evaluation of an ML Program tells about its tensors: magnitudes, and whose they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.emulate.mil.program import Operation

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FLOAT16_LARGEST = 65504.0
FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_OVERFLOW = 65520.0  # from here on rounding gives infinity
_FLOAT16_UNDERFLOW = 2.0**-25  # up to here rounding gives zero

# What converters and coremltools' compressions append to the name of a torch value.
_SUFFIX = re.compile(r"_((cast|to)_fp(16|32)(_\d+)?|palettized|quantized|sparsified)$")
_PARAMETER = re.compile(r"^[pb]_(?P<module>.+)_(weight|bias|running_mean|running_var)$")


@dataclass(slots=True)
class TensorRange:
    """Magnitudes of one tensor over all images evaluated so far, before rounding.

    Attributes:
        name: The tensor's name in the program.
        operation: The operation that makes it.
        line: That operation's line in the program.
        module: The torch module it comes from, "" where that is not known.
        largest: Largest magnitude; infinite or NaN values are not counted here.
        elements: Elements seen.
        overflows: Elements that are not finite in float16.
        subnormals: Elements that are subnormal in float16, which some hardware makes zero.
        vanished: Elements other than zero that become zero in float16.
    """

    name: str
    operation: str
    line: int
    module: str = ""
    largest: float = 0.0
    elements: int = 0
    overflows: int = 0
    subnormals: int = 0
    vanished: int = 0

    @property
    def headroom(self) -> float:
        """How many times larger values may get before float16 overflows."""
        return FLOAT16_LARGEST / self.largest if self.largest else float("inf")

    def add(self, measured: Tensor) -> None:
        """Count what `magnitudes` found in a tensor."""
        elements, overflows, vanished, subnormals, largest = measured.tolist()
        self.elements += int(elements)
        self.overflows += int(overflows)
        self.vanished += int(vanished)
        self.subnormals += int(subnormals)
        self.largest = max(self.largest, largest)

    def merge(self, other: TensorRange) -> None:
        """Take other images of the same tensor into account."""
        self.elements += other.elements
        self.overflows += other.overflows
        self.vanished += other.vanished
        self.subnormals += other.subnormals
        self.largest = max(self.largest, other.largest)


def magnitudes(value: Tensor) -> Tensor:
    """Measure a tensor for `TensorRange.add`.

    Args:
        value: Any shape.

    Returns:
        float64: the numbers of elements, of those that overflow, vanish and become subnormal in
        float16, and the largest finite magnitude. A tensor, so that `torch.vmap` can measure many.
    """
    size = value.abs()
    vanished = (size > 0) & (size <= _FLOAT16_UNDERFLOW)
    subnormal = (size > _FLOAT16_UNDERFLOW) & (size < FLOAT16_SMALLEST_NORMAL)
    finite = torch.where(size.isfinite(), size, 0.0).flatten()
    # The zero stands for a tensor without elements.
    largest = torch.cat([finite, finite.new_zeros(1)]).max()
    counts = [(~(size < _FLOAT16_OVERFLOW)).sum(), vanished.sum(), subnormal.sum()]
    elements = torch.tensor(value.numel())
    return torch.stack([number.double() for number in (elements, *counts, largest)])


def joined(parts: Iterable[Iterable[TensorRange]]) -> list[TensorRange]:
    """Magnitudes over all images, from those over parts of them."""
    found: dict[str, TensorRange] = {}
    for part in parts:
        for entry in part:
            if entry.name in found:
                found[entry.name].merge(entry)
            else:
                found[entry.name] = replace(entry)
    return list(found.values())


def torch_name(tensor: str) -> str:
    """The name of the torch graph's value behind a tensor of the program.

    `conv2d_3_cast_fp16` comes from `conv2d_3`: converters append what they did to the value.
    """
    stripped = _SUFFIX.sub("", tensor)
    return tensor if not stripped else stripped if stripped == tensor else torch_name(stripped)


def owner(operation: Operation) -> str:
    """The torch module whose parameters an operation uses, "" if their names do not tell.

    A saved program keeps the parameters' names alone, with underscores for dots:
    `p_stages_0_blocks_1_fc1_weight_to_fp16` gives `stages_0_blocks_1_fc1`. Parameters that a
    conversion computed (a folded BatchNorm) have none. `module_owners` knows better where the
    exported program is at hand.
    """
    named = ("weight", "gamma", "y", "x", "beta", "bias")
    for parameter in [*named, *(key for key in operation.inputs if key not in named)]:
        for source in operation.inputs.get(parameter, ()):
            found = _PARAMETER.match(torch_name(source)) if isinstance(source, str) else None
            if found:
                return found["module"]
    return ""


def module_owners(exported: ExportedProgram) -> dict[str, str]:
    """Map the values of an exported torch program to the dotted names of their modules.

    Together with `torch_name` this finds the module of a program's tensor.

    Args:
        exported: What was given to the converter.
    """
    owners = {}
    for node in exported.graph.nodes:
        # From the network down: {key: (path, class)}.
        stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
        if stack:
            owners[node.name] = str(list(stack.values())[-1][0])
    return owners
