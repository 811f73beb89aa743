from __future__ import annotations

import pytest

from pipeline.core.words import nearest, nearest_or_all

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
