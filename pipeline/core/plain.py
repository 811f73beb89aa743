"""Typed values as plain ones for JSON, and back: the one place where keys are read.

A class names its fields and their types once. Reading is strict: a missing key, an unknown one or
a value of another type is one error that says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.core.errors import ArtifactError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MORE = "more"
"""Field of `Facts` for whatever else was written down."""


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


def plain(value: Any) -> Any:
    """A value, or one that holds such, as JSON can express it."""
    if isinstance(value, Plain):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
