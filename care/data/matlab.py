"""Just enough of MATLAB's format (level 5) to read `meta.mat` of ImageNet's development kit.

It states which class each number of the ground truth means. torchvision reads it by scipy, which
nothing else here needs.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_HEADER = 128
_LARGEST = 50_000_000
"""Bytes of an unpacked element; that of the development kit has half a million."""

_DEEPEST = 8

_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
            12: "<i8", 13: "<u8"}  # fmt: skip
_MATRIX, _COMPRESSED, _UTF8, _UTF16 = 14, 15, 16, 17
_STRUCT, _CHARACTERS = 2, 4


def read_structs(data: bytes, name: str) -> list[dict[str, Any]]:
    """The elements of an array of structs.

    Args:
        data: The file.
        name: Of the variable.

    Returns:
        For each struct its fields: text, lists of numbers, or lists of structs.

    Raises:
        ValueError: It is no such file, or has no such variable.
    """
    if data[126:128] != b"IM":
        raise ValueError("it is no MAT-file of level 5")
    try:
        for kind, content in _elements(data[_HEADER:]):
            if kind == _COMPRESSED:
                kind, content = next(_elements(_unpacked(content)))
            if kind != _MATRIX:
                continue
            found, value = _matrix(content, 0)
            if found == name and isinstance(value, list):
                return value
    except (struct.error, IndexError, KeyError, StopIteration, zlib.error, TypeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    raise ValueError(f"it has no variable {name}")


def _unpacked(content: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    plain = unpacking.decompress(content, _LARGEST)
    if unpacking.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {_LARGEST:,} bytes")
    return plain


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element."""
    at = 0
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<II", data, at)
        if kind >> 16:  # up to four bytes stand in the place of the length
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        if at + 8 + length > len(data):
            raise ValueError("it is truncated")
        yield kind, data[at + 8 : at + 8 + length]
        padding = 0 if kind == _COMPRESSED else -length % 8
        at += 8 + length + padding


def _matrix(data: bytes, depth: int) -> tuple[str, Any]:
    """Name and value of an array."""
    if not data:
        return "", []
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    parts = list(_elements(data))
    kind, name = parts[0][1][0], parts[2][1].decode("ascii", "replace")
    if kind == _STRUCT:
        return name, _structs(parts[3:], depth)
    if kind == _CHARACTERS:
        code = {_UTF8: "utf-8", _UTF16: "utf-16-le", 4: "utf-16-le"}.get(parts[3][0], "latin-1")
        return name, parts[3][1].decode(code, "replace")
    if parts[3][0] not in _NUMBERS:
        return name, []  # cells and the like, which nothing here reads
    return name, np.frombuffer(parts[3][1], _NUMBERS[parts[3][0]]).tolist()


def _structs(parts: list[tuple[int, bytes]], depth: int) -> list[dict[str, Any]]:
    length = int.from_bytes(parts[0][1], "little")
    text = parts[1][1]
    fields = [
        text[at : at + length].split(b"\0")[0].decode("ascii")
        for at in range(0, len(text), max(length, 1))
    ]
    values = [_matrix(content, depth + 1)[1] for _, content in parts[2:]]
    rows = range(0, len(values), max(len(fields), 1))
    return [dict(zip(fields, values[at : at + len(fields)], strict=True)) for at in rows]
