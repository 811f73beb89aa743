"""Reading YAML with the line of every value, `${ENV}` and `extends:`.

An error in a configuration is worth nothing without the place where it is, also when the value came
from another file by `extends:`. So every value's file and line are kept beside the plain values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import ConfigError

KeyPath = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


@dataclass(frozen=True)
class Place:
    """File and line (from 1) of a value."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Document:
    """A YAML mapping with the places of its values.

    Attributes:
        values: Plain values.
        places: Where each value stands, by its path of keys; () is the document itself.
    """

    values: dict[str, Any]
    places: Mapping[KeyPath, Place]

    def place(self, path: KeyPath) -> Place:
        """Where a value stands, or else the nearest thing around it that is written down."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def read(path: Path, environment: Mapping[str, str] | None = None) -> Document:
    """Read a YAML file, with what it extends.

    `extends: other.yaml` (relative to the file) takes over the other file's values; mappings are
    merged key by key, everything else replaces. `${NAME}` and `${NAME:-default}` in text are filled
    from the environment; a value that is nothing but one variable is then read as YAML, so that
    numbers stay numbers.

    Args:
        path: The file.
        environment: Variables to fill in; None for those of the process.

    Raises:
        ConfigError: The file is missing, empty, no YAML mapping, extends itself, or names a
            variable that is not set.
    """
    variables = os.environ if environment is None else environment
    return _read(path, variables, ())


def _read(path: Path, variables: Mapping[str, str], extended_by: tuple[Path, ...]) -> Document:
    if path.resolve() in extended_by:
        raise ConfigError(f"{path} extends itself: remove one of the extends")
    node = _compose(path)
    reader = _Reader(path, variables)
    values = reader.convert(node, ())
    document = Document(values, reader.places)
    base = values.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise ConfigError(f"{document.place(('extends',))}: extends names one file")
    parent = _read(path.parent / base, variables, (*extended_by, path.resolve()))
    merged = _merge(parent.values, values)
    return Document(merged, {**parent.places, **document.places})


def _compose(path: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: name a configuration file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder: name the configuration file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: no valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if node is None:
        raise ConfigError(f"{path} is empty: start from the pipeline.yaml of this project")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: a configuration is a mapping of keys"
        )
    return node


class _Reader:
    """Turns YAML nodes into plain values and notes their places."""

    def __init__(self, file: Path, variables: Mapping[str, str]) -> None:
        self.file = file
        self.variables = variables
        self.places: dict[KeyPath, Place] = {}
        self.constructor = yaml.SafeLoader("")

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = place = Place(self.file, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            return self._fill(node.value, place)
        try:
            return self.constructor.construct_object(node)
        except yaml.YAMLError as error:
            raise ConfigError(f"{place}: {error}") from error

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self.constructor.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in values:
                raise ConfigError(f"{self.file}:{line}: {key} stands here twice: keep one")
            values[key] = self.convert(value_node, (*path, key))
            self.places[(*path, key)] = Place(self.file, line)
        return values

    def _fill(self, text: str, place: Place) -> Any:
        def value(match: re.Match[str]) -> str:
            found = self.variables.get(match["name"], match["default"])
            if found is None:
                raise ConfigError(
                    f"{place}: the environment variable {match['name']} is not set: set it, or "
                    f"write ${{{match['name']}:-default}}"
                )
            return found

        filled = _VARIABLE.sub(value, text)
        if _VARIABLE.fullmatch(text):
            return yaml.safe_load(filled)
        return filled


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return over
