"""Graphs that a runtime refuses, and operators that an executor lacks, through a whole run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
from click.testing import CliRunner

from calibration.kept import Kept
from calibration.sensitivity import Outcome
from pipeline.cli import main
from pipeline.core import machine
from pipeline.core.errors import BuildError, UnsupportedOperatorError
from pipeline.core.runner import Runner
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob, Requirement, Target, TargetOptions
from pipeline.targets.registry import TARGETS

CONFIG = """\
name: trial
model: {{name: care_tiny, checkpoint: embedded}}
data: {{validation: fashion-mnist, calibration: fashion-mnist}}
targets:
  choosy: {{precisions: [picky, gap, never]}}
validation: {{images: 20}}
bench: {{samples: 3, warmup: 1, max_seconds: 2}}
output: {output}
"""


class Choosy(Target):
    """Refuses graphs: "picky" what onnxsim made, "never" all of them."""

    name: ClassVar[str] = "choosy"
    title: ClassVar[str] = "Choosy runtime"
    precisions: ClassVar[Mapping[str, str]] = dict.fromkeys(("picky", "gap", "never"), "float32")
    options: ClassVar[type[TargetOptions]] = TargetOptions
    timed: ClassVar[bool] = True

    def hardware(self) -> dict[str, str]:
        return {"board": "seven"}

    def requirements(self) -> list[Requirement]:
        return []

    def versions(self) -> dict[str, str]:
        return {"choosy": "1"}

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        assert job.graph is not None
        (folder / "half").write_text("left by a build that fails")
        assert job.evaluations is not None
        Kept(job.evaluations).outcome("a graph", lambda: Outcome(1.0, 1.0, 0.0))
        if job.precision == "never" or (
            job.precision == "picky" and job.graph.name != "graph.onnx"
        ):
            raise BuildError(f"no kernel for {job.graph.parent.name}")
        shutil.copyfile(job.graph, folder / "model.onnx")
        (folder / "half").unlink()
        return {"network": job.network.to_dict()}

    def inspect(self, artifact: Artifact) -> str:
        return "looked at"

    def missing(self, artifact: Artifact) -> str | None:
        return "no such device is here"

    def open(self, artifact: Artifact, *, threads: int | None = None) -> Runner:
        raise AssertionError("nothing runs here")


@pytest.fixture
def choosy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def emulate(self: Target, artifact: Artifact, graph: Path | None) -> Runner | None:
        assert graph is not None
        if artifact.name == "choosy/gap":
            raise UnsupportedOperatorError("operator Fancy is not known to the executor")
        seen.append(graph)
        return None

    seen: list[Path] = []
    monkeypatch.setattr(Choosy, "emulate", emulate)
    TARGETS.register(Choosy())
    yield
    TARGETS.remove("choosy")
    assert [graph.name for graph in seen] == ["graph.onnx"], "the artifact's own graph is judged"


def test_refusals_are_worked_around_or_told(
    choosy: None, tmp_path: Path, begin: Callable[[Path], Path]
) -> None:
    path, folder = tmp_path / "pipeline.yaml", tmp_path / "engines" / "trial"
    path.write_text(CONFIG.format(output=tmp_path / "engines"))
    begin(folder)
    result = CliRunner().invoke(main, ["run", str(path)], catch_exceptions=False)
    assert result.exit_code == 3, result.output
    results = json.loads((folder / "results.json").read_text())
    steps = {step["name"]: step for step in results["steps"]}

    picky = Artifact.read(folder / "choosy/picky")
    assert set(picky.files) == {"graph.onnx", "model.onnx"}
    exported = onnx.load(folder / "export/model.onnx")
    simplified = onnx.load(folder / "onnx/model.onnx")
    own = onnx.load(picky.path("graph.onnx"))
    assert len(own.graph.node) == len(exported.graph.node)
    assert own.graph != simplified.graph
    assert picky.facts["refused_simplified_graph"] == "no kernel for float32"
    assert picky.facts["measured_on"] == {**machine.cpu_class(), "board": "seven"}
    told = "refused the graph that onnxsim made, and took the one before it"
    assert told in steps["choosy/picky"]["why"]

    assert steps["choosy/never"]["state"] == "failed"
    assert "no kernel for float32" in steps["choosy/never"]["why"], "the first refusal is told"
    assert steps["validate/choosy-never"]["state"] == "skipped"

    assert steps["validate/choosy-gap"]["state"] == "done", "a gap of the executor fails nothing"
    gap = Artifact.read(folder / "validate/choosy-gap").facts["numbers"]["top1"]
    assert gap["state"] == "not measured"
    assert "no such device is here; and it cannot be emulated: operator Fancy" in gap["why"]

    # What searches evaluated is kept for the next run where a build failed, and nowhere else.
    kept = [path.name.rpartition("-")[0] for path in (folder / ".evaluations").iterdir()]
    assert kept == ["choosy-never"]

    # The report says so of what lies there, whichever run made it.
    again = CliRunner().invoke(main, ["run", str(path), "--only", "export"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    for report in (
        again.output,
        *((folder / f"report.{kind}").read_text() for kind in ("md", "html")),
    ):
        assert f"choosy/picky: {Choosy.title} {told}" in " ".join(report.split())
