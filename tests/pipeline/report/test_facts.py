from __future__ import annotations

from typing import Any

import pytest

from pipeline.report import facts
from pipeline.report.facts import Grid, Pairs


def test_blocks_separate_plain_values_from_parts() -> None:
    made = facts.blocks(
        "Build",
        {
            "opset": 20,
            "nodes": {"CPUExecutionProvider": {"float": 12}},
            "passes": [{"name": "attention", "nodes_after": 3}, {"name": "elu", "left": True}],
            "tags": ["a", "b"],
            "input": {"name": "image", "shape": [-1, 3, 64, 64]},
        },
    )
    assert made[0] == Pairs(
        "Build",
        (
            ("opset", "20"),
            ("tags", "a, b"),
            ("input", "name image, shape -1 x 3 x 64 x 64"),
        ),
    )
    assert made[1] == Pairs(
        "Nodes that ran, by provider and type", (("CPUExecutionProvider", "float 12"),)
    )
    assert made[2] == Grid(
        "Graph passes",
        ("name", "nodes after", "left"),
        (("attention", "3", ""), ("elu", "", "yes")),
    )


def test_alike_parts_become_a_table() -> None:
    candidates = {"blocked": {"p50_ms": 0.3, "ratio": 1}, "portable": {"p50_ms": 0.4, "ratio": 1.3}}
    (made,) = facts.blocks("", {"candidates": candidates})
    assert made == Grid(
        "Candidates",
        ("", "p50", "ratio"),
        (("blocked", "0.3 ms", "1"), ("portable", "0.4 ms", "1.3")),
    )


def test_parts_give_their_unit_to_what_is_in_them() -> None:
    (made,) = facts.blocks("", {"memory": {"weights_bytes": 512, "activations_bytes": 786_432}})
    assert made == Pairs(
        "Memory on the GPU", (("weights", "512 bytes"), ("activations", "0.79 MB"))
    )


def test_long_tables_say_what_they_leave_out() -> None:
    (made,) = facts.blocks("", {"rows": [{"i": i} for i in range(100)]})
    assert isinstance(made, Grid)
    assert len(made.rows) + made.left_out == 100
    assert made.left_out > 0


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        (None, "", "none"),
        (True, "", "yes"),
        (1234567, "", "1,234,567"),
        (0.123456, "", "0.1235"),
        (2_500_000, "engine_bytes", "2.50 MB"),
        (512, "weight_bytes", "512 bytes"),
        (12, "opening_ms", "12 ms"),
        (1.5, "build_seconds", "1.5 s"),
        (float("nan"), "", "not a number"),
        (float("-inf"), "", "infinite"),
        ([], "", "none"),
        (list(range(12)), "", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
        ({"a_b": 1, "c": [2]}, "", "a b 1, c 2"),
        (655.04, "largest_value", "655 (100 times below the limit of float16)"),
    ],
)
def test_values_in_words(value: Any, key: str, text: str) -> None:
    assert facts.value_text(value, key) == text
