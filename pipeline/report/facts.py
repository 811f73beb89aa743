"""Facts of artifacts as tables for people, whatever a stage or a target chose to write down.

Every stage and target writes its own facts, and the report shows all of them without knowing them:
plain values become pairs of name and value, lists of alike mappings become tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT16_LIMIT = 65504.0

_MOST_ROWS = 60
_MOST_ITEMS = 10
_MOST_INLINE = 4

_TITLES = {
    "by_kind": "Operators",
    "by_precision": "Layers by type",
    "operations": "Operations of the program",
    "nodes": "Nodes that ran, by provider and type",
    "passes": "Graph passes",
    "weight_bytes": "Weights by type",
    "memory": "Memory on the GPU",
    "sensitivity": "Which blocks stay in higher precision",
    "verified": "Checked against the module when built",
    "repair": "Repair of the precision",
    "session": "Session",
    "on_devices": "Measured on devices; medians",
    "agreement_by_compute_units": "Agreement with PyTorch by compute units",
    "outside_the_neural_engine": "Operations outside the Neural Engine",
    "weights": "Weights: relative error of the logits when one tensor alone is compressed",
    "fitness": "Fitness for the Neural Engine",
}
"""Headings of parts."""

_NAMES = {
    "top1": "top-1",
    "on_neural_engine": "share of operations on the Neural Engine",
    "top1_drop": "top-1 drop",
    "max_top1_drop": "largest top-1 drop allowed",
    "min_agreement": "least agreement allowed",
    "difference_to_pytorch": "difference to PyTorch",
}

_ENDINGS = {"_ms": "", "_bytes": "", "_mb": "", "_seconds": "_time"}
"""Units that values carry themselves, and what stands for them in the name."""


@dataclass(frozen=True)
class Pairs:
    """Names and values.

    Attributes:
        title: Heading.
        rows: (name, value).
    """

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: Heading.
        columns: Column titles.
        rows: Cells; the first names the row.
        left_out: Rows that are not shown.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0


Block = Pairs | Grid


def blocks(title: str, facts: Mapping[str, Any]) -> list[Block]:
    """Facts as blocks: first the plain values, then what has parts, each under its own title.

    Args:
        title: Heading of the plain values.
        facts: From an artifact.
    """
    return list(_blocks(title, "", facts))


def _blocks(title: str, path: str, facts: Mapping[str, Any], parent: str = "") -> Iterator[Block]:
    """Blocks of a part of the facts; `path` names it for people, `parent` is its key."""
    plain = tuple(
        (name_of(key), value_text(value, _unit_key(key, parent)))
        for key, value in facts.items()
        if not _is_part(key, value)
    )
    if plain:
        yield Pairs(title, plain)
    for key, value in facts.items():
        if not _is_part(key, value):
            continue
        name = f"{path}: {name_of(key)}" if path else name_of(key)
        heading = _TITLES.get(key) or name[:1].upper() + name[1:]
        if isinstance(value, Mapping) and _alike(value):
            yield _grid(heading, [{"": entry, **value[entry]} for entry in value])
        elif isinstance(value, Mapping):
            yield from _blocks(heading, name, value, key)
        else:
            yield _grid(heading, value)


def _unit_key(key: str, parent: str) -> str:
    """The key that tells a value's unit: the part's, where that names one for all in it."""
    return f"{key}_bytes" if parent.endswith("_bytes") else key


def _is_part(key: str, value: Any) -> bool:
    """Whether a value gets a heading of its own: large mappings, and lists of mappings."""
    if isinstance(value, Mapping):
        simple = not any(isinstance(v, Mapping) or _has_parts(v) for v in value.values())
        return bool(value) and (key in _TITLES or not simple or len(value) > _MOST_INLINE)
    return _has_parts(value)


def _has_parts(value: Any) -> bool:
    """Whether a value is a list of mappings."""
    return _is_list(value) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _alike(value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds several plain mappings with the same keys: it reads as a table."""
    entries = list(value.values())
    if len(entries) < 2 or not all(isinstance(entry, Mapping) for entry in entries):
        return False
    keys = {tuple(entry) for entry in entries}
    parts = any(_has_parts(v) or isinstance(v, Mapping) for e in entries for v in e.values())
    return len(keys) == 1 and len(entries[0]) > 1 and not parts


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _grid(title: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = tuple(
        tuple(value_text(row[key], key) if key in row else "" for key in columns)
        for row in rows[:_MOST_ROWS]
    )
    return Grid(title, tuple(map(name_of, columns)), shown, max(0, len(rows) - _MOST_ROWS))


def name_of(key: str) -> str:
    """A key as people write it."""
    if key in _NAMES:
        return _NAMES[key]
    for ending, written in _ENDINGS.items():
        key = f"{key.removesuffix(ending)}{written}" if key.endswith(ending) else key
    return key.replace("_", " ")


def value_text(value: Any, key: str = "") -> str:
    """A value for people; the end of its key tells the unit."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number_text(value, key)
    if isinstance(value, Mapping):
        return ", ".join(f"{name_of(k)} {value_text(v, k)}" for k, v in value.items()) or "none"
    if _is_list(value):
        if key.endswith("shape"):
            return " x ".join(map(str, value))
        shown = ", ".join(value_text(item, key) for item in value[:_MOST_ITEMS])
        rest = len(value) - _MOST_ITEMS
        return f"{shown} and {rest:,} more" if rest > 0 else shown or "none"
    return str(value)


def _number_text(value: float, key: str) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if key.endswith("bytes") or key == "size":
        return f"{value / 1e6:.2f} MB" if abs(value) >= 1e5 else f"{value:,.0f} bytes"
    number = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    for ending, unit in (("_ms", "ms"), ("_seconds", "s"), ("_s", "s"), ("_mb", "MB")):
        if key.endswith(ending):
            return f"{number} {unit}"
    if key == "largest_value" and value:
        return f"{number} ({FLOAT16_LIMIT / abs(value):.3g} times below the limit of float16)"
    return number
