from __future__ import annotations

import pytest

from pipeline.core.words import in_short, nearest, nearest_or_all

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
