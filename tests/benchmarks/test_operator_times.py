"""Where the time of a network goes: which row an operator belongs to, and what a table says."""

from __future__ import annotations

from pathlib import Path

import onnx
import operator_times
import pytest
from click.testing import CliRunner
from operator_times import (
    DENSE,
    DEPTHWISE,
    REST,
    Column,
    Way,
    depthwise,
    kind_of,
    measure,
    table,
)

from pipeline.core.errors import UnavailableError
from pipeline.targets.ort.profile import NodeRun
from pipeline.targets.ort.session import Settings
from tests.pipeline.conftest import small_model


def node(operator: str, *inputs: str) -> NodeRun:
    return NodeRun("n", operator, "CPU", inputs, ("float(1,8,4,4)",), 1.0)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (node("Conv", "float(1,8,4,4)", "float(16,8,1,1)", "float(16)"), DENSE),
        (node("nchwc.Conv", "float(1,16,4,4)", "float(16,1,7,7)"), DEPTHWISE),
        # The mask of one output channel reads all channels: it is dense.
        (node("Conv", "float(1,1,4,4)", "float(1,1,3,3)"), DENSE),
        (
            node(
                "QLinearConv", "uint8(1,8,4,4)", "float()", "uint8()", "int8(8,1,3,3)", "float(8)"
            ),
            DEPTHWISE,
        ),
        (node("QGemm", "uint8(1,8)"), "matrix products"),
        (node("QLinearSigmoid", "uint8(1,8,4,4)"), "GELU"),
        (node("QuantizeLinear", "float(1,8,4,4)"), "quantize, dequantize"),
        (node("QLinearAdd", "uint8(1,8,4,4)"), "sums, products and the like"),
        (node("QLinearConcat", "float()"), "joins and splits"),
        (node("ReorderInput", "float(1,8,4,4)"), "reorders between layouts"),
        (node("Transpose", "float(1,8,4,4)"), REST),
    ],
)
def test_rows_of_operators(found: NodeRun, kind: str) -> None:
    assert kind_of(found) == kind


def test_convolutions_whose_filters_are_packed_are_known_by_name(tmp_path: Path) -> None:
    onnx.save(small_model(), tmp_path / "small.onnx")
    grouped = depthwise(tmp_path / "small.onnx")
    assert grouped == {"depthwise"}
    packed = ("uint8(1,8,4,4)", "float()", "uint8()", "float(8)", "int8(8)")
    for name, kind in (("depthwise_token_12", DEPTHWISE), ("stem_token_1", DENSE)):
        run = NodeRun(name, "QLinearConv", "CPU", packed, ("uint8(1,8,4,4)",), 1.0)
        assert kind_of(run, grouped) == kind


def test_nodes_of_a_graph_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_times, "SHAPE", (3, 8, 8))
    onnx.save(small_model(), tmp_path / "small.onnx")
    ways = [Way(name, tmp_path / "small.onnx", Settings()) for name in ("one", "other")]
    one, other = measure(ways, runs=4, turns=2)
    assert (one.name, other.name) == ("one", "other")
    assert one.nodes == other.nodes >= 6
    assert {DENSE, DEPTHWISE, "matrix products"} <= set(one.milliseconds)
    assert all(each >= 0 for each in one.milliseconds.values())


def test_of_every_node_the_least_disturbed_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(3.0, 1.0), (2.0, 5.0)])

    def trace(*_: object) -> list[NodeRun]:
        return [NodeRun("n", "Gelu", "CPU", (), (), ms) for ms in next(times)]

    monkeypatch.setattr(operator_times, "trace", trace)
    monkeypatch.setattr(operator_times, "depthwise", lambda model: frozenset())
    (found,) = measure([Way("one", Path("no"), Settings())], runs=2, turns=2)
    assert found == Column("one", {"GELU": 3.0}, 2)


def test_a_table_has_kinds_that_occur_and_sums() -> None:
    found = [
        Column("published path", {DENSE: 2.0, REST: 0.5}, 40),
        Column("ours", {DENSE: 1.25, DEPTHWISE: 1.0}, 30),
        Column("limit", {DENSE: 1.0}),
    ]
    assert table("care_s0", found).splitlines() == [
        "| care_s0, ms | published path | ours | limit |",
        "|---|---|---|---|",
        "| dense convolutions | 2.00 | 1.25 | 1.00 |",
        "| depthwise convolutions |  | 1.00 |  |",
        "| the rest | 0.50 |  |  |",
        "| **all** | **2.5** (40 nodes) | **2.2** (30 nodes) | **1.0** |",
    ]


def test_tables_of_a_class_have_a_place_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(model: str, folder: Path, runs: int) -> list[Column]:
        return [Column(f"{model} {runs}", {DENSE: 1.0}, 2)]

    monkeypatch.setattr(operator_times, "columns", found)
    monkeypatch.setattr(operator_times, "play", lambda as_cpu: None)
    document = tmp_path / "docs.md"
    document.write_text("Before.\n")
    asked = ["--model", "care_s0", "--runs", "7", "--docs", str(document)]
    for more in ([], ["--as-cpu", "avx2"]):
        result = CliRunner().invoke(operator_times.main, [*asked, *more])
        assert result.exit_code == 0, result.output
    text = document.read_text()
    assert text.startswith("Before.\n")
    assert text.count("| care_s0, ms | care_s0 7 |") == 2
    assert "<!-- operator times -->" in text
    assert "<!-- operator times as avx2 -->" in text


def test_a_class_that_this_cpu_cannot_play_is_exit_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpu_latency

    def enter(asked: object, purpose: object) -> None:
        raise UnavailableError("as avx512 not measured: this CPU has no avx512f")

    monkeypatch.setattr(cpu_latency, "enter", enter)
    result = CliRunner().invoke(operator_times.main, ["--as-cpu", "avx512"])
    assert result.exit_code == 4
    assert "this CPU has no avx512f" in result.output
