from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.sample import CalibrationSet
from pipeline.core.errors import GateFailedError
from pipeline.core.network import Network
from pipeline.emulate.onnx.executor import OnnxExecutor
from pipeline.graphs import float16
from pipeline.steps.facts.graphs import FormFacts, RepairFacts
from pipeline.targets.forms import FormJob
from pipeline.targets.registry import TARGETS, form_of, needs_calibration
from pipeline.targets.repaired import REPAIRED
from pipeline.targets.tensorrt.options import TrtOptions

Convert = Callable[..., tuple[onnx.ModelProto, dict[str, Any]]]
Small = Callable[..., onnx.ModelProto]


def loud(model: onnx.ModelProto, factor: float = 4096.0) -> onnx.ModelProto:
    """The network with values that float16 cannot hold between its second and third convolution."""
    for name, scale in (
        ("stages.0.blocks.0.conv.weight", factor * 16),
        ("stages.0.blocks.1.conv.weight", 1 / factor / 16),
    ):
        place = [tensor.name for tensor in model.graph.initializer].index(name)
        scaled = numpy_helper.to_array(model.graph.initializer[place]) * np.float32(scale)
        model.graph.initializer[place].CopyFrom(numpy_helper.from_array(scaled, name))
    return model


def repair_of(facts: dict[str, Any]) -> RepairFacts:
    return RepairFacts.from_dict(facts["repair"], "the facts")


@pytest.mark.parametrize("form", [form.name for form in REPAIRED])
def test_what_is_sound_is_the_plain_form_byte_for_byte(
    convert: Convert, small_graph: Small, tmp_path: Path, form: str
) -> None:
    _, facts = convert(small_graph(), form)
    made = (tmp_path / "result.onnx").read_bytes()
    convert(small_graph(), form.split("-")[0])
    assert (tmp_path / "result.onnx").read_bytes() == made
    repair = repair_of(facts)
    assert (repair.raised, repair.broke, repair.share) == ((), "", 0.0)
    assert repair.words == f"nothing had to be raised above {form.split('-')[0]}"
    assert "least headroom" in repair.result


@pytest.mark.parametrize(
    ("form", "wide"),
    [("float16-repaired", "bfloat16"), ("float16-repaired-float32", "float32")],
)
def test_what_float16_breaks_is_raised(
    convert: Convert, small_graph: Small, pictures: np.ndarray, form: str, wide: str
) -> None:
    model, facts = convert(loud(small_graph()), form, max_error=1e-2, max_share=0.9)
    repair = repair_of(facts)
    parts = [part.part for part in repair.raised]
    assert "stages.0.blocks.0.conv" in parts
    assert "stem" not in parts
    assert "head" not in parts
    assert {part.type for part in repair.raised} == {wide}
    assert repair.beyond.startswith("the network itself leaves the range of float16")
    assert repair.headroom is not None
    assert repair.headroom > 4
    assert np.isfinite(OnnxExecutor(model).run(pictures)).all()
    assert f"({len(parts)} in {wide}; " in repair.words
    network = Network("small", ("a",), (3, 8, 8), {})
    stored = FormFacts(network=network, repair=repair).to_facts()
    assert FormFacts.from_facts(stored, "the facts").repair == repair


def test_labels_and_the_drop_that_is_allowed_come_from_the_settings(
    convert: Convert, small_graph: Small
) -> None:
    with pytest.raises(GateFailedError, match="cannot repair small in float16: the network itself"):
        convert(loud(small_graph()), "float16-repaired", max_share=0.0)


def test_images_that_decide_are_bounded(small_graph: Small, tmp_path: Path) -> None:
    onnx.save(small_graph(), tmp_path / "source.onnx")
    noise = np.random.default_rng(0).standard_normal((600, 3, 8, 8)).astype(np.float32)
    images = CalibrationSet(noise, np.full(600, -1, np.int64), ())
    network = Network("small", ("a",), (3, 8, 8), {})
    job = FormJob(tmp_path / "source.onnx", network, {}, lambda: images, lambda line: None)
    facts = REPAIRED[0].convert(job, tmp_path / "made.onnx")
    assert repair_of(facts).images == 512


def test_trt_builds_from_repaired_forms_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.targets.tensorrt.target.find_gpu", lambda: "no GPU")
    target, repairing = TARGETS["trt"], TrtOptions(repair=True)

    def names(options: TrtOptions | None) -> dict[str, str]:
        forms = {p: form_of(target, p, options) for p in target.precisions}
        return {precision: form.name for precision, form in forms.items() if form}

    assert names(None) == names(TrtOptions()) == dict(target.precisions)
    assert names(repairing) == {
        "fp32": "float32",
        "tf32": "float32",
        "fp16": "float16-repaired",
        "bf16": "bfloat16-repaired",
        "int8": "int8-trt-repaired",
        "fp8": "fp8-trt-repaired",
    }
    assert needs_calibration(target, "fp16", repairing)
    assert not needs_calibration(target, "fp16", TrtOptions())
    assert not needs_calibration(target, "fp32", repairing)
    # RTX 20 has no bfloat16.
    turing = TrtOptions(repair=True, compute_capabilities=("7.5", "8.9"))
    assert form_of(target, "fp16", turing) is not None
    assert target.form("fp16", turing) == "float16-repaired-float32"
    assert target.form("int8", turing) == "int8-trt-repaired-float32"


def test_a_graph_with_a_node_of_bfloat16_keeps_its_names(
    convert: Convert, small_graph: Small
) -> None:
    model, _ = convert(loud(small_graph()), "float16-repaired", max_error=1e-2, max_share=0.9)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == [
        "image",
        "logits",
    ]
    assert max(o.version for o in model.opset_import) == float16.BFLOAT16_OPSET
