"""The names and signatures that are used, against the real module; many run on a GPU only."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UnavailableError
from pipeline.targets.tensorrt import api

MEMBERS = {
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "IBuilderConfig": (
        "set_flag",
        "clear_flag",
        "set_memory_pool_limit",
        "add_optimization_profile",
    ),
    "IOptimizationProfile": ("set_shape",),
    "INetworkDefinition": ("num_layers", "get_layer", "num_inputs", "get_input", "get_output"),
    "ILayer": ("name", "type", "num_inputs", "num_outputs", "get_input", "get_output"),
    "ITensor": ("name", "dtype", "shape"),
    "OnnxParser": ("parse", "num_errors", "get_error"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_profile_shape",
        "create_execution_context",
    ),
    "IExecutionContext": ("set_tensor_address", "set_input_shape", "execute_async_v3"),
    "BuilderFlag": ("TF32",),
    "MemoryPoolType": ("WORKSPACE",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT",),
}

RTX_MEMBERS = {
    "Runtime": ("get_engine_validity",),
    "EngineInvalidityDiagnostics": (
        "MALFORMED_ENGINE",
        "VERSION_MISMATCH",
        "OLD_CUDA_DRIVER",
        "INSUFFICIENT_GPU_MEMORY",
        "CUDA_ERROR",
    ),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": (
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
    ),
    "IRuntimeCache": ("serialize", "deserialize"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
}

ARGUMENTS = {
    ("OnnxParser", "parse"): 2,
    ("IOptimizationProfile", "set_shape"): 4,
    ("IBuilderConfig", "set_compute_capability"): 2,
    ("IBuilderConfig", "set_memory_pool_limit"): 2,
    ("IExecutionContext", "set_tensor_address"): 2,
    ("IExecutionContext", "set_input_shape"): 2,
    ("IExecutionContext", "execute_async_v3"): 1,
    ("ICudaEngine", "get_tensor_profile_shape"): 2,
    ("Builder", "build_serialized_network"): 2,
    ("Builder", "create_network"): 1,
    ("IBuilderConfig", "set_flag"): 1,
    ("IBuilderConfig", "add_optimization_profile"): 1,
    ("INetworkDefinition", "get_layer"): 1,
    ("Runtime", "deserialize_cuda_engine"): 1,
    ("Runtime", "get_engine_validity"): 1,
    ("IRuntimeCache", "deserialize"): 1,
}


def arguments(docstring: str | None) -> set[int]:
    """Numbers of arguments of a bound C++ function, from the signatures in its docstring."""
    signatures = re.findall(r"\w+\(self: [^,)]+((?:, [^\n]*)?)\) ->", docstring or "")
    return {len(re.findall(r"(?:^|, )\w+: ", text)) for text in signatures}


def missing(module: Any, members: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        f"{kind}.{name}"
        for kind, names in members.items()
        for name in names
        if not hasattr(getattr(module, kind, None), name)
    ]


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def test_rtx_has_all_that_is_used(rtx: Any) -> None:
    assert missing(rtx, MEMBERS) == []
    assert missing(rtx, RTX_MEMBERS) == []


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_rtx_takes_the_arguments_that_are_given(rtx: Any, kind: str, name: str) -> None:
    assert ARGUMENTS[kind, name] in arguments(getattr(getattr(rtx, kind), name).__doc__)


def test_a_context_is_made_from_a_runtime_config(rtx: Any) -> None:
    assert "runtime_config: " in rtx.ICudaEngine.create_execution_context.__doc__


def test_the_logger_is_one_for_the_process(rtx: Any) -> None:
    library = api.load(api.RTX)
    first: list[str] = []
    second: list[str] = []
    with library.listening(first.append) as (logger, heard):
        with library.listening(second.append) as (same, _):
            assert same is logger
            logger.log(rtx.ILogger.Severity.WARNING, "both hear it")
        logger.log(rtx.ILogger.Severity.ERROR, "one\n hears it")
        logger.log(rtx.ILogger.Severity.VERBOSE, "nobody hears it")
    logger.log(rtx.ILogger.Severity.INFO, "nobody listens")
    assert second == ["warning: both hear it"]
    assert first == ["warning: both hear it", "error: one\n hears it"]
    assert heard.warnings == ["both hear it"]
    assert heard.reason == "one hears it"


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.INSTALL, "no_such_library", "pip install it")
    with pytest.raises(UnavailableError, match=r"cannot import no_such_library: .*; pip install"):
        api.load("no_such_library")


def test_importing_the_target_imports_no_runtime() -> None:
    code = (
        "import sys, pipeline.targets.tensorrt.target, pipeline.targets.registry;"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'cuda'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


STUB = """
#define STUB(name) void *name() { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL) STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(createNvOnnxParser_INTERNAL) STUB(getBuilderPluginRegistry)
STUB(getNvOnnxParserVersion) STUB(getPluginRegistry) STUB(initLibNvInferPlugins)
"""
"""What the bindings of full TensorRT import from its gigabytes of libraries."""

PROBE = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {
    kind: {
        name: getattr(getattr(module, kind), name).__doc__ or ""
        for name in names
        if hasattr(getattr(module, kind, None), name)
    }
    for kind, names in json.load(sys.stdin).items()
}
severities = sorted(module.ILogger.Severity.__members__)
print(json.dumps({"found": found, "severities": severities, "version": module.__version__}))
"""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real bindings of full TensorRT have, loaded onto stub libraries."""
    name = "tensorrt_bindings"
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stub libraries")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)
    binary = Path(spec.submodule_search_locations[0], "tensorrt.so").read_bytes()
    for library in set(re.findall(rb"lib(?:nvinfer|nvonnxparser|nvinfer_plugin)\.so\.\d+", binary)):
        command = [compiler, "-shared", "-fPIC", "-w", "stub.c", "-o", library.decode()]
        subprocess.run(command, cwd=folder, check=True)
    run = subprocess.run(
        [sys.executable, "-c", PROBE, name],
        input=json.dumps(MEMBERS),
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_full_tensorrt_has_all_that_is_used(full: dict[str, Any]) -> None:
    found = {kind: list(names) for kind, names in full["found"].items()}
    assert found == {kind: list(names) for kind, names in MEMBERS.items()}
    assert full["version"].split(".")[0] in ("10", "11")


SHARED = [(kind, name) for kind, name in ARGUMENTS if name in MEMBERS.get(kind, ())]


@pytest.mark.parametrize(("kind", "name"), SHARED)
def test_full_tensorrt_takes_the_arguments_that_are_given(
    full: dict[str, Any], kind: str, name: str
) -> None:
    assert ARGUMENTS[kind, name] in arguments(full["found"][kind][name])


def test_full_tensorrt_makes_a_context_without_a_runtime_config(full: dict[str, Any]) -> None:
    signature = full["found"]["ICudaEngine"]["create_execution_context"]
    assert re.search(
        r"create_execution_context\(self: [^,)]+(, \w+: [^,]+ = [^,]+)*\) ->", signature
    )


def test_full_tensorrt_logs_as_rtx_does(full: dict[str, Any]) -> None:
    assert {"ERROR", "WARNING", "INFO", "VERBOSE"} <= set(full["severities"])
