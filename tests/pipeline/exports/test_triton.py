from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.core.errors import ArtifactError, InputError
from pipeline.core.network import Network
from pipeline.exports import triton
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact

WRITTEN = ["1", "artifact.json", "config.pbtxt", "labels.txt"]
NETWORK = Network(
    "small", ("shirt", "café", 'a "b"'), (3, 8, 8), {"size": 8, "mean": (0.5,), "note": 'é "x"'}
)


def built(folder: Path, name: str, files: dict[str, bytes], facts: dict[str, Any]) -> Artifact:
    def write(place: Path) -> dict[str, Any]:
        for file, content in files.items():
            (place / file).write_bytes(content)
        return facts

    return artifact.make(
        folder, kind="build", name=name, key="k", made_from={}, tools={}, build=write
    )


def without_kit(said: list[str]) -> list[str]:
    """What was said beside that such artifacts, which lie outside of results, have no kit."""
    return [line for line in said if not line.startswith("without a golden kit: ")]


def graph(batch: str | int) -> bytes:
    shape: list[str | int] = [batch, 3, 8, 8]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("GlobalAveragePool", ["image"], ["logits"])],
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3, 1, 1])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


@pytest.fixture
def ort(tmp_path: Path) -> Artifact:
    return built(tmp_path / "ort", "ort/fp32", {"model.onnx": graph("batch")}, {})


@pytest.fixture
def plan(tmp_path: Path) -> Artifact:
    facts = {
        "library": "tensorrt",
        "input": {"name": "image", "shape": [-1, 3, 8, 8]},
        "output": {"name": "logits"},
        "batches": {"min": 1, "opt": 8, "max": 32},
    }
    return built(tmp_path / "trt", "trt/fp16", {"model.engine": b"plan"}, facts)


def parsed(folder: Path) -> Any:
    """The configuration, read by the official definition of its format."""
    definition = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2",
        reason="tritonclient[grpc] is not installed",
        exc_type=ImportError,
    )
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), definition.ModelConfig())


def test_an_onnx_model(ort: Artifact, tmp_path: Path) -> None:
    folder = triton.export(ort, NETWORK, tmp_path / "repository", max_batch=16, instances=2)
    assert folder == tmp_path / "repository" / "small"
    assert (folder / "1" / "model.onnx").read_bytes() == graph("batch")
    assert (folder / "labels.txt").read_text().splitlines() == list(NETWORK.labels)
    config = parsed(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("small", "onnxruntime", 16)
    assert list(config.input[0].dims) == [3, 8, 8]
    assert list(config.output[0].dims) == [3]
    assert config.output[0].label_filename == "labels.txt"
    assert config.instance_group[0].count == 2
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert [w.batch_size for w in config.model_warmup] == [1, 16]
    assert config.model_warmup[0].inputs["image"].random_data
    assert '"note": "\\u00e9 \\"x\\""' in config.parameters["preprocess"].string_value


def test_the_licence_of_the_weights_goes_along(ort: Artifact, tmp_path: Path) -> None:
    assert "license" not in parsed(triton.export(ort, NETWORK, tmp_path / "first")).parameters
    told = {"weights": "timm's resnet18", "license": "cc-by-nc-4.0", "license_remark": 'no "sale"'}
    network = dataclasses.replace(NETWORK, description={**told, "model": "timm/resnet18"})
    parameters = parsed(triton.export(ort, network, tmp_path / "second")).parameters
    found = {key: json.loads(parameters[key].string_value) for key in told}
    assert found == told
    assert "model" not in parameters


def test_an_engine_of_full_tensorrt(plan: Artifact, tmp_path: Path) -> None:
    folder = triton.export(plan, NETWORK, tmp_path / "repository", name="care-fp16")
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    config = parsed(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("care-fp16", "tensorrt", 32)
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]


def test_a_fixed_batch(tmp_path: Path) -> None:
    fixed = built(tmp_path / "ort", "ort/fp32", {"model.onnx": graph(4)}, {})
    config = parsed(triton.export(fixed, NETWORK, tmp_path / "repository"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 8, 8]
    assert list(config.output[0].dims) == [4, 3]
    assert not config.HasField("dynamic_batching")
    assert [w.batch_size for w in config.model_warmup] == [0]


def test_an_engine_for_a_fixed_batch_that_takes_more(plan: Artifact, tmp_path: Path) -> None:
    facts = {**plan.facts, "batches": {"min": 2, "opt": 2, "max": 2}}
    fixed = built(tmp_path / "fixed", "trt/fp16", {"model.engine": b"plan"}, facts)
    config = parsed(triton.export(fixed, NETWORK, tmp_path / "repository"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 3, 8, 8]


def test_exporting_again_replaces_the_model_and_leaves_others(
    ort: Artifact, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    triton.export(ort, NETWORK, repository, name="other")
    folder = triton.export(ort, NETWORK, repository)
    before = (repository / "other" / "config.pbtxt").stat().st_mtime_ns
    other = built(tmp_path / "ort", "ort/fp32", {"model.onnx": graph(4)}, {})
    said: list[str] = []
    triton.export(other, NETWORK, repository, say=said.append)
    assert without_kit(said) == []
    assert sorted(p.name for p in repository.iterdir()) == ["other", "small"]
    assert sorted(p.name for p in folder.iterdir()) == WRITTEN
    assert (folder / "1" / "model.onnx").read_bytes() == graph(4)
    assert parsed(folder).max_batch_size == 0
    assert Artifact.read(folder).key == other.digest
    assert (repository / "other" / "config.pbtxt").stat().st_mtime_ns == before


def test_another_kind_of_model_takes_the_place_of_the_first(
    ort: Artifact, plan: Artifact, tmp_path: Path
) -> None:
    folder = triton.export(ort, NETWORK, tmp_path / "repository")
    triton.export(plan, NETWORK, tmp_path / "repository")
    assert [p.name for p in (folder / "1").iterdir()] == ["model.plan"]


def test_other_versions_and_notes_of_a_model_stay(ort: Artifact, tmp_path: Path) -> None:
    folder = triton.export(ort, NETWORK, tmp_path / "repository")
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")
    other = built(tmp_path / "ort", "ort/fp32", {"model.onnx": graph(4)}, {})
    triton.export(other, NETWORK, tmp_path / "repository")
    assert (folder / "1" / "model.onnx").read_bytes() == graph(4)
    assert (folder / "2" / "model.onnx").read_bytes() == b"mine"
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ("1/stale", "1"),
        ("1/model.onnx", "1"),
        ("config.pbtxt", "config.pbtxt"),
        ("labels.txt", "labels.txt"),
    ],
)
def test_what_was_changed_is_set_aside_and_said(
    ort: Artifact, tmp_path: Path, changed: str, part: str
) -> None:
    folder = triton.export(ort, NETWORK, tmp_path / "repository")
    (folder / changed).write_text("mine")
    said: list[str] = []
    triton.export(ort, NETWORK, tmp_path / "repository", say=said.append)
    aside = next(path for path in folder.iterdir() if path.name.startswith(f"{part}.before-"))
    assert without_kit(said) == [f"{folder / part} was changed since: set aside as {aside.name}"]
    kept = aside / "/".join(changed.split("/")[1:]) if aside.is_dir() else aside
    assert kept.read_text() == "mine"
    assert [path.name for path in (folder / "1").iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*WRITTEN, aside.name])


@pytest.mark.parametrize("name", ["config.pbtxt", "1/model.onnx", "artifact.json"])
def test_a_folder_that_we_did_not_write_is_refused(
    ort: Artifact, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "repository" / "small" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="small is in the way"):
        triton.export(ort, NETWORK, tmp_path / "repository")
    assert [p for p in (tmp_path / "repository").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_an_artifact_of_the_pipeline_is_no_model(ort: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="ort is in the way"):
        triton.export(ort, NETWORK, tmp_path, name="ort")
    ort.verify()


def test_an_export_that_was_killed_is_finished_by_the_next(ort: Artifact, tmp_path: Path) -> None:
    folder = triton.export(ort, NETWORK, tmp_path / "repository")
    manifest = (folder / "artifact.json").read_bytes()
    other = built(tmp_path / "ort", "ort/fp32", {"model.onnx": graph(4)}, {})
    triton.export(other, NETWORK, tmp_path / "repository")
    (folder / "artifact.json").write_bytes(manifest)  # all parts but the last were moved
    said: list[str] = []
    triton.export(other, NETWORK, tmp_path / "repository", say=said.append)
    assert without_kit(said) == []
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN


def test_what_triton_cannot_run(plan: Artifact, tmp_path: Path) -> None:
    rtx = built(tmp_path / "rtx", "trt/fp16", {"model.engine": b"x"}, {"library": "tensorrt_rtx"})
    with pytest.raises(InputError, match="no backend for TensorRT-RTX, which built trt/fp16"):
        triton.export(rtx, NETWORK, tmp_path / "repository")
    package = built(tmp_path / "coreml", "coreml/fp16", {"weights.bin": b""}, {})
    with pytest.raises(InputError, match="Triton cannot run coreml/fp16"):
        triton.export(package, NETWORK, tmp_path / "repository")
    with pytest.raises(InputError, match="does not do as a model's name"):
        triton.export(plan, NETWORK, tmp_path / "repository", name="../evil")
    assert not (tmp_path / "repository").exists()


def test_damage_is_noticed(plan: Artifact, tmp_path: Path) -> None:
    plan.path("model.engine").write_bytes(b"plot")
    with pytest.raises(ArtifactError, match="has changed"):
        triton.export(plan, NETWORK, tmp_path / "repository")


def test_a_repository_that_cannot_be_written(ort: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="make the folder writable"):
        triton.export(ort, NETWORK, tmp_path / "file" / "repository")


def test_the_exported_model_answers(ort: Artifact, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = triton.export(ort, NETWORK, tmp_path / "repository")
    session = runtime.InferenceSession(
        folder / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    answer = session.run(None, {"image": np.ones((2, 3, 8, 8), np.float32)})[0]
    assert answer.shape == (2, 3, 1, 1)
    assert onnx.load(folder / "1" / "model.onnx").graph.input[0].name == "image"


def without(part: str) -> bytes:
    """A graph that lacks its inputs, its outputs, or all shapes."""
    model = onnx.load_from_string(graph(4))
    if part == "shape":
        model.graph.input[0].ClearField("type")
    else:
        model.graph.ClearField(part)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xff", without("input"), without("output"), without("shape")],
    ids=["empty", "no protobuf", "no input", "no output", "no shape"],
)
def test_a_graph_without_an_input_or_output_is_refused(content: bytes, tmp_path: Path) -> None:
    odd = built(tmp_path / "ort", "ort/fp32", {"model.onnx": content}, {})
    with pytest.raises(ArtifactError, match=r"model\.onnx is no model with an input and an output"):
        triton.export(odd, NETWORK, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("fact", ["input", "output", "batches"])
@pytest.mark.parametrize("value", [None, 5, {}, {"name": 1, "shape": []}])
def test_an_engine_that_does_not_state_itself_is_refused(
    fact: str, value: object, plan: Artifact, tmp_path: Path
) -> None:
    facts = {**plan.facts, fact: value}
    odd = built(tmp_path / "odd", "trt/fp16", {"model.engine": b"plan"}, facts)
    if (fact, value) == ("output", {"name": 1, "shape": []}):
        return  # a name is all that is asked of it
    with pytest.raises(ArtifactError, match=r"odd does not state input, output and batches"):
        triton.export(odd, NETWORK, tmp_path / "models")
    assert not (tmp_path / "models").exists()
