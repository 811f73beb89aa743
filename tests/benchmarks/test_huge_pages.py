"""What huge pages bring: processes of their own, and what the table says."""

from __future__ import annotations

from pathlib import Path

import huge_pages
import onnx
import pytest
from click import ClickException
from click.testing import CliRunner
from huge_pages import ASKED, MOVED, SMALL, WAYS, elsewhere, main, markdown, measure
from networks import SHAPE
from onnx import TensorProto, helper

from pipeline.core.huge_pages import why_not


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Means of an image's channels."""
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["means"]),
            helper.make_node("Flatten", ["means"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", SHAPE[0]])],
    )
    path = tmp_path / "small.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
@pytest.mark.parametrize("way", WAYS)
def test_each_way_runs_in_a_process_of_its_own(small: Path, way: str) -> None:
    found = elsewhere(small, way, 1, 0.01, None)
    assert found["ms"] > 0
    assert found["mb"] > 10


def test_ways_take_turns_and_are_compared_with_small_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[tuple[str, str]] = []
    times = {SMALL: 10.0, MOVED: 9.0, ASKED: 8.0}

    def one(source: Path, way: str, *rest: object) -> dict[str, float]:
        turns.append((source.name, way))
        return {"ms": times[way], "mb": 100.0 + len(way)}

    monkeypatch.setattr(huge_pages, "elsewhere", one)
    rows = measure({"a": Path("a"), "b": Path("b")}, 2, 4, 1.0, None)
    assert turns == [(name, way) for _ in range(4) for name in "ab" for way in WAYS]
    assert [row["ratio"] for row in rows] == [1.0, 0.9, 0.8] * 2
    table = markdown(rows, "some cpu").splitlines()
    assert table[0] == "some cpu"
    assert table[4] == (
        "| a, 2 threads | 10.00 ms | 0.900 (0.900 to 0.900) | 0.800 (0.800 to 0.800) "
        "| 113, 105, 110 |"
    )


def test_a_process_that_fails_says_why(small: Path) -> None:
    small.write_bytes(b"no graph")
    with pytest.raises(ClickException, match="onnxruntime does not accept"):
        elsewhere(small, MOVED, 1, 0.01, None)


def test_where_there_are_none_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "why_not", lambda: "only Linux has them")
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1
    assert "not measured: only Linux has them" in done.output


def test_an_unknown_class_is_a_word_and_no_traceback() -> None:
    done = CliRunner().invoke(main, ["--as-cpu", "avx3"])
    assert done.exit_code == 2
    assert "'avx3' is not one of" in done.output
