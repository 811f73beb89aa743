from __future__ import annotations

import re
from dataclasses import replace

from pipeline.report import markdown
from pipeline.report.model import Run
from tests.pipeline.report.changed import with_artifact
from tests.pipeline.report.making import Partial


def test_every_table_row_has_as_many_cells_as_its_head(run: Run) -> None:
    run = with_artifact(run, "trt/fp16", precision="a|b")
    run = replace(run, problems=("<b>bold</b>\nsecond line",))
    text = markdown.page(run)
    widths: set[int] = set()
    for line in text.splitlines():
        if line.startswith("|"):
            widths.add(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(widths) == 1
            widths = set()
    assert "a\\|b" in text
    assert "- &lt;b>bold&lt;/b> second line" in text


def test_figures_with_their_origin(run: Run) -> None:
    text = markdown.page(run)
    assert "| coreml/mixed **failed** | not measured |" in text
    assert "- emulated: accuracy of trt/fp16, trt/int8: by strict ONNX" in text
    assert "ms), measured | 3.0 x faster (0.33; " in text
    assert "latency, batch 1 |" in text
    assert "| **ort/fp32: use this** | 90.33 %" in text
    assert "ship ort/fp32: top-1 90.33 % (measured), 0.00 points lost" in text
    assert "CARE-S0" not in text  # it is of another network
    assert "- `onnx` " in text
    assert re.search(r"`ort/fp32` \w{16}, made from onnx \w{16}\n", text)
    assert "timm " in text.splitlines()[-1]


def test_failures_gates_and_choices_are_told(run: Run) -> None:
    text = markdown.page(run)
    assert "**1 failure and 2 gates that do not hold (exit code 3: a build failed)**" in text
    assert "- gate does not hold: ort/int8: agreement is 0.945" in text
    assert "- ort: use fp32; int8: a gate does not hold: agreement is 0.945" in text


def test_published_rows_are_those_of_the_network(imagenet: Run) -> None:
    assert imagenet.export is not None
    assert "on the devices that the columns name" not in markdown.page(imagenet)
    facts = imagenet.export.facts
    network = replace(facts.network, description={"model": "care_s0"})
    export = replace(imagenet.export, facts=replace(facts, network=network))
    text = markdown.page(replace(imagenet, export=export))
    assert "on the devices that the columns name" in text
    assert "CARE-S0" in text
    assert "CARE-S1" not in text


def test_a_run_that_failed_at_once(nothing: Run) -> None:
    assert "export failed: care_tiny does not export" in markdown.page(nothing)


def test_a_run_of_one_stage_speaks_of_what_was_selected(partial: Partial) -> None:
    text = markdown.page(partial("export", there=False))
    assert "**All that was selected is done, 1 of 20 steps" in text
    assert "| ort/fp32 (not selected in this run) | not measured |" in text
    assert "was not built" not in text
    text = markdown.page(partial("export", there=True))
    assert "| ort/fp32 (from an earlier run) | 90.33 %" in text
