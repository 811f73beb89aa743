"""A target from elsewhere, of some forty lines, goes through every command without being known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from pipeline.cli import main
from pipeline.core.network import Images, Logits
from pipeline.core.runner import Runner
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob, Requirement, Target, TargetOptions
from pipeline.targets.registry import TARGETS

CONFIG = """\
name: trial
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
targets:
  toy: {{precisions: [plain], flavour: sweet}}
validation: {{images: 40, gates: {{min_agreement: 0.9}}}}
bench: {{samples: 3, warmup: 1, max_seconds: 2}}
output: {output}
"""


class ToyOptions(TargetOptions):
    """Options of the toy."""

    flavour: str = "plain"


class ToyRunner(Runner):
    device = "the toy"

    def __init__(self, model: Path) -> None:
        self.session: Any = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, images: Images) -> Logits:
        logits: Logits = self.session.run(None, {"image": images})[0]
        return logits


class ToyTarget(Target):
    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy runtime"
    precisions: ClassVar[dict[str, str]] = {"plain": "float32"}
    options: ClassVar[type[TargetOptions]] = ToyOptions

    def requirements(self) -> list[Requirement]:
        return [Requirement("a toy box", "wooden", "build", "")]

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        assert isinstance(job.options, ToyOptions)
        assert job.graph is not None
        shutil.copyfile(job.graph, folder / "model.toy")
        return {"flavour": job.options.flavour, "network": job.network.to_dict()}

    def inspect(self, artifact: Artifact) -> str:
        return "looked into the toy box"

    def missing(self, artifact: Artifact) -> str | None:
        return None

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        return ToyRunner(artifact.path("model.toy"))


@pytest.fixture
def toy() -> Iterator[None]:
    TARGETS.register(ToyTarget())
    yield
    TARGETS.remove("toy")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_target_from_elsewhere_goes_through_every_command(
    toy: None, tmp_path: Path, begin: Callable[[Path], Path]
) -> None:
    path, folder = tmp_path / "pipeline.yaml", tmp_path / "engines" / "trial"
    path.write_text(CONFIG.format(output=tmp_path / "engines"))
    begin(folder)
    ran = invoke("run", str(path), "--target", "toy", "--quiet")
    assert "toy/plain" in ran
    results = json.loads((folder / "results.json").read_text())
    (artifact,) = results["artifacts"]
    assert artifact["target"] == "toy"
    assert artifact["accuracy"]["agreement"]["value"] >= 0.99
    assert artifact["latency"]["state"] == "measured"
    assert results["choice"]["toy"]["precision"] == "plain"
    page = (folder / "report.html").read_text()
    assert "Toy runtime" in page
    assert "sweet" in page

    assert "looked into the toy box" in invoke("check", "trial", "--output", str(folder.parent))
    assert "a toy box" in invoke("doctor")
    measured = invoke("bench", "--target", "toy", "--config", str(path), "--json")
    assert json.loads(measured.splitlines()[-1])["devices"]["plain"] == "the toy"
    assert "up to date" in invoke("run", str(path), "--dry-run")
    assert "flavour" in invoke("schema")


class MendingTarget(ToyTarget):
    """A toy that computes in float16 as well, and is proposed to everybody."""

    name: ClassVar[str] = "mending"
    precisions: ClassVar[dict[str, str]] = {"plain": "float32", "half": "float16"}
    proposed: ClassVar[tuple[str, ...]] = ("half",)

    def repaired(self, precision: str, *, bfloat16: bool) -> str:
        return "float16-repaired" if bfloat16 else "float16-repaired-float32"


@pytest.fixture
def mending() -> Iterator[None]:
    TARGETS.register(MendingTarget())
    yield
    TARGETS.remove("mending")


def test_what_it_can_is_offered(
    mending: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`repair` mends a graph for it, and a first configuration asks for it."""
    monkeypatch.chdir(tmp_path)
    network = ("--model", "care_tiny", "--checkpoint", "embedded", "--data", "fashion-mnist")
    invoke("init", *network)
    assert "mending: {precisions: [half]}" in (tmp_path / "pipeline.yaml").read_text()
    weights = numpy_helper.from_array(np.ones((3, 4), np.float32), "w")
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["x"], "/Pool"),
        helper.make_node("Flatten", ["x"], ["y"], "/Flatten"),
        helper.make_node("MatMul", ["y", "w"], ["logits"], "/fc/MatMul"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "toy", [image], [logits], [weights])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), "model.onnx")
    told = invoke(
        *("repair", "model.onnx", "--output", "made.onnx", "--target", "mending", "--noise", "2")
    )
    assert "wrote made.onnx" in told
    assert (tmp_path / "made.onnx").is_file()


def test_what_it_leaves_out_is_refused_with_who_can(toy: None, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "engines"))
    for arguments, known in (
        (("bench", "--target", "toy", "--import", str(path)), "coreml"),
        (("bench", "--target", "toy", "--device", "mac"), "coreml: mac, iphone, ipad"),
    ):
        result = CliRunner().invoke(main, [*arguments, "--config", str(path)])
        assert result.exit_code == 2
        assert known in result.output


def test_its_options_are_checked(toy: None, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    text = CONFIG.format(output=tmp_path / "engines").replace("flavour", "flavor")
    path.write_text(text)
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run"])
    assert result.exit_code == 2
    assert "targets.toy.flavor: unknown key; did you mean flavour?" in result.output


def test_names_are_taken_once(toy: None) -> None:
    with pytest.raises(ValueError, match="'toy' already"):
        TARGETS.register(ToyTarget())


def test_without_the_toy_its_name_is_unknown(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--target", "toy"])
    assert result.exit_code == 2
    assert "known are trt, ort, coreml, coreai" in result.output
