from __future__ import annotations

from dataclasses import replace

from pipeline.report import provenance
from pipeline.report.model import Run
from tests.pipeline.report.changed import artifact_of


def names(run: Run, artifact: str) -> list[str]:
    return [link.name for link in provenance.chain(run, artifact_of(run, artifact))]


def test_a_chain_goes_through_the_form_to_the_checkpoint(run: Run) -> None:
    whole = ["checkpoint", "export", "onnx", "precision/float16", "trt/fp16"]
    assert names(run, "trt/fp16") == whole
    assert names(run, "ort/fp32") == ["checkpoint", "export", "onnx", "ort/fp32"]
    assert all(not link.problem for link in provenance.chain(run, artifact_of(run, "trt/fp16")))


def test_digests_are_those_that_it_was_made_from(run: Run) -> None:
    checkpoint, *_, last = provenance.chain(run, artifact_of(run, "trt/fp16"))
    built = artifact_of(run, "trt/fp16").built
    assert built is not None
    assert checkpoint.digest == "c0ffee" * 10 + "dead"
    assert last.digest == built.digest


def test_an_input_that_is_another_by_now_is_told(run: Run) -> None:
    assert run.simplified is not None
    before = run.simplified.digest
    run = replace(run, simplified=replace(run.simplified, digest="f" * 64))
    links = {
        link.name: link.problem for link in provenance.chain(run, artifact_of(run, "ort/fp32"))
    }
    assert links.pop("onnx") == f"made from {before[:12]}, now there is {'f' * 12}"
    assert set(links.values()) == {""}


def test_an_input_that_is_gone_ends_the_chain(run: Run) -> None:
    assert names(replace(run, simplified=None), "ort/fp32") == ["onnx", "ort/fp32"]


def test_what_two_are_made_from_comes_once(run: Run) -> None:
    form = run.forms["float16"]
    assert run.export is not None
    made_from = {**form.made_from, "export": run.export.digest}
    run = replace(run, forms={"float16": replace(form, made_from=made_from)})
    assert names(run, "trt/fp16").count("export") == 1


def test_what_was_not_built_has_no_chain(run: Run) -> None:
    assert names(run, "coreml/mixed") == []


def test_parts_come_after_what_they_are_made_from(run: Run) -> None:
    order = [part.name for part in provenance.parts(run)]
    assert order.index("export") < order.index("onnx") < order.index("precision/float16")
    assert order.index("precision/float16") < order.index("trt/fp16")
    assert "coreml/mixed" not in order
    assert order[-1] == "validate/pytorch"
