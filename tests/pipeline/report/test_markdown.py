from __future__ import annotations

from typing import Any

from pipeline.report import markdown
from pipeline.report.terminal import summary


def test_every_table_row_has_as_many_cells_as_its_head(results: dict[str, Any]) -> None:
    results["artifacts"][0]["precision"] = "a|b"
    results["gates"] = ["<b>bold</b>\nsecond line"]
    text = markdown.page(results)
    widths: set[int] = set()
    for line in text.splitlines():
        if line.startswith("|"):
            widths.add(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(widths) == 1
            widths = set()
    assert "a\\|b" in text
    assert "- gate does not hold: &lt;b>bold&lt;/b> second line" in text


def test_figures_with_their_origin(results: dict[str, Any]) -> None:
    text = markdown.page(results)
    assert "| coreml/mixed **failed** | not measured |" in text
    assert "- emulated: accuracy of trt/fp16, trt/int8: by strict ONNX" in text
    assert "ms), measured | 0.33 (" in text
    assert "do not compare" in text
    assert "`ort/fp32`" in text


def test_run_that_failed_at_once(nothing: dict[str, Any]) -> None:
    assert "export failed: care_tiny does not export" in markdown.page(nothing)


def test_terminal_names_what_is_missing(results: dict[str, Any]) -> None:
    text = summary(results, "engines/care_tiny")
    assert "coreml/mixed failed" in " ".join(text.split())
    assert "engines/care_tiny/report.html" in text


def test_terminal_of_a_run_that_failed_at_once(nothing: dict[str, Any]) -> None:
    assert "trt/fp16" in summary(nothing, "engines/care_tiny")
