from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.plain import Facts, Plain, plain


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Point(Plain):
    x: float
    y: float | None = None


@dataclass(frozen=True)
class Told(Facts):
    count: int
    colour: Colour
    points: tuple[Point, ...] = ()
    by_size: Mapping[int, Point] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Short(Facts):
    count: int


TOLD = Told(3, Colour.RED, (Point(1.5), Point(2, 3)), {8: Point(0.5)}, {"else": [1, {"a": None}]})
PLAIN = {
    "count": 3,
    "colour": "red",
    "points": [{"x": 1.5, "y": None}, {"x": 2, "y": 3}],
    "by_size": {"8": {"x": 0.5, "y": None}},
}


def test_values_survive_json() -> None:
    values = json.loads(json.dumps(TOLD.to_dict()))
    assert values == {**PLAIN, "more": {"else": [1, {"a": None}]}}
    assert Told.from_dict(values, "here") == TOLD


def test_facts_lie_on_one_level() -> None:
    facts = json.loads(json.dumps(TOLD.to_facts()))
    assert facts == {**PLAIN, "else": [1, {"a": None}]}
    assert Told.from_facts(facts, "here") == TOLD


def test_facts_without_a_place_for_more_drop_it() -> None:
    assert Short.from_facts({"count": 2, "else": 1}, "here") == Short(2)
    assert Short(2).to_facts() == {"count": 2}


def test_what_is_not_stated_is_the_default() -> None:
    assert Told.from_facts({"count": 1, "colour": "red"}, "here") == Told(1, Colour.RED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "3"}, "here: count: Input should be a valid integer"),
        ({"count": True}, "here: count: Input should be a valid integer"),
        ({"colour": "blue"}, "here: colour: Input should be 'red'"),
        ({"points": [{"x": 1}, {}]}, "here: points.1.x: Field required"),
        ({"points": [{"x": 1, "z": 1}]}, "here: points.0.z: Unexpected keyword argument"),
        ({"points": {"x": 1}}, "here: points: Input should be a valid"),
        ({"by_size": {"large": {"x": 1}}}, "here: by_size.large"),
        ({"other": 1}, "here: other: Unexpected keyword argument"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as error:
        Told.from_dict({**PLAIN, **changes}, "here")
    assert str(error.value).startswith(message)


def test_a_value_that_is_no_mapping_is_refused() -> None:
    values: Any = [1]
    with pytest.raises(ArtifactError, match="here: the whole: "):
        Point.from_dict(values, "here")


def test_other_values_become_plain() -> None:
    @dataclass
    class Other:
        points: list[Point]

    assert plain({1: Other([Point(1)])}) == {"1": {"points": [{"x": 1, "y": None}]}}
    assert plain(("a", 1.5, None, True)) == ["a", 1.5, None, True]
