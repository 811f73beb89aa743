"""Reading the constants of an ML Program: immediate values and records of its weight file.

The program refers to large constants by file and offset. At the offset lies a record of 64 bytes,
little-endian: the sentinel 0xDEADBEEF and the kind of number (4 bytes each), the size of the data
in bytes and where it starts (8 bytes each). Numbers narrower than a byte are packed, the first in
the least significant bits; an index may straddle two bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError

Array = NDArray[Any]
Value = Array | str | list[str] | list[int]
"""A constant: numbers of any shape, one string, or a list (class labels)."""

_RECORD = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF

# Kind of number in a weight record -> its name in the program's types.
_RECORD_KINDS = {
    1: "FLOAT16",
    2: "FLOAT32",
    3: "UINT8",
    4: "INT8",
    5: "BFLOAT16",
    6: "INT16",
    7: "UINT16",
    8: "INT4",
    9: "UINT1",
    10: "UINT2",
    11: "UINT4",
    12: "UINT3",
    13: "UINT6",
    14: "INT32",
    15: "UINT32",
}
_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
}
_PACKED_BITS = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6, "INT4": 4}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a value: `dtype` as the format names it (FLOAT16), None for unknown sizes."""

    dtype: str
    shape: tuple[int | None, ...] = ()


def tensor_type(value_type: Any) -> TensorType:
    """Read a `ValueType` message; of anything but a tensor (a dictionary, a list) only the kind."""
    kind = value_type.WhichOneof("type")
    if kind != "tensorType":
        return TensorType(str(kind or "unknown"))
    tensor = value_type.tensorType
    names = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    shape = tuple(
        int(size.constant.size) if size.WhichOneof("dimension") == "constant" else None
        for size in tensor.dimensions
    )
    return TensorType(names[tensor.dataType].name, shape)


def unpack_bits(packed: bytes | Array, bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack `count` unsigned numbers of `bits` bits, the first in the least significant bits."""
    data = np.frombuffer(packed, np.uint8) if isinstance(packed, bytes) else packed.view(np.uint8)
    digits = np.unpackbits(data, bitorder="little", count=bits * count).reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    numbers: NDArray[np.uint8] = (digits * weights).sum(axis=1, dtype=np.uint8)
    return numbers


class ConstantReader:
    """Reads constants, immediate or from weight files, into numpy arrays.

    Args:
        root: The folder that `@model_path` in file names stands for.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, Array] = {}

    def read(self, value: Any, where: str) -> Value:
        """Read a `Value` message; `where` names the constant in messages.

        Raises:
            ArtifactError: The weight file is missing or does not hold the constant.
            UnsupportedOperatorError: A kind of value that is not known.
        """
        if value.WhichOneof("value") == "blobFileValue":
            return self._from_file(value, where)
        immediate = value.immediateValue
        kind = immediate.WhichOneof("value")
        if kind == "list":
            entries = [self.read(entry, where) for entry in immediate.list.values]
            if all(isinstance(entry, str) for entry in entries):
                return [str(entry) for entry in entries]
            return [int(np.asarray(entry).reshape(())) for entry in entries]
        if kind != "tensor":
            raise UnsupportedOperatorError(f"constant '{where}': a value of kind '{kind}'")
        return self._from_tensor(value, where)

    def _from_tensor(self, value: Any, where: str) -> Value:
        kind = tensor_type(value.type)
        tensor = value.immediateValue.tensor
        field_name = tensor.WhichOneof("value")
        values = getattr(tensor, field_name).values
        if kind.dtype == "STRING":
            return [*values] if kind.shape else str(values[0])
        shape = _fixed_shape(kind, where)
        if field_name == "bytes":
            return _decode(values, kind.dtype, shape, where)
        return np.array(values, _numpy_type(kind.dtype, where)).reshape(shape)

    def _from_file(self, value: Any, where: str) -> Value:
        kind = tensor_type(value.type)
        shape = _fixed_shape(kind, where)
        name, offset = value.blobFileValue.fileName, value.blobFileValue.offset
        weights = self._open(name)
        path = self._root / name
        if offset + _RECORD.size > weights.size:
            raise ArtifactError(
                f"weight file {path} is cut off: constant '{where}' should be at byte {offset},"
                f" the file has {weights.size}; copy the package again"
            )
        sentinel, stored, size, start = _RECORD.unpack(
            weights[offset : offset + _RECORD.size].tobytes()
        )
        if sentinel != _SENTINEL:
            raise ArtifactError(
                f"weight file {path} does not belong to this program: no record at byte {offset},"
                f" where constant '{where}' should be"
            )
        if _RECORD_KINDS.get(stored) != kind.dtype:
            raise ArtifactError(
                f"weight file {path} does not belong to this program: constant '{where}' is"
                f" {kind.dtype}, its record is {_RECORD_KINDS.get(stored, f'of kind {stored}')}"
            )
        if start + size > weights.size:
            raise ArtifactError(
                f"weight file {path} is cut off: constant '{where}' ends at byte {start + size},"
                f" the file has {weights.size}; copy the package again"
            )
        return _decode(weights[start : start + size], kind.dtype, shape, where)

    def _open(self, name: str) -> Array:
        if name not in self._files:
            relative = PurePosixPath(name.removeprefix("@model_path/"))
            if relative.is_absolute() or ".." in relative.parts:
                raise ArtifactError(f"the program asks for weights outside its package: '{name}'")
            path = self._root / relative
            if not path.is_file():
                raise ArtifactError(
                    f"weight file {path} is missing; copy the whole package, not its specification"
                )
            # A file of length 0 cannot be mapped.
            mapped = path.stat().st_size > 0
            self._files[name] = np.memmap(path, np.uint8, "r") if mapped else np.empty(0, np.uint8)
        return self._files[name]


def _decode(data: bytes | Array, dtype: str, shape: tuple[int, ...], where: str) -> Array:
    """Turn stored bytes into an array, packed numbers into one byte each."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = _PACKED_BITS.get(dtype)
    width = bits if bits else 8 * np.dtype(_numpy_type(dtype, where)).itemsize
    size = len(data)
    if size != -(-count * width // 8):
        raise ArtifactError(
            f"constant '{where}' of type {dtype} and shape {list(shape)} is stored in {size} bytes;"
            " the package is damaged: build it again"
        )
    if bits is None:
        raw = data if isinstance(data, bytes) else data.tobytes()
        return np.frombuffer(raw, _numpy_type(dtype, where)).reshape(shape)
    unpacked = unpack_bits(data, bits, count).reshape(shape)
    # int4: move the sign bit of the nibble to that of the byte, and back with its sign.
    return (unpacked << 4).view(np.int8) >> 4 if dtype == "INT4" else unpacked


def _numpy_type(dtype: str, where: str) -> type[np.generic]:
    if dtype not in _NUMPY_TYPES:
        raise UnsupportedOperatorError(f"constant '{where}': numbers of type {dtype}")
    return _NUMPY_TYPES[dtype]


def _fixed_shape(kind: TensorType, where: str) -> tuple[int, ...]:
    sizes = tuple(size for size in kind.shape if size is not None)
    if len(sizes) != len(kind.shape):
        raise ArtifactError(f"constant '{where}' has no fixed shape; the package is damaged")
    return sizes
