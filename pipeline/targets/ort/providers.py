"""Execution providers: what executes the nodes, and whether it is here.

OpenVINO comes as the plugin `onnxruntime-ep-openvino` beside any ONNX Runtime, which offers Intel's
devices only, or is built into ONNX Runtime itself. The package `onnxruntime-openvino` is such a
build; it overwrites the files of `onnxruntime`, so that nothing here recommends it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from typing import Any

from pipeline.core import machine

NAMES = {"cpu": "CPUExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
"""Name in pipeline.yaml -> name in ONNX Runtime."""

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""What OpenVINO can be told to multiply in, and its name for it."""

PLUGIN = "onnxruntime_ep_openvino"
_REGISTRATION = "openvino"


def missing(provider: str, ort: Any, precision: str = "fp32") -> str | None:
    """Why a provider is not here, and how to get it; None if it is.

    Args:
        provider: One of `NAMES`.
        ort: The onnxruntime module.
        precision: One of `PRECISIONS`. Without instructions for it OpenVINO would obey all the
            same, and take twice the time of float32.
    """
    name = NAMES[provider]
    if precision == "bf16" and (why := machine.why_no_bfloat16()):
        return why
    # Every build of ONNX Runtime has the CPU.
    if provider == "cpu" or _built_in(ort):
        return None
    if not find_spec(PLUGIN):
        return (
            f"onnxruntime {ort.__version__} has no {name}, only "
            f"{', '.join(ort.get_available_providers())}: on an Intel CPU install its plugin with "
            "pip install onnxruntime-ep-openvino, or set provider: cpu"
        )
    if _device(ort) is None:
        return (
            f"the plugin {PLUGIN} offers no CPU device here, since it takes Intel's CPUs "
            "alone: set provider: cpu"
        )
    return None


def add(provider: str, ort: Any, options: Any, threads: int, precision: str = "fp32") -> list[Any]:
    """Prepare a session to run on a provider that is here.

    Args:
        provider: One of `NAMES`.
        ort: The onnxruntime module.
        options: The session's options; a plugin's device goes there.
        threads: How many threads.
        precision: One of `PRECISIONS`.

    Returns:
        The session's `providers`; empty where the options say it all.
    """
    name = NAMES[provider]
    if provider == "cpu":
        return [name]
    # Without the hint OpenVINO computes in bfloat16 where the CPU has it.
    hints = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": str(threads),
    }
    settings = {"load_config": json.dumps({"CPU": hints})}
    if _built_in(ort):
        return [(name, {"device_type": "CPU", **settings})]
    options.add_provider_for_devices([_device(ort)], settings)
    return []


@cache
def _built_in(ort: Any) -> bool:
    """Whether this build of ONNX Runtime holds OpenVINO.

    The first answer is kept: a plugin that is registered is listed as if it were built in, but
    asked for by that name it is passed over without a word.
    """
    return NAMES["openvino"] in ort.get_available_providers()


def _device(ort: Any) -> Any:
    """The plugin's CPU; None if it offers none."""
    _register(ort)
    for device in ort.get_ep_devices():
        if device.ep_name == NAMES["openvino"] and device.ep_metadata.get("ov_device") == "CPU":
            return device
    return None


@cache
def _register(ort: Any) -> None:
    """Load the plugin, once in a process: a second registration is an error."""
    import importlib

    plugin = importlib.import_module(PLUGIN)
    ort.register_execution_provider_library(_REGISTRATION, plugin.get_library_path())
