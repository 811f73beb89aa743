"""Execution providers: found, asked for and refused."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.core import machine
from pipeline.targets.ort import providers

OPENVINO = "OpenVINOExecutionProvider"


class FakeRuntime:
    """onnxruntime as far as providers go."""

    __version__ = "1.99"

    def __init__(self, available: tuple[str, ...], devices: tuple[str, ...] = ()) -> None:
        self.available = (*available, "CPUExecutionProvider")
        self.devices = [
            SimpleNamespace(ep_name="CPUExecutionProvider", ep_metadata={}),
            *(SimpleNamespace(ep_name=OPENVINO, ep_metadata={"ov_device": d}) for d in devices),
        ]
        self.registered: list[tuple[str, str]] = []

    def get_available_providers(self) -> list[str]:
        # A plugin that is registered is listed like what is built in.
        return [*self.available, *([OPENVINO] if self.registered else [])]

    def get_ep_devices(self) -> list[Any]:
        return self.devices if self.registered else self.devices[:1]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert not self.registered, "a second registration is an error"
        self.registered.append((name, path))


class FakeOptions:
    def __init__(self) -> None:
        self.added: list[tuple[list[Any], dict[str, str]]] = []

    def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
        self.added.append((devices, settings))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(providers.PLUGIN)
    module.get_library_path = lambda: "/plugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, providers.PLUGIN, module)
    monkeypatch.setattr(providers, "find_spec", lambda name: module)


def test_the_cpu_is_always_there() -> None:
    ort = FakeRuntime(())
    assert providers.missing("cpu", ort) is None
    assert providers.add("cpu", ort, FakeOptions(), 2) == ["CPUExecutionProvider"]


def test_openvino_that_is_built_in_computes_in_float32() -> None:
    ort, options = FakeRuntime((OPENVINO,)), FakeOptions()
    assert providers.missing("openvino", ort) is None
    ((name, settings),) = providers.add("openvino", ort, options, 3)
    assert (name, settings["device_type"]) == (OPENVINO, "CPU")
    assert json.loads(settings["load_config"])["CPU"] == {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": "3",
    }
    assert not options.added


@pytest.mark.usefixtures("plugin")
def test_openvino_as_a_plugin_is_registered_once_and_takes_the_cpu() -> None:
    ort, options = FakeRuntime((), ("GPU", "CPU")), FakeOptions()
    assert providers.missing("openvino", ort) is None
    assert providers.missing("openvino", ort) is None
    assert providers.add("openvino", ort, options, 1) == []
    ((devices, settings),) = options.added
    assert [device.ep_metadata["ov_device"] for device in devices] == ["CPU"]
    assert "f32" in settings["load_config"]
    assert ort.registered == [("openvino", "/plugin.so")]


@pytest.mark.usefixtures("plugin")
def test_bfloat16_is_asked_for_where_the_cpu_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ort, options = FakeRuntime((), ("CPU",)), FakeOptions()
    monkeypatch.setattr(machine, "instructions", lambda: ("amx_bf16", "avx2"))
    assert providers.missing("openvino", ort, "bf16") is None
    assert providers.add("openvino", ort, options, 2, "bf16") == []
    ((_, settings),) = options.added
    hints = json.loads(settings["load_config"])["CPU"]
    assert hints == {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": "2"}
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2",))
    assert providers.missing("openvino", ort, "bf16") == (
        "this CPU has no amx_bf16 and no avx512_bf16"
    )
    assert providers.missing("openvino", ort) is None


@pytest.mark.usefixtures("plugin")
def test_a_plugin_without_a_cpu_is_refused() -> None:
    reason = providers.missing("openvino", FakeRuntime((), ("GPU",)))
    assert reason is not None
    assert "offers no CPU device" in reason


def test_without_openvino_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    reason = providers.missing("openvino", FakeRuntime(()))
    assert reason is not None
    assert "pip install onnxruntime-ep-openvino" in reason
