"""A run that begins with an ONNX graph: what it is made from, what is refused, what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner
from onnx import helper, numpy_helper

import pipeline
from pipeline import config
from pipeline.cli import main
from pipeline.core.errors import BuildError, ConfigError, ModelError
from pipeline.graph_source import GraphSource
from pipeline.scheduler.plan import make_context, plan

SmallGraph = Callable[..., onnx.ModelProto]

ROOT = Path(__file__).parents[2]

CLASSES = ("ant", "bee", "cat", "dog")

SOUND: dict[str, Any] = {
    "name": "given",
    "model": {"onnx": "model.onnx"},
    "data": {"validation": "folder:photos"},
    "preprocess": {"size": 8, "crop": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3},
    "bench": {"samples": 3, "warmup": 1},
    "targets": {"ort": {"precisions": ["fp32"]}, "coreml": {"precisions": ["fp32"]}},
}


def write(**sections: Any) -> Path:
    plain = {**SOUND, **sections}
    path = Path("pipeline.yaml")
    path.write_text(yaml.safe_dump({k: v for k, v in plain.items() if v is not None}))
    return path


def source_of(**sections: Any) -> GraphSource:
    context = make_context(config.load(write(**sections)), print, lambda *told: None)
    assert isinstance(context.source, GraphSource)
    return context.source


def changed(change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load("model.onnx")
    change(model)
    onnx.save(model, "model.onnx")


def refused(*options: str, **sections: Any) -> str:
    """What a run says that refuses, and that it writes nothing."""
    path = write(**sections)
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    result = CliRunner().invoke(main, ["run", str(path), *options])
    assert result.exit_code == 2, result.output
    after = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    assert after == before
    return result.output


def keys(**sections: Any) -> dict[str, str]:
    context = make_context(config.load(write(**sections)), print, lambda *told: None)
    first = (step for step in plan(context) if not step.requires)
    return {step.name: step.key() for step in first}


# ------------------------------------------------------------------ what comes out


def test_a_graph_becomes_artifacts_that_agree_with_it(graph_project: Path) -> None:
    results = pipeline.run(write())
    rows = {row["artifact"]: row for row in results.table()}
    assert {name: row["agreement"] for name, row in rows.items()} == {
        "ort/fp32": 1.0,
        "coreml/fp32": 1.0,
    }
    stated = json.loads(Path("engines/given/onnx/artifact.json").read_text())
    assert stated["facts"]["network"]["labels"] == list(CLASSES)
    export = json.loads(Path("engines/given/export/artifact.json").read_text())["facts"]
    assert export["inference_form"] == "the graph as given"
    assert export["opset"] == 20
    assert export["macs"] > 0
    page, text = (Path("engines/given", f"report.{kind}").read_text() for kind in ("html", "md"))
    assert all("PyTorch stands here for the graph that was given: ONNX" in t for t in (page, text))
    reference = json.loads(Path("engines/given/validate/pytorch/artifact.json").read_text())
    assert reference["facts"]["numbers"]["top1"]["by"].startswith("ONNX Runtime ")


def test_a_graph_of_a_run_says_its_labels_and_preprocessing_itself(graph_project: Path) -> None:
    def say(model: onnx.ModelProto) -> None:
        helper.set_model_props(
            model,
            {
                "labels": json.dumps(["ant", "bee", "cat", "dog"]),
                "preprocess": json.dumps(
                    {**SOUND["preprocess"], "interpolation": "bilinear", "channels": "rgb"}
                ),
            },
        )

    changed(say)
    source = source_of(preprocess=None)
    source.look()
    assert source.classes[0] == CLASSES
    assert source.preprocess.interpolation == "bilinear"
    assert source.network.input_shape == (3, 8, 8)


# ------------------------------------------------------------------ keys


def test_the_keys_are_those_of_the_content_wherever_it_lies(graph_project: Path) -> None:
    before = keys()
    (graph_project / "elsewhere").mkdir()
    Path("model.onnx").rename("elsewhere/other.onnx")
    assert keys(model={"onnx": "elsewhere/other.onnx"}) == before


def test_another_weight_changes_the_keys_of_what_is_made_from_the_network(
    graph_project: Path,
) -> None:
    def nudge(model: onnx.ModelProto) -> None:
        bias = model.graph.initializer[1]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))

    before = keys()
    changed(nudge)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"export", "coreml/fp32"}


def test_a_graph_that_changes_during_the_run_is_refused(graph_project: Path) -> None:
    source = source_of()
    _ = source.checkpoint_hash, source.given

    def nudge(model: onnx.ModelProto) -> None:
        model.producer_name = "somebody else"

    changed(nudge)
    with pytest.raises(ModelError, match="was changed meanwhile: run again"):
        _ = source.graph


# ------------------------------------------------------------------ what is refused


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", 1, ["batch"]))


def no_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", 1, [3, 8, 8]))


def batches_of_one(model: onnx.ModelProto) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", 1, [1, 3, 8, 8]))


def integers(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 2


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (two_inputs, "the graph has 2 inputs (image, mask)"),
        (no_batch, "has no batch axis"),
        (integers, "is uint8, and it has to be float32"),
        (batches_of_one, "takes batches of 1 alone: set export.batch and bench.batches to 1"),
    ],
)
def test_a_run_with_a_graph_of_no_use_writes_nothing(
    graph_project: Path,
    change: Callable[[onnx.ModelProto], object],
    words: str,
    option: tuple[str, ...],
) -> None:
    changed(change)
    said = " ".join(refused(*option).split())
    assert said.startswith("error: pipeline.yaml:")
    assert "model.onnx: " in said
    assert words in said


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"onnx": "gone.onnx"}}, "model.onnx: gone.onnx is no file"),
        ({"model": {"onnx": "pipeline.yaml"}}, "pipeline.yaml is no ONNX graph"),
        ({"preprocess": None}, "preprocess is missing, and the graph of model.onnx does not say"),
        (
            {"preprocess": {**SOUND["preprocess"], "size": 16}},
            "the graph takes images of 3 x 8 x 8 (channels, height, width), and preprocess gives "
            "3 x 16 x 16",
        ),
        (
            {"data": {"validation": "folder:photos", "labels": "labels.txt"}},
            "the graph gives 4 logits for an image, and data.labels 5 classes",
        ),
        (
            {"model": {"onnx": "model.onnx", "checkpoint": "a.pt"}},
            "an onnx graph holds its weights and is made already: leave out checkpoint",
        ),
        (
            {"model": {"onnx": "model.onnx", "name": "care_s0"}},
            "give the network's name, a module that makes it, its onnx graph, or its repository on "
            "the hub: one of them",
        ),
        ({"export": {"opset": 20}}, "export.opset: the graph of model.onnx keeps its own"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(
    graph_project: Path, sections: dict[str, Any], words: str
) -> None:
    Path("labels.txt").write_text("\n".join((*CLASSES, "eel")))
    assert words in " ".join(refused(**sections).split())


def test_a_graph_that_says_any_batch_and_takes_one_is_refused(graph_project: Path) -> None:
    """As the tracing exporter leaves them, with the batch in the target of a Reshape."""

    def traced(model: onnx.ModelProto) -> None:
        shape = next(t for t in model.graph.initializer if t.name == "shape")
        shape.CopyFrom(numpy_helper.from_array(np.array([1, 16]), "shape"))

    changed(traced)
    said = " ".join(refused().split())
    assert "model.onnx: the graph does not run on 2 images, which its input takes" in said


def test_a_graph_of_a_fixed_batch_runs_with_that_batch(graph_project: Path) -> None:
    changed(batches_of_one)
    source = source_of(export={"batch": 1})
    assert source.network.labels == CLASSES
    assert source.module(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_a_graph_that_cannot_be_rebuilt_keeps_core_ml_from_being_built_alone(
    graph_project: Path,
) -> None:
    """ONNX Runtime knows operators that the executor does not."""

    def unknown(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "before"
        model.graph.node.append(helper.make_node("Det", ["image"], ["d"], "det"))
        model.graph.node.append(
            helper.make_node("ReduceSum", ["d", "axes"], ["sum"], "sum", keepdims=1)
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
        model.graph.node.append(helper.make_node("Add", ["before", "sum"], ["logits"], "add"))

    changed(unknown)
    with pytest.raises(BuildError, match=r"operator Det of the domain 'ai\.onnx' is not known"):
        _ = source_of().module
    result = CliRunner().invoke(main, ["run", str(write()), "--only", "build", "--only", "export"])
    assert result.exit_code != 0
    assert "operator Det" in " ".join(result.output.split())


def test_a_module_that_computes_something_else_is_refused(
    graph_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.emulate.onnx import module

    monkeypatch.setitem(module.PLAIN, "Elu", lambda call, x: x.clamp_min(0))
    with pytest.raises(BuildError, match=r"rebuilt in PyTorch, differs from ONNX Runtime by \d"):
        _ = source_of().module


@pytest.mark.parametrize("labels", ['["a", "a"]', "{0: 'person'}", "[" * 200])
def test_what_others_write_into_a_graph_says_nothing(graph_project: Path, labels: str) -> None:
    changed(lambda model: helper.set_model_props(model, {"labels": labels}))
    assert source_of().classes[0] == CLASSES


def test_a_mapping_may_name_a_graph(graph_project: Path) -> None:
    found = config.from_mapping({**SOUND, "model": {"onnx": "~/model.onnx"}}).config
    assert str(found.model.onnx).startswith(str(Path.home()))
    with pytest.raises(ConfigError, match="ema"):
        config.from_mapping({**SOUND, "model": {"onnx": "model.onnx", "ema": True}})


@pytest.mark.parametrize(("changes", "code"), [({"preprocess": None}, 2), ({}, 0)])
def test_a_graph_is_looked_at_and_begun_with_without_a_framework(
    graph_project: Path, changes: dict[str, Any], code: int
) -> None:
    program = (
        "import sys; from pipeline.cli import main\n"
        f"try: main(['run', {str(write(**changes))!r}, '--only', 'export'])\n"
        "except SystemExit as end: print('CODE', end.code, 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert result.stdout.splitlines()[-1] == f"CODE {code} False"
