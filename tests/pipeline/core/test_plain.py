from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ArtifactError, DataError
from pipeline.core.plain import Facts, Plain, parse_json, plain, read_json


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


# JSON of anybody.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "here is no JSON (Expecting property name"),
        (b"\xff\xfe\xfd", "here is no JSON ("),
        (b'"\xff"', "here is no JSON ('utf-8' codec can't decode"),
        ("9" * 5000, "here is no JSON (Exceeds the limit"),
        ("[" * 65 + "]" * 65, "here is nested deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "here is nested deeper than 64 levels"),
        ("[1, " * 65 + "2" + "]" * 65, "here is nested deeper than 64 levels"),
        ("[" * 100_000, "here is nested deeper than 64 levels"),
        ('{"a":' * 100_000, "here is nested deeper than 64 levels"),
        ('[{"a": 1, "b": 2, "a": 3}]', "here names 'a' twice"),
        (r'{"\u001b[2J": 1, "\u001b[2J": 3}', r"here names '\\x1b[2J' twice"),
        (" " * 1001, "here is larger than 0.001 MB"),
    ],
)
def test_json_of_anybody_is_read_or_refused_in_a_line(data: str | bytes, message: str) -> None:
    most = 1000 if len(data) == 1001 else 10**6
    with pytest.raises(ArtifactError) as caught:
        parse_json(data, "here", most=most)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", ["[" * 64 + "]" * 64, '{"a":' * 64 + "1" + "}" * 64, "5", "[[],1]"]
)
def test_what_is_within_the_limits_is_as_json_has_it(data: str) -> None:
    assert parse_json(data, "here") == json.loads(data)
    assert parse_json(data.encode(), "here", most=len(data)) == json.loads(data)


def test_a_json_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('\ufeff{"a": [1, "\u00e4"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, "\u00e4"]}
    with pytest.raises(DataError, match=r"x\.json is larger than 1e-06 MB"):
        read_json(path, DataError, most=1)
    path.write_text("[" * 1000 + "]" * 1000)
    with pytest.raises(DataError, match=r"x\.json is nested deeper"):
        read_json(path, DataError)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("pipe", "is no file, but a folder, a device or a pipe"),
        ("zero", "is no file, but a folder, a device or a pipe"),
        (".", "is no file, but a folder, a device or a pipe"),
        ("none", "none is missing"),
        ("loop", "cannot read .*loop: Too many levels"),
        ("a\0b", "is no path"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_json(tmp_path / name)


def test_a_file_that_the_disk_does_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text("{}")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ArtifactError, match=r"cannot read .*x\.json: Input/output error"):
        read_json(tmp_path / "x.json")
