"""Measuring on a Mac: signatures of the installed packages, and the whole way by Apple's runtime.

Off a Mac there are no compute units: here the runtime of the package stands for each of them.
"""

from __future__ import annotations

import inspect
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import ArtifactError, UnavailableError
from pipeline.core.figures import State
from pipeline.core.network import Images, Logits
from pipeline.steps.artifact import Artifact
from pipeline.targets import apple
from pipeline.targets.base import DeviceJob, DeviceMeasurement
from pipeline.targets.coreai import device, runtime
from pipeline.targets.coreai.options import CoreAIOptions
from pipeline.targets.coreai.package import MODEL, digest
from pipeline.targets.coreai.results import Measurements
from pipeline.targets.coreai.runtime import UNITS, Runtime
from pipeline.targets.coreai.target import CoreAITarget

from .conftest import Build, Tiny, images, needs_coreai, pictures

pytestmark = needs_coreai
TARGET = CoreAITarget()


def reference() -> Logits:
    with torch.inference_mode():
        logits: Logits = Tiny().eval()(torch.from_numpy(pictures().images)).numpy()
    return logits


JOB = DeviceJob(options=CoreAIOptions(), samples=4, pictures=pictures, expected=reference)


@pytest.fixture
def mac(build: Build, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This machine as a Mac of which each compute unit is Linux's; the units asked for."""
    asked: list[str] = []
    build()  # with what the packages really are

    def options(unit: str) -> None:
        asked.append(unit)

    def output(*command: str) -> str:
        known = {"sysctl": "Mac16,1\n", "pmset": "Note: No thermal warning level was recorded"}
        return known[command[0]]

    monkeypatch.setenv("USE_OS_COREAI", "1")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("27.0", ("", "", ""), "arm64"))
    monkeypatch.setattr(runtime, "options", options)
    monkeypatch.setattr(device, "has_units", lambda: True)
    monkeypatch.setattr(apple, "_output", output)
    return asked


def on_a_mac(*artifacts: Artifact) -> dict[str, DeviceMeasurement]:
    by_precision = {artifact.facts["precision"]: artifact for artifact in artifacts}
    return TARGET.measure_on("mac", by_precision, JOB)


def test_the_installed_packages_have_what_is_called() -> None:
    from coreai.authoring import AIModelAsset
    from coreai.runtime import AIModel, InferenceFunction, NDArray, SpecializationOptions

    assert isinstance(SpecializationOptions.is_supported(), bool)
    assert not inspect.signature(SpecializationOptions.is_supported).parameters
    assert "function_name" in inspect.signature(AIModel.load_function).parameters
    assert "specialization_options" in inspect.signature(AIModel.load).parameters
    assert inspect.iscoroutinefunction(InferenceFunction.__call__)
    assert "inputs" in inspect.signature(InferenceFunction.__call__).parameters
    assert "data" in inspect.signature(NDArray).parameters
    assert "path" in inspect.signature(AIModelAsset.load).parameters


def test_a_mac_measures_every_preference(build: Build, mac: list[str]) -> None:
    artifact = build()
    found = on_a_mac(artifact)["fp16"]
    order = ["cpu_only", *(unit for unit in UNITS if unit != "cpu_only")]
    assert list(dict.fromkeys(mac)) == order
    measured = Measurements.model_validate_json(found.content)
    assert [run.compute_unit for run in measured.runs] == order
    assert measured.device.model == "Mac16,1"
    assert measured.device.os == "macOS 27.0"
    assert measured.device.kind == "mac"
    assert measured.model.digest == digest(artifact.folder / MODEL)
    for run in measured.runs:
        assert len(run.load_ms) == device.LOADS
        assert len(run.predict_ms) == 4
        assert run.difference_to_cpu_only == 0
        assert run.thermal_before == run.thermal_after == "nominal"
    assert found.latency.state is State.MEASURED
    assert found.latency.samples == 4
    rows = found.tables[device.AGREEMENT]
    assert [row["compute_unit"] for row in rows] == order
    assert [row["agreement"] for row in rows] == [1.0] * 4
    assert 0 < rows[0]["relative_error"] < 5e-3


def test_what_a_mac_measured_is_read_back(build: Build, mac: list[str], tmp_path: Path) -> None:
    artifact = build()
    file = tmp_path / "fp16.json"
    measured = on_a_mac(artifact)["fp16"]
    file.write_text(measured.content)
    again = TARGET.read_measurements(file, {"fp16": artifact}, "mac")["fp16"]
    assert (again.latency, again.line) == (measured.latency, measured.line)


class Scaled:
    """Apple's runtime, but for what some units answer: logits times so much."""

    def __init__(self, **factors: float) -> None:
        self._factors = factors

    def __call__(self, package: Path, unit: str) -> Runtime:
        factor = self._factors.get(unit, 1.0)

        class Off(Runtime):
            def __call__(self, given: Images) -> Logits:
                return super().__call__(given) * np.float32(factor)

        return Off(package, unit)


def test_all_are_held_against_the_cpu(
    build: Build, mac: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    units = Scaled(default=1.5, gpu=2.0, neural_engine=float("nan"))
    monkeypatch.setattr(device, "Runtime", units)
    runs = Measurements.model_validate_json(on_a_mac(build())["fp16"].content).runs
    differences = {run.compute_unit: run.difference_to_cpu_only for run in runs}
    assert differences["cpu_only"] == 0
    assert differences["default"] == pytest.approx(0.5)
    assert differences["gpu"] == pytest.approx(1.0)
    # Not finite.
    assert differences["neural_engine"] is None


@pytest.mark.parametrize(
    ("factor", "wrong"), [(1.0, False), (1.01, False), (1.039, True), (float("nan"), True)]
)
def test_a_unit_that_computes_something_else_is_named(
    build: Build, mac: list[str], monkeypatch: pytest.MonkeyPatch, factor: float, wrong: bool
) -> None:
    """So far off was MobileNetV3 in the report of the Neural Engine (coreai-torch, issue 51)."""
    monkeypatch.setattr(device, "Runtime", Scaled(neural_engine=factor))
    found = on_a_mac(build())["fp16"]
    assert ("its logits are wrong by neural_engine: do not ship" in found.line) == wrong
    verdicts = {row["compute_unit"]: row["logits"] for row in found.tables["on_devices"]}
    assert verdicts["default"] == "as by the CPU"
    assert verdicts["neural_engine"] == ("wrong" if wrong else "as by the CPU")


def test_a_damaged_asset_is_not_measured(build: Build, mac: list[str], tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "copy"
    shutil.copytree(build().folder, place)
    (place / MODEL / "main.mlirb").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="is damaged, or of another asset"):
        on_a_mac(Artifact.read(place))
    assert mac == []


def test_a_mac_with_the_local_runtime_says_so(
    build: Build, mac: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_units", runtime.has_units)
    with pytest.raises(UnavailableError, match="unset USE_LOCAL_COREAI") as caught:
        on_a_mac(build())
    assert caught.value.exit_code == 4


@pytest.mark.skipif(platform.system() == "Darwin", reason="there it runs")
def test_off_a_mac_nothing_is_measured(build: Build) -> None:
    with pytest.raises(UnavailableError, match="run the same command on a Mac"):
        on_a_mac(build())
    assert not runtime.has_units()


@pytest.mark.parametrize("kind", ["iphone", "ipad"])
def test_a_phone_is_measured_by_the_swift_package(build: Build, kind: str) -> None:
    with pytest.raises(UnavailableError, match="export coreml-bench NAME --target coreai") as said:
        TARGET.measure_on(kind, {"fp16": build()}, JOB)
    assert f"run it on the {kind}" in str(said.value)
    assert said.value.exit_code == 4


def test_times_are_of_each_call(build: Build) -> None:
    opened = Runtime(build().folder / MODEL)
    times = opened.timed(images(1)[0], 3)
    opened.close()
    assert len(times) == 3
    assert min(times) > 0


@pytest.mark.parametrize(
    ("local", "expected"), [(None, {"USE_OS_COREAI": "1"}), ("1", {"USE_LOCAL_COREAI": "1"})]
)
def test_a_mac_takes_the_system_s_runtime_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, local: str | None, expected: dict[str, str]
) -> None:
    environment = {} if local is None else {"USE_LOCAL_COREAI": local}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(os, "environ", environment)
    runtime._choose_system()
    assert environment == expected
