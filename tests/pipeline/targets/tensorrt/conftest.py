"""A small classifier as an ONNX file, its engines, and a CUDA that records what it is asked."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.core.network import Network
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.forms import FormJob
from pipeline.targets.registry import form_of
from pipeline.targets.tensorrt.api import Library
from pipeline.targets.tensorrt.device import NO_DRIVER, Gpu
from pipeline.targets.tensorrt.options import TrtOptions
from pipeline.targets.tensorrt.target import TrtTarget

NETWORK = Network("small", ("a", "b", "c", "d"), (3, 16, 16), {})
ADA = Gpu("GeForce RTX 4090", "8.9", 24 << 30, (13, 0))


def small_model(batch: str | int = "batch") -> onnx.ModelProto:
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "stem.weight"], ["x0"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["x0"], ["x1"], "gelu"),
        helper.make_node("GlobalAveragePool", ["x1"], ["x2"], "pool"),
        helper.make_node("Reshape", ["x2", "shape"], ["x3"], "flatten", allowzero=1),
        helper.make_node("Gemm", ["x3", "head.weight"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])],
        [
            tensor("stem.weight", 8, 3, 3, 3),
            tensor("head.weight", 4, 8),
            numpy_helper.from_array(np.array([-1, 8]), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def small() -> Callable[..., onnx.ModelProto]:
    """Makes the classifier: (batch), a name for a dynamic one."""
    return small_model


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no GPU, whatever it has."""
    monkeypatch.setattr("pipeline.targets.tensorrt.target.find_gpu", lambda: NO_DRIVER)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpu]:
    """Puts a GPU into this machine: (name=…, capability=…, …) changes an RTX 4090."""

    def put(**changes: Any) -> Gpu:
        found = Gpu(**{**vars(ADA), **changes})
        monkeypatch.setattr("pipeline.targets.tensorrt.target.find_gpu", lambda: found)
        return found

    return put


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Artifact]:
    """Builds an artifact: (model, precision, batch, log, folder, **options)."""

    def run(
        model: onnx.ModelProto,
        precision: str = "fp16",
        batch: int | None = None,
        log: Callable[[str], None] = lambda line: None,
        folder: str = "engine",
        **options: Any,
    ) -> Artifact:
        target = TrtTarget()
        source, graph = tmp_path / "source.onnx", tmp_path / f"{precision}.onnx"
        onnx.save(model, source)

        def never(*_: Any) -> Any:
            raise AssertionError("neither module nor calibration images are needed")

        form = form_of(target, precision)
        assert form is not None
        form.convert(FormJob(source, NETWORK, {}, never, log), graph)
        job = BuildJob(NETWORK, precision, TrtOptions(**options), graph, never, never, batch, log)
        return artifact.make(
            tmp_path / folder,
            kind="build",
            name=f"trt/{precision}",
            key="key",
            made_from={},
            tools=target.versions(),
            build=lambda place: target.build(job, place),
        )

    return run


ROOT = Path(__file__).parents[4]

BUILD = """
import json, sys
from pathlib import Path
from pipeline.targets.tensorrt.build import EngineJob
from pipeline.targets.tensorrt.process import build_apart
job = EngineJob(Path(sys.argv[1]), False, ("8.6",), (1, 8, 64), None, None)
print(json.dumps(build_apart(job, Path(sys.argv[2]), lambda line: None)))
"""


@pytest.fixture
def checkout() -> Callable[[Path], Path]:
    """Copies the package, without what was compiled, into a folder; gives the folder."""

    def copy(folder: Path) -> Path:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=ignored)
        return folder

    return copy


@pytest.fixture
def build_in() -> Callable[..., dict[str, Any]]:
    """Builds by the code of a checkout: (root, graph, output, before=…, **environment) -> facts.

    `before` is a command that starts the command which it is given.
    """

    def build(
        root: Path, graph: Path, output: Path, before: Sequence[str] = (), **environment: str
    ) -> dict[str, Any]:
        output.mkdir(parents=True, exist_ok=True)
        command = [*before, sys.executable, "-B", "-P", "-c", BUILD, str(graph), str(output)]
        merged = {**os.environ, "PYTHONPATH": str(root), **environment}
        run = subprocess.run(command, capture_output=True, text=True, env=merged, check=False)
        assert run.returncode == 0, run.stderr
        facts: dict[str, Any] = json.loads(run.stdout)
        return facts

    return build


class Code(int):
    """An error code that knows its name, as `cuda.bindings` gives it."""

    name: str

    def __new__(cls, value: int, name: str) -> Code:
        code = super().__new__(cls, value)
        code.name = name
        return code


SUCCESS = Code(0, "cudaSuccess")
MEMORY = Code(2, "cudaErrorMemoryAllocation")


class FakeCuda:
    """Stands for `cuda.bindings.runtime`: documented signatures, real host memory, a record.

    Work in a stream is done at once, except while capturing.
    """

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815
    cudaEventDefault = 0  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host"
    )
    cudaStreamCaptureMode = SimpleNamespace(  # noqa: N815
        cudaStreamCaptureModeThreadLocal="thread local"
    )

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.alive: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.fail: dict[str, tuple[int, Code]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.clock = 0.0

    def _enter(self, name: str, *details: Any) -> Code:
        self.calls.append(" ".join(map(str, (name, *details))))
        left, code = self.fail.get(name, (-1, SUCCESS))
        if left < 0:
            return SUCCESS
        self.fail[name] = (left - 1, code)
        return code if left == 0 else SUCCESS

    def _make(self, name: str, thing: Any) -> tuple[Any, ...]:
        if code := self._enter(name):
            return (code, None)
        handle = ctypes.addressof(thing) if isinstance(thing, ctypes.Array) else id(thing)
        self.alive[handle] = thing
        return (SUCCESS, handle)

    def _free(self, name: str, handle: int) -> tuple[Code]:
        self.calls.append(name)
        del self.alive[handle]  # twice, or something never made: KeyError
        return (SUCCESS,)

    def cudaSetDevice(self, device: int) -> tuple[Code]:  # noqa: N802
        return (self._enter("cudaSetDevice", device),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self._make("cudaStreamCreateWithFlags", object())

    def cudaStreamDestroy(self, stream: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaStreamDestroy", stream)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        return self._make("cudaMalloc", (ctypes.c_uint8 * size)())

    def cudaFree(self, address: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaFree", address)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        code, address = self._make("cudaHostAlloc", (ctypes.c_uint8 * size)())
        if not code:
            self.pinned.add(address)
        return (code, address)

    def cudaFreeHost(self, address: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaFreeHost", address)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self._make("cudaEventCreateWithFlags", [0.0])

    def cudaEventDestroy(self, event: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaEventDestroy", event)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Code]:  # noqa: N802
        code = self._enter("cudaEventRecord")
        self.alive[stream]
        self.clock += 0.25
        self.alive[event][0] = self.clock
        return (code,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Code, float]:  # noqa: N802
        return (SUCCESS, self.alive[end][0] - self.alive[start][0])

    def cudaMemcpyAsync(  # noqa: N802
        self, to: int, source: int, size: int, kind: str, stream: int
    ) -> tuple[Code]:
        code = self._enter("cudaMemcpyAsync", kind)
        host = source if kind == "to device" else to
        assert host in self.pinned, "an asynchronous copy needs page-locked memory"
        assert size <= len(self.alive[to])
        assert size <= len(self.alive[source])
        ctypes.memmove(to, source, size)
        return (code,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Code]:  # noqa: N802
        self.alive[stream]
        return (self._enter("cudaStreamSynchronize"),)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[Code]:  # noqa: N802
        self.capturing = []
        return (self._enter("cudaStreamBeginCapture", mode),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        recorded, self.capturing = self.capturing, None
        return self._make("cudaStreamEndCapture", recorded)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self._make("cudaGraphInstantiate", list(self.alive[graph]))

    def cudaGraphDestroy(self, graph: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaGraphDestroy", graph)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Code]:  # noqa: N802
        return self._free("cudaGraphExecDestroy", executable)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Code]:  # noqa: N802
        code = self._enter("cudaGraphLaunch")
        for work in self.alive[executable]:
            work()
        return (code,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        used = sum(len(t) for a, t in self.alive.items() if isinstance(t, ctypes.Array))
        return (SUCCESS, (1 << 30) - used, 1 << 30)

    def cudaDeviceGetPCIBusId(self, size: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return (SUCCESS, b"0000:01:00.0".ljust(size, b"\0"))

    def cudaGetErrorString(self, code: int) -> tuple[Any, ...]:  # noqa: N802
        return (SUCCESS, b"words for it")


@pytest.fixture
def cuda() -> FakeCuda:
    """A CUDA that records what it is asked."""
    return FakeCuda()


@pytest.fixture
def out_of_memory() -> Code:
    """CUDA's code for too little memory."""
    return MEMORY


class FakeLibrary:
    """Stands for `tensorrt_rtx` and `tensorrt`: its network adds up channels, class by class."""

    DataType = SimpleNamespace(FLOAT="float")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="off")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")
    EngineInvalidityDiagnostics = SimpleNamespace(
        MALFORMED_ENGINE=32,
        VERSION_MISMATCH=1,
        OLD_CUDA_DRIVER=4,
        INSUFFICIENT_GPU_MEMORY=16,
        CUDA_ERROR=64,
    )

    class ILogger:
        """A base class for loggers."""

        class Severity:
            """Severities."""

            ERROR = SimpleNamespace(name="ERROR")
            WARNING = SimpleNamespace(name="WARNING")
            INFO = SimpleNamespace(name="INFO")
            VERBOSE = SimpleNamespace(name="VERBOSE")

    def __init__(self, cuda: Any, rtx: bool, image: tuple[int, ...], classes: int) -> None:
        self.cuda, self.rtx = cuda, rtx
        self.image, self.classes = image, classes
        self.accepts, self.problems = True, 0
        self.config: Any = None
        self.caches_read: list[bytes] = []
        self.enqueued: list[int] = []
        self.failing = False
        self.logger: Any = None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger

        def deserialize(engine: bytes) -> Any:
            if not self.accepts:
                logger.log(self.ILogger.Severity.ERROR, "it is not to my taste")
                return None
            return FakeEngine(self)

        return SimpleNamespace(
            deserialize_cuda_engine=deserialize,
            get_engine_validity=lambda engine: (2, self.problems),
        )


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library

    def get_tensor_name(self, i: int) -> str:
        return ("image", "logits")[i]

    def get_tensor_mode(self, name: str) -> str:
        return {"image": "in", "logits": "out"}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"image": (-1, *self.library.image), "logits": (-1, self.library.classes)}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("image", 0)
        return [(n, *self.library.image) for n in (1, 2, 4)]

    def create_runtime_config(self) -> Any:
        library = self.library
        assert library.rtx, "full TensorRT has no runtime configuration"

        def read(blob: bytes) -> bool:
            library.caches_read.append(blob)
            return blob == b"compiled"

        cache = SimpleNamespace(deserialize=read, serialize=lambda: b"compiled")
        library.config = SimpleNamespace(
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda given: setattr(library.config, "cache", given),
        )
        return library.config

    def create_execution_context(self, config: Any = None) -> Any:
        assert (config is not None) == self.library.rtx
        return FakeContext(self.library)


class FakeContext:
    def __init__(self, library: FakeLibrary) -> None:
        self.library, self.addresses = library, {}
        self.batch = 0

    addresses: dict[str, int]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return shape[1:] == self.library.image

    def execute_async_v3(self, stream: int) -> bool:
        library, batch = self.library, self.batch
        if library.failing:
            library.logger.log(library.ILogger.Severity.ERROR, "the GPU fell off the bus")
            return False
        assert stream in library.cuda.alive
        source, result = (self.addresses[n] for n in ("image", "logits"))

        def work() -> None:
            size = 4 * batch * int(np.prod(library.image))
            images = np.frombuffer(ctypes.string_at(source, size), np.float32)
            sums = images.reshape(batch, -1).sum(1)
            logits = np.stack([sums * (k + 1) for k in range(library.classes)], 1).astype(
                np.float32
            )
            ctypes.memmove(result, logits.tobytes(), logits.nbytes)

        library.enqueued.append(batch)
        if library.cuda.capturing is None:
            work()
        else:
            library.cuda.capturing.append(work)
        return True


@pytest.fixture
def fake_library() -> Callable[..., Library]:
    """Makes a library that stands for a real one: (cuda, module's name, image shape, classes)."""

    def make(cuda: Any, name: str, image: tuple[int, ...], classes: int) -> Library:
        return Library(name, FakeLibrary(cuda, name == "tensorrt_rtx", image, classes), "1.0")

    return make
