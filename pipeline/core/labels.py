"""Names of classes: a network's, in the order of its logits, and those that a dataset states.

An identifier is what a dataset calls a class (n02012849), a name is what people read (crane). Both
are unique: Core ML answers with a dictionary by name, and two of ImageNet's cranes would be one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.inputs import decode_text, read_input
from pipeline.core.remote import RemotePath
from pipeline.core.words import shown

_LARGEST_FILE = 50_000_000
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's control characters, halves of pairs, and ends of lines and paragraphs."""
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Labels = tuple[tuple[str, ...], tuple[str, ...]]
"""Identifiers, and names, of the classes."""


def read_labels(path: Path | RemotePath) -> Labels:
    """Read a text file with a class a line: the identifier, and after a tab the name.

    Raises:
        DataError: It cannot be read, is empty, or names a class twice; the message names the line.
    """
    if isinstance(path, RemotePath):
        data = path.part(0, _LARGEST_FILE)
    else:
        data = read_input(path, _LARGEST_FILE, DataError, "name a text file with a class a line")
    lines = decode_text(data, path, DataError).split("\n")
    identifiers: list[str] = []
    names: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        identifier, _, name = line.strip().partition("\t")
        identifier, name = (
            identifier.strip(),
            name.rpartition("\t")[2].strip() or identifier.strip(),
        )
        for text in (identifier, name):
            if problem := why_no_name(text):
                raise DataError(f"{path}:{number}: the class {shown(text)!r} {problem}")
        if identifier in first:
            raise DataError(
                f"{path}:{number}: the class {shown(identifier)!r} stands in line "
                f"{first[identifier]}, too: a class is one line, in the order of the logits"
            )
        first[identifier] = number
        identifiers.append(identifier)
        names.append(name)
    if not identifiers:
        raise DataError(f"{path} names no class: write one a line")
    return tuple(identifiers), distinct(identifiers, names)


def imagenet_labels() -> Labels:
    """ImageNet-1k's classes, as timm lists them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    identifiers = tuple(info.label_names())
    names = [text.split(",")[0] for text in info.label_descriptions()]
    return identifiers, distinct(identifiers, names)


def distinct(identifiers: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The names, those that several classes have with the identifier behind: crane (n02012849).

    Args:
        identifiers: Each once.
        names: As many, in the same order.
    """
    count = Counter(names)
    made = [
        f"{name} ({identifier})" if count[name] > 1 else name
        for identifier, name in zip(identifiers, names, strict=True)
    ]
    # A name may be what another one became: then identifiers alone are sure to differ.
    return tuple(made) if len(set(made)) == len(made) else tuple(identifiers)


def require_distinct(classes: Sequence[str], where: str) -> None:
    """Refuse class names of a dataset that are no names, or not distinct.

    Raises:
        DataError: The first such name.
    """
    for name in classes:
        if problem := why_no_name(name):
            raise DataError(f"{where}: the class {shown(name)!r} {problem}")
    doubled = [name for name, count in Counter(classes).items() if count > 1]
    if doubled:
        raise DataError(f"{where}: the class {shown(doubled[0])!r} is named twice")


def why_no_name(text: str) -> str | None:
    """What keeps a text from being a class's name; None if nothing does."""
    if not text.strip():
        return "is empty"
    if text.isascii() and text.isprintable():
        return None  # nearly all, and a thousand of them are looked at in a run
    for character in text:
        if unicodedata.category(character) in _NO_TEXT or character in _REORDERING:
            return f"holds the control character {character!a}"
    return None
