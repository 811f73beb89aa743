from __future__ import annotations

import pytest

from pipeline.core.errors import ConfigError, DataError, about
from pipeline.core.words import duration, in_short, nearest, nearest_or_all, printable, shown

KNOWN = ["care_s0", "care_s1", "mlla_t"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [("cares0", "; did you mean care_s0?"), ("mlla", "; did you mean mlla_t?"), ("resnet18", "")],
)
def test_the_nearest_word_is_suggested(word: str, hint: str) -> None:
    assert nearest(word, KNOWN) == hint


def test_all_are_named_where_none_is_near() -> None:
    assert nearest_or_all("resnet18", KNOWN) == "; known are care_s0, care_s1, mlla_t"
    assert nearest_or_all("cares0", iter(KNOWN)) == "; did you mean care_s0?"


def test_an_error_in_short() -> None:
    assert in_short(KeyError("a")) == "KeyError: 'a'"
    assert in_short(ValueError("one\ntwo")) == "ValueError: one"
    assert in_short(ValueError()) == "ValueError"
    assert len(in_short(ValueError("x" * 1000))) == 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Höhe 日本", "Höhe 日本"),
        ("a\nb", "a\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\0", "a\\x00"),
        ("\ud800", "\\ud800"),
        ("\u202e", "\\u202e"),
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_printable_text_changes_no_terminal(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_names_are_shown_on_one_line_and_short() -> None:
    assert shown("a\nb") == "a\\nb"
    assert shown("\x1b") == "\\x1b"
    assert shown((1, "a")) == "(1, 'a')"
    assert shown("x" * 60) == "x" * 60
    long = shown("a" * 100 + "b" * 100)
    assert long == "a" * 65 + "…" + "b" * 15
    assert len(shown("x" * 1000, most=300)) == 301


def test_messages_of_errors_are_printable() -> None:
    with pytest.raises(DataError) as caught, about("data"):
        raise DataError("class \x1b[2J\ud800")
    assert str(caught.value) == "data: class \\x1b[2J\\ud800"
    assert str(ConfigError("a\nb")) == "a\nb"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"),
        (0.4, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
