"""Typed values as plain ones for JSON, and back: the one place where keys are read.

A class names its fields and their types once. Reading is strict: a missing key, an unknown one or
a value of another type is one error that says which.

JSON itself comes in by `parse_json` and `read_json` alone, which limit its size and depth.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.core.inputs import read_at_most
from pipeline.core.words import in_short, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MORE = "more"
"""Field of `Facts` for whatever else was written down."""


MOST_BYTES = 100_000_000
"""Largest JSON that is read; a performance report of Xcode has some megabytes."""

MOST_LEVELS = 64
"""Deepest nesting: far more than anything that is read here has, far less than Python can take."""


def read_json(path: Path, kind: type[PipelineError] = ArtifactError, most: int = MOST_BYTES) -> Any:
    """Read a JSON file that anybody may have written.

    Args:
        path: The file.
        kind: The error to raise.
        most: Largest size in bytes.

    Raises:
        PipelineError: Of that kind, for whatever keeps it from being read; in one line.
    """
    try:
        # Opened without waiting: a pipe in its place would be waited for without end.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise kind(f"{path} is no file, but a folder, a device or a pipe")
            data = read_at_most(stream, most + 1)
    except FileNotFoundError as error:
        raise kind(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise kind(f"{path} is no file, but a folder, a device or a pipe") from error
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a null character
        raise kind(f"{shown(path)} is no path") from error
    return parse_json(data, str(path), kind, most)


def parse_json(
    data: str | bytes, where: str, kind: type[PipelineError] = ArtifactError, most: int = MOST_BYTES
) -> Any:
    """The values of JSON that anybody may have written.

    Args:
        data: The text, UTF-8 if it is bytes.
        where: What it is from, for messages.
        kind: The error to raise.
        most: Largest size in bytes, or characters.

    Raises:
        PipelineError: Of that kind: it is too large or too deep, no JSON, or names a key twice.
    """
    if len(data) > most:
        raise kind(f"{where} is larger than {most / 1e6:g} MB")
    try:
        content = json.loads(data, object_pairs_hook=_distinct)
    except _DoubledError as error:
        raise kind(f"{where} names {shown(error)!r} twice") from error
    except RecursionError as error:
        raise kind(f"{where} is nested deeper than {MOST_LEVELS} levels") from error
    except ValueError as error:  # of JSON's grammar, of UTF-8, or a number of too many digits
        raise kind(f"{where} is no JSON ({in_short(error).partition(': ')[2][:120]})") from error
    if _depth_exceeds(content, MOST_LEVELS):
        raise kind(f"{where} is nested deeper than {MOST_LEVELS} levels")
    return content


class _DoubledError(Exception):
    """A key that an object names twice: which value counts is anybody's guess."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DoubledError(key)
            seen.add(key)
    return made


_CONTAINERS = {dict, list}


def _depth_exceeds(content: Any, most: int) -> bool:
    """Whether containers lie deeper in each other; level by level, without recursion.

    Args:
        content: What `json` made of a text: of no types but those it makes.
        most: So many levels are fine.
    """
    level = [content] if type(content) in _CONTAINERS else []
    for _ in range(most):
        inner: list[Any] = []
        for value in level:
            items = value.values() if type(value) is dict else value
            # Most lists hold numbers alone, thousands of them: these are passed over at once.
            if not _CONTAINERS.isdisjoint(map(type, items)):
                inner += [item for item in items if type(item) in _CONTAINERS]
        if not inner:
            return False
        level = inner
    return True


@dataclass(frozen=True)
class Plain:
    """Base of dataclasses that are written as plain values, and read back."""

    # What pydantic looks for in a dataclass: without it, unknown keys would be dropped in silence.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, by the fields' names."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_dict`.

        Args:
            values: Plain values.
            where: What they are from, for messages.

        Raises:
            ArtifactError: A key is missing or unknown, or a value is of another type.
        """
        from pydantic import ValidationError

        try:
            # As JSON, lists become tuples and text becomes enumerations, while all else is strict.
            read: Self = _reader(cls).validate_json(json.dumps(values), strict=True)
            return read
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ArtifactError(f"{where}: {place}: {first['msg']}") from error


@dataclass(frozen=True)
class Facts(Plain):
    """Base of what a stage or a target tells of an artifact.

    Where a class has a field `more`, it takes whatever else was written down; else that is dropped.
    """

    def to_facts(self) -> dict[str, Any]:
        """The facts of an artifact, all on one level."""
        own = self.to_dict()
        more = own.pop(MORE, {})
        return {**own, **more}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_facts`.

        Args:
            facts: The facts of an artifact.
            where: Which artifact, for messages.

        Raises:
            ArtifactError: A fact is missing or of another type.
        """
        names = {field.name for field in fields(cls)}
        own: dict[str, Any] = {key: facts[key] for key in facts if key in names}
        if MORE in names:
            own[MORE] = {key: value for key, value in facts.items() if key not in names}
        return cls.from_dict(own, where)


_READERS: dict[type[Plain], TypeAdapter[Any]] = {}


def _reader(cls: type[Plain]) -> TypeAdapter[Any]:
    """What reads a class; made once, since making one takes some milliseconds."""
    from pydantic import TypeAdapter

    if cls not in _READERS:
        _READERS[cls] = TypeAdapter(cls)
    return _READERS[cls]


_PLAIN = {str, int, float, bool, type(None)}


def plain(value: Any) -> Any:
    """A value, or one that holds such, as JSON can express it."""
    if type(value) in _PLAIN:  # nearly all: results have ten thousands of them
        return value
    if type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value)):
        return list(value)  # most lists hold numbers alone
    if isinstance(value, Plain):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
