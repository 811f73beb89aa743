"""The part of the CUDA runtime that running an engine needs, on `cuda.bindings`, without torch.

Errors become the pipeline's own; whatever was allocated is freed in reverse order by `Cuda.close`,
also when making something fails halfway.
"""

from __future__ import annotations

import ctypes
import importlib
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import PipelineError, UnavailableError

INSTALL = "pip install cuda-bindings"

_REMEDIES = {
    "cudaErrorMemoryAllocation": "the GPU has too little free memory; close what else runs on it "
    "or build with a smaller largest batch",
    "cudaErrorInsufficientDriver": "the NVIDIA driver is too old for this CUDA runtime; install a "
    "newer driver",
    "cudaErrorNoDevice": "no GPU is visible; check CUDA_VISIBLE_DEVICES and nvidia-smi",
    "cudaErrorDevicesUnavailable": "the GPU is held exclusively by another process",
}


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory.

    Attributes:
        address: Where it lies.
        array: The same as bytes.
    """

    address: int
    array: npt.NDArray[np.uint8]


class Cuda(AbstractContextManager["Cuda"]):
    """A CUDA stream and everything allocated for it; a context manager.

    Args:
        runtime: `cuda.bindings.runtime`, or what stands for it.

    Raises:
        UnavailableError: There is no GPU, no driver, or no `cuda.bindings`.
    """

    def __init__(self, runtime: Any = None) -> None:
        self.runtime = _import() if runtime is None else runtime
        self._stack = ExitStack()
        try:
            self.call("cudaSetDevice", 0)
            flags = self.runtime.cudaStreamNonBlocking
            self.stream = self.call("cudaStreamCreateWithFlags", flags)
            self._free("cudaStreamDestroy", self.stream)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything, the last first. Can be called again."""
        self._stack.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime and return what it gives besides its error code.

        Raises:
            UnavailableError: Memory, driver or device are lacking.
            PipelineError: Any other CUDA error.
        """
        try:
            code, *values = getattr(self.runtime, name)(*arguments)
        except RuntimeError as error:  # cuda.bindings cannot load the driver's library
            raise UnavailableError(f"{name}: {error}") from error
        if int(code):
            raise self._error(name, code)
        return values[0] if len(values) == 1 else values

    def device_memory(self, size: int) -> int:
        """Allocate bytes on the GPU; freed on close."""
        address = int(self.call("cudaMalloc", size))
        self._free("cudaFree", address)
        return address

    def pinned_memory(self, size: int) -> Pinned:
        """Allocate page-locked bytes on the host; freed on close."""
        address = int(self.call("cudaHostAlloc", size, self.runtime.cudaHostAllocDefault))
        self._free("cudaFreeHost", address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return Pinned(address, array)

    def event(self) -> Any:
        """Make an event with timing; destroyed on close."""
        event = self.call("cudaEventCreateWithFlags", self.runtime.cudaEventDefault)
        self._free("cudaEventDestroy", event)
        return event

    def record(self, event: Any) -> None:
        """Put an event into the stream."""
        self.call("cudaEventRecord", event, self.stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two events that have passed."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def to_device(self, device: int, host: int, size: int) -> None:
        """Queue a copy of bytes from page-locked memory to the GPU."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host, size, kind, self.stream)

    def to_host(self, host: int, device: int, size: int) -> None:
        """Queue a copy of bytes from the GPU to page-locked memory."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, device, size, kind, self.stream)

    def wait(self) -> None:
        """Wait until the stream has done everything."""
        self.call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """Record what is queued from here on instead of running it."""
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """Make an executable graph of what was recorded; destroyed on close."""
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            executable = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)
        self._free("cudaGraphExecDestroy", executable)
        return executable

    def abandon_capture(self) -> None:
        """Leave the recording after an error, whatever state it is in."""
        self.runtime.cudaStreamEndCapture(self.stream)

    def launch(self, executable: Any) -> None:
        """Queue an executable graph."""
        self.call("cudaGraphLaunch", executable, self.stream)

    def free_memory(self) -> int:
        """Bytes that are free on the GPU."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def bus_id(self) -> str:
        """PCI address of the GPU."""
        text = self.call("cudaDeviceGetPCIBusId", 32, 0)
        return bytes(text).split(b"\0")[0].decode()

    def _free(self, name: str, handle: Any) -> None:
        # An error on the way out would hide the one that led there, and frees nothing.
        self._stack.callback(lambda: getattr(self.runtime, name)(handle))

    def _error(self, name: str, code: Any) -> PipelineError:
        kind = getattr(code, "name", str(code))
        if remedy := _REMEDIES.get(kind):
            return UnavailableError(f"{name}: {kind}: {remedy}")
        _, text = self.runtime.cudaGetErrorString(code)
        words = text.decode() if isinstance(text, bytes) else str(text)
        return PipelineError(f"{name}: {kind}: {words}; nvidia-smi tells whether the GPU is well")


def _import() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise UnavailableError(f"cannot import cuda.bindings: {error}; {INSTALL}") from error
