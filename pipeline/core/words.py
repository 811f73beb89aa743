"""Words of error messages that several places share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "; did you mean care_s0?", or "" if no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def nearest_or_all(word: str, known: Iterable[str]) -> str:
    """The hint of `nearest`, or all known words where none is near."""
    words = list(known)
    return nearest(word, words) or f"; known are {', '.join(words)}"


def in_short(error: BaseException) -> str:
    """Kind and first line of an error, of bounded length."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")
