"""Collections go through what is new, and leave nothing set aside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from pipeline.core import garbage
from pipeline.core.garbage import only_new


@pytest.fixture(autouse=True)
def nothing_set_aside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The suite sets aside what its processes begin with, see tests/conftest.py."""
    monkeypatch.setattr(garbage, "set_aside", COUNTED)
    before = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if before:
        gc.freeze()


COUNTED = garbage.set_aside
"""Of the module as it is: the suite answers in its place once all tests are read."""


class Circle:
    itself: Circle


def circle() -> weakref.ref[Circle]:
    one = Circle()
    one.itself = one
    return weakref.ref(one)


def test_circles_made_within_are_found_and_older_ones_later() -> None:
    old = circle()
    with only_new():
        new = circle()
        gc.collect()
        assert new() is None
        assert old() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


def test_an_error_leaves_nothing_set_aside() -> None:
    def fail() -> None:
        with only_new():
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_a_program_set_aside_itself_stays_so() -> None:
    gc.freeze()
    with only_new():
        pass
    assert gc.get_freeze_count()
