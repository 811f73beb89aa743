from __future__ import annotations

from dataclasses import replace

from pipeline.report import terminal
from pipeline.report.model import GateReport, Run
from tests.pipeline.report.changed import hasty, with_artifact
from tests.pipeline.report.making import STEPS, Partial


def words(run: Run) -> str:
    return " ".join(terminal.summary(run).split())


def test_a_row_for_pytorch_and_every_artifact(run: Run) -> None:
    text = words(run)
    assert "pytorch 90.33 % 2.99 ms" in text
    assert "ort/fp32 90.33 % 100.00 % 1.00 ms 3.10 MB measured" in text
    assert "trt/fp16 90.50 % 99.33 % not measured 1.90 MB emulated" in text
    assert "coreml/fp16 not measured not measured 1.70 MB not measured" in text
    assert "coreml/mixed not measured not measured - failed" in text


def test_what_is_missing_has_its_reason_once(run: Run) -> None:
    text = words(run)
    assert text.count("trt latency not measured: no NVIDIA GPU was found") == 1
    assert "coreml top1 not measured: Core ML predictions need macOS" in text
    assert "coreml/mixed failed: coremltools refuses" in text


def test_choices_gates_and_the_verdict_are_told(run: Run) -> None:
    text = words(run)
    assert "ort: use fp32; int8: a gate does not hold: agreement is 0.945" in text
    assert "gate failed: ort/int8: agreement is 0.945, min_agreement allows 0.97" in text
    assert "1 failure and 2 gates that do not hold (exit code 3: a build failed)" in text
    assert terminal.summary(run).splitlines()[-1] == f"report: {run.folder}/report.html"


def test_a_run_that_failed_at_once(nothing: Run) -> None:
    assert "trt/fp16 not measured" in words(nothing)
    assert "trt top1 not measured: export failed" in words(nothing)


def test_a_run_of_one_stage_speaks_of_what_was_selected(partial: Partial) -> None:
    text = words(partial("export", there=False))
    assert "All that was selected is done, 1 of 20 steps; no gate was judged" in text
    assert "ort/fp32 not measured not measured - not selected in this run" in text
    assert "was not built" not in text
    assert "latency not measured:" not in text


def test_what_lies_there_from_earlier_says_so(partial: Partial) -> None:
    text = words(partial("export", there=True))
    assert "3.10 MB measured, from an earlier run" in text
    assert "earlier" not in words(partial(*STEPS, there=True))


def test_latency_that_nobody_should_trust_says_so(run: Run) -> None:
    assert "(!) ort" not in words(run)
    text = words(hasty(run))
    assert "ort/fp32 90.33 % 100.00 % 1.00 ms (!)" in text
    assert "pytorch 90.33 % 2.99 ms (!)" in text
    assert "(!) ort: latency is not to be trusted: only 6 calls were timed" in text


def test_alerts_are_shown(run: Run) -> None:
    assert "(!) trt/fp16: 3 values left the range of their type while it ran" in words(run)


def test_words_are_no_markup(run: Run) -> None:
    run = replace(with_artifact(run, "trt/fp16", precision="[b]"), problems=("[red]x[/]",))
    text = terminal.summary(run)
    assert "trt/[b]" in text
    assert "[red]x[/]" in text


def test_a_run_without_gates_says_so(run: Run) -> None:
    run = replace(run, exit_code=0, steps=run.steps[:3], gates=GateReport())
    assert "Everything was built; no gate is set (exit code 0: fine)" in terminal.summary(run)


def test_tables_have_the_width_that_is_asked_for() -> None:
    text = terminal.render("word " * 50, width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert not text.endswith("\n")
