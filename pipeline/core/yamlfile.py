"""Reading YAML with the line of every value, `${ENV}` and `extends:`.

An error in a configuration is worth nothing without the place where it is, also when the value came
from another file by `extends:`. So every value's file and line are kept beside the plain values.

Values are mappings, lists, text, numbers, true, false and null; a date is text. Sizes are limited,
before and after aliases are followed: ten lines of aliases of aliases stand for 10^10 values.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import ConfigError
from pipeline.core.inputs import decode_text, expanded, read_input
from pipeline.core.words import shown

KeyPath = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")

ENDINGS = (".yaml", ".yml")
"""How files that may be extended are called."""

# Far more than a configuration needs, and little enough to be read at once.
MOST_BYTES = 1_000_000
MOST_VALUES = 10_000
MOST_LEVELS = 50
MOST_CHARACTERS = 10_000
MOST_EXTENDED = 16
MOST = 2**63 - 1
"""Largest whole number."""

_STANDARD = "tag:yaml.org,2002:"
_MERGE = f"{_STANDARD}merge"
_MAPPING, _SEQUENCE = f"{_STANDARD}map", f"{_STANDARD}seq"
_SCALARS = tuple(f"{_STANDARD}{kind}" for kind in ("str", "int", "float", "bool", "null"))
_NO_VALUE_OF = {
    "int": "is no whole number",
    "float": "is no number",
    "bool": "is neither true nor false",
}

# How PyYAML's conversions refuse text that is not of the kind that its tag states.
_NO_VALUE = (ValueError, KeyError, IndexError, OverflowError, yaml.YAMLError)


@dataclass(frozen=True)
class Place:
    """File and line (from 1; 0 for what has no lines) of a value."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)


@dataclass(frozen=True)
class Document:
    """A YAML mapping with the places of its values.

    Attributes:
        values: Plain values.
        places: Where each value stands, by its path of keys; () is the document itself.
        filled: Paths of the values that are nothing but one variable's text.
    """

    values: dict[str, Any]
    places: Mapping[KeyPath, Place]
    filled: frozenset[KeyPath] = field(default=frozenset())

    def place(self, path: KeyPath) -> Place:
        """Where a value stands, or else the nearest thing around it that is written down."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


NAME_ONE = "name a configuration file"
"""What to do where a file cannot be read."""


def read(
    path: Path,
    environment: Mapping[str, str] | None = None,
    *,
    may_be_empty: bool = False,
    advice: str = NAME_ONE,
) -> Document:
    """Read a YAML file, with what it extends.

    `extends: other.yaml` (relative to the file, always .yaml or .yml) takes over the other file's
    values; mappings are merged key by key, everything else replaces. `${NAME}` and
    `${NAME:-default}` in text are filled from the environment. What is filled in is text, whatever
    it looks like; only a value that is one empty variable is null.

    Args:
        path: The file.
        environment: Variables to fill in; None for those of the process.
        may_be_empty: An empty file is an empty mapping.
        advice: What to do where the file is missing, or none.

    Raises:
        ConfigError: The file is missing, no file, too large, empty, no YAML mapping, extends
            itself, or names a variable that is not set.
    """
    variables = os.environ if environment is None else environment
    return _read(path, variables, (), may_be_empty, advice)


def value_of(text: str, where: str) -> Any:
    """Read a single value, such as that of an option.

    Args:
        text: YAML; variables in it are left alone.
        where: What the text is, for messages.

    Raises:
        ConfigError: The text is no valid YAML, or too much.
    """
    node = _compose(text, Path(where))
    return None if node is None else _Reader(Path(where), None).convert(node, ())


def plain(text: Any) -> Any:
    """A variable's text as the number, true or false that it reads as; else as it is."""
    try:
        value = value_of(str(text), "a variable")
    except ConfigError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _read(
    path: Path,
    variables: Mapping[str, str],
    extended_by: tuple[str, ...],
    may_be_empty: bool,
    advice: str,
) -> Document:
    text = decode_text(read_input(path, MOST_BYTES, ConfigError, advice), path, ConfigError)
    real = os.path.realpath(path)
    if real in extended_by:
        raise ConfigError(f"{path} extends itself: remove one of the extends")
    if len(extended_by) > MOST_EXTENDED:
        raise ConfigError(f"{path} is the end of more than {MOST_EXTENDED} extends: join the files")
    node = _compose(text, path)
    if node is None and may_be_empty:
        return Document({}, {(): Place(path, 1)})
    reader = _Reader(path, variables)
    values = reader.convert(_required_mapping(node, path), ())
    document = Document(values, reader.places, frozenset(reader.filled))
    base = values.pop("extends", None)
    if base is None:
        return document
    place = document.place(("extends",))
    if not isinstance(base, str):
        raise ConfigError(f"{place}: extends names one file")
    parent = _read(_extended(path, base, place), variables, (*extended_by, real), False, NAME_ONE)
    return _merged(parent, document)


def _extended(path: Path, base: str, place: Place) -> Path:
    """The file that another one extends; read once more by itself, so that it can be named."""
    parent = path.parent / expanded(base)
    # Messages quote what stands in a configuration; a file that is none may hold secrets.
    for name in (str(parent), os.path.realpath(parent) if os.path.lexists(parent) else ""):
        if name and not name.endswith(ENDINGS):
            raise ConfigError(
                f"{place}: extends: {shown(name, 300)} does not end in {' or '.join(ENDINGS)}: "
                f"{NAME_ONE}"
            )
    try:
        read_input(parent, MOST_BYTES, ConfigError, "name the file to extend")
    except ConfigError as error:
        raise ConfigError(f"{place}: extends: {error}") from error
    return parent


def _merged(parent: Document, document: Document) -> Document:
    filled = frozenset(path for path in parent.filled if path not in document.places)
    return Document(
        _merge(parent.values, document.values),
        {**parent.places, **document.places},
        filled | document.filled,
    )


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return over


def _required_mapping(node: yaml.Node | None, path: Path) -> yaml.MappingNode:
    if node is None:
        raise ConfigError(f"{path} is empty: start from the pipeline.yaml of this project")
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: a configuration is a mapping of keys")
    return node


class _Loader(yaml.SafeLoader):
    """Composes nodes up to a number and a depth; only text that no kind resembles is text."""

    # A date is text here: no setting is one, and 2025-02-30 would be an error.
    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in kinds if tag in (*_SCALARS, _MERGE)]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = 0
        self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See `yaml.composer.Composer`."""
        self.level += 1
        self.count += 1
        if self.level > MOST_LEVELS:
            raise self._refusal(f"it is nested deeper than {MOST_LEVELS} levels")
        if self.count > 2 * MOST_VALUES:  # keys count, too
            raise self._refusal(f"it holds more than {MOST_VALUES} values")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def _refusal(self, problem: str) -> yaml.YAMLError:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return yaml.composer.ComposerError(None, None, problem, mark)


def _compose(text: str, path: Path) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: no valid YAML: the character {chr(error.character)!r} is not allowed"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: no valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as "\UFFFFFFFF"
        raise ConfigError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error


class _Reader:
    """Turns YAML nodes into plain values and notes their places.

    Args:
        file: Where they come from.
        variables: What `${NAME}` stands for; None to leave it alone.
    """

    def __init__(self, file: Path, variables: Mapping[str, str] | None) -> None:
        self.file = file
        self.variables = variables
        self.places: dict[KeyPath, Place] = {}
        self.filled: set[KeyPath] = set()
        self.open: list[yaml.Node] = []
        self.count = 0

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = place = Place(self.file, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            self._enter(place)
            return self._scalar(node, path, place)
        if any(node is outer for outer in self.open):
            raise ConfigError(f"{place}: this value holds itself: remove the alias in it")
        self._enter(place)
        self.open.append(node)
        if len(self.open) > MOST_LEVELS:
            raise ConfigError(f"{place}: it is nested deeper than {MOST_LEVELS} levels")
        if isinstance(node, yaml.MappingNode):
            self._require_tag(node, _MAPPING, place)
            values: Any = self._mapping(node, path)
        else:
            self._require_tag(node, _SEQUENCE, place)
            values = [self.convert(item, (*path, i)) for i, item in enumerate(node.value)]
        self.open.pop()
        return values

    def _enter(self, place: Place) -> None:
        self.count += 1
        if self.count > MOST_VALUES:
            raise ConfigError(
                f"{place}: with its aliases it holds more than {MOST_VALUES} values: write less"
            )

    def _require_tag(self, node: yaml.Node, tag: str, place: Place) -> None:
        if node.tag != tag:
            name = shown(node.tag.replace(_STANDARD, "!!"))
            raise ConfigError(f"{place}: the tag {name} is not known here: leave it out")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        taken_over = [(k, v) for k, v in node.value if k.tag == _MERGE]
        for _, value_node in taken_over[:1]:
            values = self._inherited(value_node, path)
        own = {"<<"} if taken_over else set()
        for key_node, value_node in node.value:
            if taken_over and key_node is taken_over[0][0]:
                continue
            place = Place(self.file, key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key is a word, not a list or a mapping")
            key = _checked(str(key_node.value), place)
            if key in own:
                raise ConfigError(f"{place}: {shown(key)} stands here twice: keep one")
            own.add(key)
            values[key] = self.convert(value_node, (*path, key))
            self.places[(*path, key)] = place
        return values

    def _inherited(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """What `<<` takes over: of one mapping or of several, of which the first wins."""
        values: dict[str, Any] = {}
        for base in reversed(list(_bases(node))):
            if not isinstance(base, yaml.MappingNode):
                place = Place(self.file, node.start_mark.line + 1)
                raise ConfigError(f"{place}: << takes over a mapping, or a list of mappings")
            values |= self.convert(base, path)
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath, place: Place) -> Any:
        if node.tag not in _SCALARS:
            self._require_tag(node, _SCALARS[0], place)
        text = _checked(node.value, place)
        if self.variables is not None and "${" in text:
            return self._fill(text, path, place)
        kind = node.tag.removeprefix(_STANDARD)
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except _NO_VALUE as error:
            problem = _NO_VALUE_OF.get(kind, "cannot be read")
            raise ConfigError(f"{place}: {shown(text)!r} {problem} (!!{kind})") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{place}: {shown(text)} is no number that can be used")
        if isinstance(value, int) and abs(value) > MOST:
            raise ConfigError(f"{place}: {shown(text)} is too large a number")
        return value

    def _fill(self, text: str, path: KeyPath, place: Place) -> Any:
        assert self.variables is not None
        variables = self.variables

        def value(match: re.Match[str]) -> str:
            found = variables.get(match["name"], match["default"])
            if found is None:
                raise ConfigError(
                    f"{place}: the environment variable {match['name']} is not set: set it, or "
                    f"write ${{{match['name']}:-default}}"
                )
            return found

        filled = _checked(_VARIABLE.sub(value, text), place)
        if _VARIABLE.fullmatch(text):
            self.filled.add(path)
            return filled or None
        return filled


def _bases(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    else:
        yield node


def _checked(text: str, place: Place) -> str:
    """Text that can be shown, encoded and used as a path."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{place}: this text is longer than {MOST_CHARACTERS} characters")
    odd = next((c for c in text if _is_control(c)), None)
    if odd is not None:
        raise ConfigError(f"{place}: the text {shown(text)!r} holds the control character {odd!r}")
    return text


def _is_control(character: str) -> bool:
    code = ord(character)
    return (
        (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
    )
