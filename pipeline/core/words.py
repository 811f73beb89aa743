"""Words of error messages that several places share."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 80
_ENDING = 15


def printable(text: str) -> str:
    """Text that changes no terminal: what is not printable is escaped, all but line ends.

    Names in files are other people's. A control sequence in one could clear the screen or write
    over what stands there, and half a surrogate pair cannot be encoded at all.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def shown(name: object, most: int = _SHOWN) -> str:
    """A name out of a file as a message shows it: on one line, printable, not too long.

    Args:
        name: The name.
        most: About how many characters of it to show.
    """
    text = str(name)
    if len(text) > most:
        text = f"{text[: most - _ENDING]}…{text[-_ENDING:]}"
    return printable(text).replace("\n", "\\n")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as "; did you mean care_s0?", or "" if no known word is near."""
    import difflib  # here: every command loads this module, and few meet an unknown word

    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def nearest_or_all(word: str, known: Iterable[str]) -> str:
    """The hint of `nearest`, or all known words where none is near."""
    words = list(known)
    return nearest(word, words) or f"; known are {', '.join(words)}"


def duration(seconds: float) -> str:
    """About how long something takes, such as "12 s", "3 min" or "2 h 5 min"; at least "1 s"."""
    if round(seconds) < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def in_short(error: BaseException) -> str:
    """Kind and first line of an error, of bounded length."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")
