"""int8 for ONNX Runtime that holds its limits, or is not made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibration import judge
from calibration.sensitivity import Outcome
from pipeline.core.errors import GateFailedError
from pipeline.steps.facts.graphs import RepairFacts
from pipeline.targets.ort import quantize
from pipeline.targets.ort.options import OrtOptions
from pipeline.targets.registry import TARGETS, form_of, needs_calibration

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]
Small = Callable[..., onnx.ModelProto]

BLOCK = "stages.0.blocks.1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MEASURE_SECONDS", 0.02)
    # So short a measurement must decide nothing.
    monkeypatch.setattr(quantize, "MARGIN", 1.0)


def break_blocks(monkeypatch: pytest.MonkeyPatch, *blocks: str) -> None:
    """Let a graph lose all accuracy while one of these blocks is in 8 bits."""

    def judged(self: Any, model: onnx.ModelProto) -> Outcome:
        stored = [t.name for t in model.graph.initializer if t.name.endswith("_stored")]
        spoiled = any(name.startswith(block) for name in stored for block in blocks)
        return Outcome(0.0 if spoiled else self.baseline.top1, 1.0, 0.5 if spoiled else 0.1)

    monkeypatch.setattr(judge.Judge, "__call__", judged)


def repair_of(facts: dict[str, Any]) -> RepairFacts:
    return RepairFacts.from_dict(facts["repair"], "the facts")


def test_the_block_that_8_bits_break_is_raised_and_told(
    convert: Convert, small_graph: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_blocks(monkeypatch, BLOCK)
    model, facts = convert(small_graph(), "int8-ort-repaired", max_top1_drop=0.0)
    repair = repair_of(facts)
    assert f"{BLOCK}.conv.weight" in {tensor.name for tensor in model.graph.initializer}
    assert [(part.part, part.type) for part in repair.raised] == [(BLOCK, "float32")]
    assert repair.raised[0].why.startswith("alone in int8: error 0.5, ")
    assert 0 < repair.share < 0.5
    assert repair.share == repair.raised[0].share
    assert repair.broke.startswith("error 0.5, ")
    assert repair.result == f"error 0.1 on {repair.images} calibration images"
    assert repair.words.startswith("1 of 4 parts raised above int8 (1 in float32; ")


def test_what_is_sound_is_the_plain_form_byte_for_byte(
    convert: Convert, small_graph: Small, tmp_path: Path
) -> None:
    _, facts = convert(small_graph(), "int8-ort-repaired", max_top1_drop=1.0)
    made = (tmp_path / "result.onnx").read_bytes()
    convert(small_graph(), "int8-ort", max_top1_drop=1.0)
    assert (tmp_path / "result.onnx").read_bytes() == made
    assert repair_of(facts).words == "nothing had to be raised above int8"


def test_where_no_choice_holds_it_says_how_near_it_came(
    convert: Convert, small_graph: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        judge.Judge, "__call__", lambda self, model: Outcome(self.baseline.top1 - 0.25, 0.7, 0.4)
    )
    told = (
        r"cannot repair small in int8: no choice of blocks holds the budget \(a drop of .*% and "
        r"50% of the products raised\): with 4 of 4 raised to float32, 100\.0% of the products, "
        r"error 0\.4, 25\.00 points of top-1 lost; with none, error 0\.4, 25\.00 points"
    )
    with pytest.raises(GateFailedError, match=told):
        convert(small_graph(), "int8-ort-repaired", max_top1_drop=0.0)
    assert not (tmp_path / "result.onnx").exists()


def test_more_than_the_allowed_share_is_no_repair(
    convert: Convert, small_graph: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_blocks(monkeypatch, BLOCK)
    with pytest.raises(GateFailedError, match=r"1% of the products raised\): with 1 of 4 raised"):
        convert(small_graph(), "int8-ort-repaired", max_top1_drop=0.0, max_share=0.01)


def test_the_repaired_form_is_built_where_that_is_asked_for() -> None:
    target, repairing = TARGETS["ort"], OrtOptions(repair=True)
    assert target.form("int8", None) == target.form("int8", OrtOptions()) == "int8-ort"
    form = form_of(target, "int8", repairing)
    assert form is not None
    assert form.name == "int8-ort-repaired"
    assert form.timed
    assert needs_calibration(target, "int8", repairing)
    assert target.form("fp32", repairing) == "float32"
