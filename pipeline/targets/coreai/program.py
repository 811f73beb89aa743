"""A saved Core AI program as plain values: operations, types and constants, without the compiler.

Read with Apple's own reader of the format (`coreai-core`), so that what is looked at is what the
runtime loads. Nothing here keeps a value of the compiler: its context ends with the reading.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ArtifactError

MAIN = "main"
"""The function that an asset of ours has."""

_MAGIC = b"ML\xefR"  # of MLIR's bytecode
_PREFIX = "coreai."
_DECOMPOSABLE = "decomposable.broadcasting_"
_BITS_OF_A_BYTE = 8


@dataclass(frozen=True)
class TensorType:
    """Type of a value.

    Attributes:
        dtype: "f32", "f16", "i1", "si32", "ui8", "ui4", … as the format writes it.
        shape: Its axes.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        kind: Without the dialect's name, and without "decomposable.broadcasting_".
        inputs: Numbers of the values that it takes.
        outputs: Numbers of the values that it gives, and their types.
        attributes: Those of text, by name.
        constant: The value of a constant; integers of less than 8 bits in 8.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, TensorType], ...]
    attributes: Mapping[str, str]
    constant: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class Graph:
    """A function of the program, or a part that functions call.

    Attributes:
        inputs: Name, number and type of each.
        outputs: Name and number of each; parts have no names.
        operations: In order.
    """

    inputs: tuple[tuple[str, int, TensorType], ...]
    outputs: tuple[tuple[str, int], ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        graphs: By name.
    """

    graphs: Mapping[str, Graph]

    @property
    def main(self) -> Graph:
        """The function that is run."""
        return self.graphs[MAIN]

    def operations(self) -> Iterator[Operation]:
        """All operations that compute, those of called parts as often as they are called."""
        yield from self._of(self.main)

    def _of(self, graph: Graph) -> Iterator[Operation]:
        for operation in graph.operations:
            if operation.kind == "invoke":
                yield from self._of(self.graphs[operation.attributes["callee"]])
            elif operation.kind != "constant":
                yield operation

    def counts(self) -> Counter[str]:
        """How often each kind of operation computes."""
        return Counter(operation.kind for operation in self.operations())


def read(bytecode: Path) -> Program:
    """Read a program's bytecode.

    Args:
        bytecode: The file of an asset; `package.checked` has found it undamaged.

    Raises:
        ArtifactError: The compiler does not read it, or it has no function `main`.
    """
    with bytecode.open("rb") as stream:
        # On a file of another format the compiler ends the process.
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ArtifactError(f"{bytecode} is no Core AI program: build it again")
    # Before other parts of the package, which import each other in a circle otherwise.
    import coreai.authoring  # noqa: F401
    from coreai._compiler._mlir_libs._coreaiIR._bindings.compiler import load_module_from_bytecode
    from coreai.authoring import Context

    try:
        # The context has to outlive what is read in it.
        context = Context()
        module = load_module_from_bytecode(context=context._mlir_context, path=bytecode)
        graphs = {op.sym_name.value: _graph(op) for op in module.body.operations}
    # The bindings raise whatever the compiler says, by several types of their own.
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"{bytecode} is no program that this Core AI reads: {reason}"
        ) from error
    if MAIN not in graphs:
        raise ArtifactError(f"{bytecode} has no function {MAIN}, only {', '.join(sorted(graphs))}")
    return Program(graphs)


def _graph(op: Any) -> Graph:
    numbers: dict[Any, int] = {}

    def number(value: Any) -> int:
        return numbers.setdefault(value, len(numbers))

    inputs = tuple(
        (_named(attribute), number(value), _type(value.type))
        for attribute, value in zip(op.arg_attrs, op.arguments, strict=True)
    )
    operations: list[Operation] = []
    outputs: tuple[tuple[str, int], ...] = ()
    for inner in op.bodyRegion.blocks[0].operations:
        if inner.name == "coreai.output":
            names = [_named(attribute) for attribute in op.res_attrs]
            outputs = tuple(zip(names, map(number, inner.operands), strict=True))
        else:
            operations.append(_operation(inner, number))
    return Graph(inputs, outputs, tuple(operations))


def _named(attributes: Any) -> str:
    return str(attributes["coreai.name"].value) if "coreai.name" in attributes else ""


def _operation(op: Any, number: Any) -> Operation:
    kind = op.name.removeprefix(_PREFIX).removeprefix(_DECOMPOSABLE)
    return Operation(
        kind=kind,
        inputs=tuple(number(value) for value in op.operands),
        outputs=tuple((number(value), _type(value.type)) for value in op.results),
        attributes=_attributes(op),
        constant=_constant(op) if kind == "constant" else None,
    )


def _attributes(op: Any) -> dict[str, str]:
    found = {}
    for name in ("approximate", "padding_mode", "interpolation_mode", "callee"):
        if name in op.attributes:
            found[name] = _word(str(op.attributes[name]))
    return found


def _word(text: str) -> str:
    """The name in an attribute such as `#coreai.approximate<tanh>` or `#param.constant<@part>`."""
    found = re.search(r"<@?(\w+)>", text)
    return found.group(1) if found else text


def _type(kind: Any) -> TensorType:
    return TensorType(str(kind.element_type), tuple(int(size) for size in kind.shape))


def _constant(op: Any) -> npt.NDArray[Any]:
    kind = _type(op.results[0].type)
    found = np.array(op.attributes["value"])
    if found.dtype == np.object_ or bits(kind.dtype) < _BITS_OF_A_BYTE:
        return _resource(op, kind)
    return np.broadcast_to(found, kind.shape)


def _resource(op: Any, kind: TensorType) -> npt.NDArray[Any]:
    """A constant that lies in the file as it is in memory."""
    from coreai._compiler._mlir_libs._coreaiIR import _bindings

    count, width = math.prod(kind.shape), bits(kind.dtype)
    if width == 1:
        return np.broadcast_to(np.array(op.attributes["value"]), kind.shape)
    buffer = np.zeros(-(-count * width // _BITS_OF_A_BYTE), np.uint8)
    _bindings.compiler.copy_constant_value_to_array(constant_op=op, destination=buffer)
    if width < _BITS_OF_A_BYTE:
        return unpack(buffer, width, count, signed=kind.dtype.startswith("si")).reshape(kind.shape)
    return buffer.view(_numpy(kind.dtype)).reshape(kind.shape)


def bits(dtype: str) -> int:
    """Bits of a number of a type."""
    digits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits.isdecimal() else _BITS_OF_A_BYTE


def _numpy(dtype: str) -> npt.DTypeLike:
    kinds = {"f": "float", "bf": "bfloat", "si": "int", "ui": "uint", "i": "int"}
    letters = dtype.rstrip("0123456789")
    if letters not in kinds or kinds[letters] == "bfloat":
        raise ValueError(f"constants of type {dtype} are not read")
    return np.dtype(f"{kinds[letters]}{bits(dtype)}")


def unpack(
    packed: npt.NDArray[np.uint8], width: int, count: int, *, signed: bool
) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """Numbers of fewer than 8 bits that lie one after the other, the lowest bits first.

    Args:
        packed: (bytes,).
        width: Bits of a number.
        count: How many there are.
        signed: Two's complement.

    Returns:
        (count,).
    """
    stream = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
    numbers = stream.astype(np.int16) @ (1 << np.arange(width, dtype=np.int16))
    if signed:
        return np.where(numbers >= 1 << (width - 1), numbers - (1 << width), numbers).astype(
            np.int8
        )
    return numbers.astype(np.uint8)
