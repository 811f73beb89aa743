"""The parts of a key have names, so that a stale step says what changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.steps.artifact import Artifact
from pipeline.steps.step import flat, what_changed


def test_nested_values_have_one_name_each() -> None:
    assert flat(
        {"settings export": {"opset": 20, "deep": {"x": None}}, "labels": ["a"], "n": {}}
    ) == {
        "settings export.opset": 20,
        "settings export.deep.x": None,
        "labels": ["a"],
        "n": {},
    }


def test_long_values_are_their_hashes() -> None:
    one, other = (flat({"labels": [f"{name} {i}" for i in range(99)]}) for name in "ab")
    assert one != other
    assert one["labels"].startswith("sha256:")


PARTS: Mapping[str, Mapping[str, Any]] = {
    "made_from": {"export": "d"},
    "inputs": {"settings export.opset": 20, "sizes": (1, 2)},
    "tools": {"torch": "2.14"},
    "code": {"care/checkpoint.py": "h"},
}


@pytest.mark.parametrize(
    ("kind", "now", "expected"),
    [
        ("made_from", {"export": "e"}, "changed: export"),
        (
            "inputs",
            {"settings export.opset": 21, "sizes": (1, 2)},
            "changed: settings export.opset",
        ),
        ("inputs", {"settings export.opset": 20}, "changed: sizes"),
        ("inputs", {**PARTS["inputs"], "new": 1}, "changed: new"),
        ("tools", {"torch": "2.15"}, "changed: torch 2.14 -> 2.15"),
        ("tools", {}, "changed: torch 2.14 -> none"),
        ("code", {"care/checkpoint.py": "i"}, "changed: care/checkpoint.py"),
        ("code", {f"care/{i}.py": "i" for i in range(4)}, "care/3.py and 1 more"),
        ("code", PARTS["code"], "changed: its name"),
    ],
)
def test_what_changed_is_named(kind: str, now: Mapping[str, Any], expected: str) -> None:
    existing = Artifact(
        folder=Path(),
        kind="build",
        name="x",
        key="k",
        files={},
        made_from=PARTS["made_from"],
        tools=PARTS["tools"],
        facts={},
        inputs={"settings export.opset": 20, "sizes": [1, 2]},
        code=PARTS["code"],
    )
    assert what_changed(existing, {**PARTS, kind: now}).endswith(expected)
