"""Code for Macs: against the signatures of the installed coremltools, and fakes of what it does."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from pipeline.core.errors import ArtifactError, BuildError, UnavailableError
from pipeline.core.figures import State
from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.steps.artifact import Artifact
from pipeline.targets import apple
from pipeline.targets.coreml import device
from pipeline.targets.coreml.convert import COMPUTE_UNITS
from pipeline.targets.coreml.results import numbers
from pipeline.targets.coreml.target import CoreMLTarget
from pipeline.targets.coreml.verify import probes

ct = pytest.importorskip("coremltools")

from coremltools.models import compute_device, compute_plan  # noqa: E402
from coremltools.models.ml_program.experimental import perf_utils, remote_device  # noqa: E402

Build = Callable[..., Artifact]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64"))

    def output(*command: str) -> str:
        return {"sysctl": "Mac14,7\n", "pmset": "Note: No thermal warning level has been recorded"}[
            command[0]
        ]

    monkeypatch.setattr(apple, "_output", output)


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_installed_coremltools_has_what_is_called() -> None:
    benchmarker = perf_utils.MLModelBenchmarker
    assert {"model", "device"} <= parameters(benchmarker)
    assert "iterations" in parameters(benchmarker.benchmark_load)
    for method in (benchmarker.benchmark_predict, benchmarker.benchmark_operation_execution):
        assert {"inputs", "iterations", "warmup"} <= parameters(method)
        assert inspect.iscoroutinefunction(method)
    fields = benchmarker.OperationExecutionInfo.__dataclass_fields__
    assert {"spec", "compute_device_usage", "measurement"} <= set(fields)
    assert "samples" in benchmarker.Measurement.__dataclass_fields__
    assert "device_type" in parameters(remote_device.Device.get_connected_devices)
    assert "credentials" in parameters(remote_device.Device.prepare_for_model_debugging)
    assert {"type", "os_version", "name"} <= set(remote_device.Device.__dataclass_fields__)
    assert {"development_team", "provisioning_profile_uuid", "bundle_identifier"} <= parameters(
        remote_device.AppSigningCredentials
    )
    assert {"path", "compute_units"} <= parameters(compute_plan.MLComputePlan.load_from_path)
    assert hasattr(compute_plan.MLComputePlan, "get_compute_device_usage_for_mlprogram_operation")
    assert hasattr(compute_plan.MLComputePlan, "get_estimated_cost_for_mlprogram_operation")
    assert hasattr(ct.models.MLModel, "get_compiled_model_path")
    assert {"compute_units", "skip_model_load"} <= parameters(ct.models.MLModel)
    for units in COMPUTE_UNITS.values():
        assert hasattr(ct.ComputeUnit, units)
    for kind in device._DEVICES.values():
        assert hasattr(remote_device.DeviceType, kind)


def test_names_of_compute_devices() -> None:
    kinds = {
        compute_device.MLCPUComputeDevice: "cpu",
        compute_device.MLGPUComputeDevice: "gpu",
        compute_device.MLNeuralEngineComputeDevice: "neural_engine",
        remote_device.ComputePlan.CPUDevice: "cpu",
        remote_device.ComputePlan.GPUDevice: "gpu",
        remote_device.ComputePlan.NeuralEngineDevice: "neural_engine",
    }
    for kind, name in kinds.items():
        assert device._device(object.__new__(kind)) == name
    assert device._device(None) == "unknown"


class FakeModel:
    """An `MLModel` as it behaves on a Mac, with the executor for Core ML."""

    def __init__(
        self,
        model: str,
        compute_units: Any = None,
        skip_model_load: bool = False,
        weights_dir: str | None = None,
    ) -> None:
        if not Path(model).exists():
            raise Exception(f"no model at {model}")
        self.compute_unit = compute_units
        self._loaded = not skip_model_load
        self._executor = MilExecutor(Path(model))
        self._spec = ct.proto.Model_pb2.Model()
        self._spec.ParseFromString(
            (Path(model) / "Data/com.apple.CoreML/model.mlmodel").read_bytes()
        )

    def get_spec(self) -> Any:
        return self._spec

    def get_compiled_model_path(self) -> str:
        if not self._loaded:
            raise Exception("This model was not loaded")
        return "/compiled.mlmodelc"

    def predict(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.predict(one) for one in data]
        pixels = np.asarray(data["image"])
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        answers = self._executor.predict(pixels[None])
        probabilities = answers["classLabel_probs"][0]
        return {
            "classLabel": answers["classLabel"][0],
            "classLabel_probs": dict(zip(self._executor.labels, probabilities, strict=True)),
            "logits": answers["logits"],
        }


REAL = perf_utils.MLModelBenchmarker


class FakeBenchmarker:
    """An `MLModelBenchmarker` whose clock says what it is told."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, model: FakeModel, device: Any = None) -> None:
        self.model, self.device = model, device
        assert not model._loaded

    async def benchmark_load(self, iterations: int = 1) -> Any:
        return self._measured("load", iterations, 50.0)

    async def benchmark_predict(
        self, inputs: dict[str, Any], iterations: int = 1, warmup: bool = False
    ) -> Any:
        assert inputs["image"].dtype == np.float32
        assert inputs["image"].shape == (1, 3, 16, 16)
        return self._measured("predict", iterations, 1.0)

    async def benchmark_operation_execution(
        self, inputs: dict[str, Any], iterations: int = 1, warmup: bool = False
    ) -> list[Any]:
        usage = SimpleNamespace(
            preferred_compute_device=object.__new__(compute_device.MLNeuralEngineComputeDevice)
        )
        spec = SimpleNamespace(type="conv", outputs=[SimpleNamespace(name="conv2d")])
        other = SimpleNamespace(type="add", outputs=[])
        const = SimpleNamespace(type="const", outputs=[SimpleNamespace(name="weight")])
        found = [(spec, usage, [0.75]), (other, None, [0.25]), (const, None, [])]
        return [
            REAL.OperationExecutionInfo(
                spec=one,
                path=None,
                compute_device_usage=where,
                measurement=REAL.Measurement(None, samples),
            )
            for one, where, samples in found
        ]

    def _measured(self, what: str, iterations: int, value: float) -> Any:
        self.calls.append((what, {"iterations": iterations, "device": self.device}))
        return SimpleNamespace(samples=[value] * iterations)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, mac: None, build: Build) -> None:
    build()  # with what coremltools really is
    monkeypatch.setattr(ct.models, "MLModel", FakeModel)
    monkeypatch.setattr(perf_utils, "MLModelBenchmarker", FakeBenchmarker)
    FakeBenchmarker.calls.clear()


@pytest.mark.usefixtures("fakes")
def test_measuring_on_a_mac(build: Build) -> None:
    built = build()
    found = device.measure_mac(built, built.folder / "model.mlpackage", samples=70)
    assert found.device.model == "Mac14,7"
    assert found.device.os == "macOS 15.2"
    assert [run.compute_units for run in found.runs] == list(COMPUTE_UNITS)
    run = found.runs[0]
    assert run.thermal_before == "nominal"
    assert len(run.predict_ms) == 70
    assert [operation.device for operation in run.operations] == ["neural_engine", "unknown"]
    assert [operation.cost for operation in run.operations] == [0.75, 0.25]
    assert numbers(found)["all"]["predict"].state is State.MEASURED


def connected(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[Any]:
    seen: list[Any] = []

    class Phone:
        name, type, os_version = "phone", remote_device.DeviceType.IPHONE, "18.2"

        async def prepare_for_model_debugging(self, credentials: Any) -> Any:
            seen.append(credentials)
            if error:
                raise error
            return self

    def devices(device_type: Any) -> list[Any]:
        return [Phone()] if device_type == remote_device.DeviceType.IPHONE else []

    monkeypatch.setattr(remote_device.Device, "get_connected_devices", staticmethod(devices))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return seen


@pytest.mark.usefixtures("fakes")
def test_measuring_on_a_phone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = connected(monkeypatch)
    built = build()
    found = device.measure_connected(
        built,
        built.folder / "model.mlpackage",
        signing=device.Signing(team="TEAM"),
        samples=5,
        units=["all"],
    )
    assert seen[0].development_team == "TEAM"
    assert found.device.kind == "iphone"
    assert found.device.os == "iOS 18.2"
    assert {call["device"].name for _, call in FakeBenchmarker.calls} == {"phone"}
    assert found.runs[0].thermal_before == "unknown"


@pytest.mark.usefixtures("fakes")
def test_phones_that_are_missing_or_refuse(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built, package = build(), build().folder / "model.mlpackage"
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UnavailableError, match="needs Xcode"):
        device.measure_connected(built, package)
    connected(monkeypatch, RuntimeError("no signing certificate"))
    with pytest.raises(UnavailableError, match="no ipad is connected"):
        device.measure_connected(built, package, kind="ipad")
    with pytest.raises(BuildError, match="no signing certificate"):
        device.measure_connected(built, package)


@pytest.mark.usefixtures("fakes")
def test_predictions_on_a_mac(
    build: Build, make_network: Callable[..., Network], make_photos: Callable[..., Pictures]
) -> None:
    built, pictures = build(), make_photos(3, make_network())
    emulated = CoreMLTarget().emulate(built, None)
    assert emulated is not None
    expected = emulated(pictures.pixels)
    with CoreMLTarget().open(built) as runner:
        np.testing.assert_array_equal(runner(pictures.pixels), expected)
        np.testing.assert_array_equal(runner(pictures.pixels[:1]), expected[:1])
        assert "macOS 15.2" in runner.device
    found = device.compare_units(built, pictures, expected)
    assert set(found) == set(COMPUTE_UNITS)
    assert found["cpu_only"]["agreement"] == 1.0
    assert CoreMLTarget().inspect(built).startswith("loaded by Core ML")


@pytest.mark.usefixtures("fakes")
def test_package_that_core_ml_does_not_load(tmp_path: Path, make_network: Any) -> None:
    from pipeline.targets.coreml.runner import CoreMLRunner

    with pytest.raises(ArtifactError, match="Core ML does not load"):
        CoreMLRunner(tmp_path / "none.mlpackage", make_network(), "all")


@pytest.mark.usefixtures("fakes")
def test_placement_of_operations(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def operation(name: str, kind: str) -> Any:
        return SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)])

    gpu = object.__new__(compute_device.MLGPUComputeDevice)
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(
            program=compute_plan.MLModelStructureProgram(
                functions={
                    "main": compute_plan.MLModelStructureProgramFunction(
                        inputs=[],
                        block=compute_plan.MLModelStructureProgramBlock(
                            inputs=[],
                            operations=[operation("c", "const"), operation("y", "ios16.conv")],
                            output_names=["y"],
                        ),
                    )
                }
            )
        ),
        get_compute_device_usage_for_mlprogram_operation=lambda op: (
            compute_plan.MLComputePlanDeviceUsage(gpu, [gpu])
        ),
        get_estimated_cost_for_mlprogram_operation=lambda op: compute_plan.MLComputePlanCost(0.5),
    )
    asked: list[Any] = []

    def load(path: str, compute_units: Any) -> Any:
        asked.append((path, compute_units))
        return plan

    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", load)
    (found,) = device.placement(build().folder / "model.mlpackage", "cpu_and_gpu")
    assert (found.name, found.operator, found.device, found.cost) == ("y", "ios16.conv", "gpu", 0.5)
    assert asked == [("/compiled.mlmodelc", ct.ComputeUnit.CPU_AND_GPU)]
    plan.model_structure.program = None
    with pytest.raises(BuildError, match="no ML Program"):
        device.operations_of(plan)


@pytest.mark.skipif(platform.system() == "Darwin", reason="this is a Mac")
def test_off_a_mac_nothing_is_measured(build: Build, make_network: Callable[..., Network]) -> None:
    built, package = build(), build().folder / "model.mlpackage"
    one, logits = probes(make_network(), 1), np.zeros((1, 5), np.float32)
    for call in (
        lambda: device.measure_mac(built, package),
        lambda: device.measure_connected(built, package),
        lambda: device.placement(package, "all"),
        lambda: device.compare_units(built, one, logits),
    ):
        with pytest.raises(UnavailableError, match="export coreml-bench"):
            call()
