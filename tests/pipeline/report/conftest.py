"""Runs with a bit of everything."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import BuildError
from pipeline.report.model import Run
from pipeline.report.results import collect
from pipeline.scheduler.execute import Outcome
from pipeline.steps.step import StageResult
from pipeline.steps.step import State as StepState
from tests.pipeline.report.making import CLASSES, STEPS, Partial, configured, ended, fill


def _run(folder: Path, classes: int = CLASSES) -> Run:
    """A run in which everything occurs that can: also a failure, and a gate that does not hold."""
    config = configured(folder)
    fill(config, classes)
    error = BuildError("coremltools refuses the operation 'erf' in blocks.1.mlp")
    ends = {end.name: end for end in ended(*STEPS).results}
    ends["ort/fp32"] = StageResult("build", "ort/fp32", StepState.DONE, "not built yet", 2.0)
    ends["coreml/mixed"] = StageResult(
        "build", "coreml/mixed", StepState.FAILED, str(error), 1.0, error
    )
    ends["validate/coreml-mixed"] = StageResult(
        "validate", "validate/coreml-mixed", StepState.SKIPPED, "coreml/mixed failed"
    )
    run = collect(config, Path("configs/my run.yaml"), Outcome(list(ends.values())))
    return dataclasses.replace(run, date="2026-01-02 03:04")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Measured, emulated, not measured, failed: one run with all of them."""
    return _run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same of a network with 1000 classes."""
    return _run(tmp_path_factory.mktemp("imagenet"), classes=1000)


@pytest.fixture
def nothing(tmp_path: Path) -> Run:
    """A run whose very first step failed."""
    config = configured(tmp_path)
    error = BuildError("care_tiny does not export to ONNX: no memory")
    ends = [StageResult("export", "export", StepState.FAILED, str(error), 0.1, error)]
    ends += [
        StageResult("some stage", name, StepState.SKIPPED, "export failed") for name in STEPS[1:]
    ]
    return collect(config, tmp_path / "pipeline.yaml", Outcome(ends))


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an earlier run left all its artifacts; not to be changed."""
    folder = tmp_path_factory.mktemp("filled")
    fill(configured(folder))
    return folder


@pytest.fixture
def partial(tmp_path: Path, filled: Path) -> Partial:
    """See `Partial`."""

    def report(*steps: str, there: bool, gates: str = "min_agreement: 0.9") -> Run:
        config = configured(tmp_path, gates)
        if there:
            shutil.copytree(filled / "engines", tmp_path / "engines", dirs_exist_ok=True)
        return collect(config, tmp_path / "pipeline.yaml", ended(*steps))

    return report
