"""Running an engine on a GPU.

Images go through page-locked memory, so that copies need no detour; one stream carries copies,
engine and copies back. Both libraries launch the engine as one CUDA graph per batch size:
TensorRT-RTX captures it itself when the runtime configuration asks for it, for full TensorRT it is
captured here. TensorRT-RTX compiles the last part of its kernels on the GPU at the first call with
a batch size; what it compiled is kept in a file beside the artifact (never inside: an artifact's
files are hashed) and read at the next start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import InputError, PipelineError
from pipeline.core.figures import Latency, Throughput
from pipeline.core.network import Images, Logits
from pipeline.core.runner import DeviceState, Runner
from pipeline.targets.tensorrt import nvml
from pipeline.targets.tensorrt.api import Library
from pipeline.targets.tensorrt.cuda import Cuda
from pipeline.targets.tensorrt.device import Gpu
from pipeline.targets.tensorrt.session import Session


class GpuRunner(Runner):
    """Runs one engine.

    Args:
        library: The library that built it.
        engine: The engine's bytes.
        path: Where it lies, for messages.
        gpu: The GPU.
        cache: File for what TensorRT-RTX compiles on the GPU.
        log: Takes lines of the library's chatter.
        runtime: `cuda.bindings.runtime`, or what stands for it.

    Attributes:
        first_calls: Batch size -> milliseconds of the first call with it, compilation included.
        load_ms: Milliseconds from the bytes to a runner that is ready.
        memory: Bytes that the engine and its buffers take on the GPU.

    Raises:
        ArtifactError: The library does not accept the engine.
        UnavailableError: GPU, driver or memory do not suffice.
    """

    def __init__(
        self,
        library: Library,
        engine: bytes,
        path: Path,
        gpu: Gpu,
        *,
        cache: Path,
        log: Callable[[str], None] = lambda line: None,
        runtime: Any = None,
    ) -> None:
        start = time.perf_counter()
        self._gpu = gpu
        self.device = f"{library.title} on {gpu.name} (compute capability {gpu.capability})"
        self.first_calls: dict[int, float] = {}
        self._graphs: dict[int, Any] = {}
        self._stack = ExitStack()
        try:
            self._cuda = self._stack.enter_context(Cuda(runtime))
            free = self._cuda.free_memory()
            self._session = Session(library, engine, path, cache=cache, log=log)
            self._stack.callback(self._session.close)
            self._allocate()
            self.memory = max(0, free - self._cuda.free_memory())
            self._before = nvml.read(self.bus_id)
        except BaseException:
            self._stack.close()
            raise
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.smallest, self.largest = self._session.smallest, self._session.largest

    @property
    def bus_id(self) -> str:
        """PCI address of the GPU, by which NVML knows it."""
        return self._cuda.bus_id()

    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images; see `Runner`."""
        self._check(images)
        self._run(images)
        return self._logits(len(images))

    def timed(self, images: Images) -> dict[str, float]:
        """Run once and time it; see `Runner`.

        Returns:
            "engine" and "copies" as the GPU's own events see them, and "call", the host's clock
            around everything, which includes filling the page-locked memory.
        """
        self._check(images)
        start = time.perf_counter()
        self._run(images)
        self._logits(len(images))
        call = 1e3 * (time.perf_counter() - start)
        before, begin, end, after = self._events
        return {
            "engine": self._cuda.milliseconds(begin, end),
            "copies": self._cuda.milliseconds(before, after),
            "call": call,
        }

    def engine_times(self, batch: int, calls: int) -> list[float]:
        """Time the engine alone, call after call without waiting, as `trtexec` does.

        The input is what the last call left on the GPU.

        Args:
            batch: Batch size.
            calls: How often.

        Returns:
            Milliseconds of every call by the GPU's events.
        """
        return self._loop(batch, calls)[0]

    def throughput(self, calls: int) -> list[Throughput]:
        """Engine alone, call after call, for the smallest, usual and largest batch; see `Runner`.

        The first calls of each are not counted: clocks rise and kernels are loaded then.
        """
        rows = []
        for batch in sorted({self.smallest, self._session.usual, self._session.largest}):
            self._loop(batch, _QUEUED)
            times, total = self._loop(batch, calls)
            latency = Latency(tuple(times))
            rows.append(Throughput(batch, latency.p50, latency.p99, 1e3 * batch * calls / total))
        return rows

    def device_state(self) -> DeviceState:
        """Memory, compilation at the first call, and the state of the GPU; see `Runner`."""
        major, minor = self._gpu.driver_cuda
        told: dict[str, Any] = {
            "gpu_memory_bytes": self.memory,
            "load_ms": self.load_ms,
            "first_call_ms": {f"batch {batch}": ms for batch, ms in self.first_calls.items()},
            "driver_cuda": f"{major}.{minor}",
        }
        before, after = self._before, nvml.read(self.bus_id)
        if before is None or after is None:
            return DeviceState(more={**told, "sensors": f"not read: {nvml.INSTALL}"})
        sensors = [
            {"when": "before", **before.to_dict()},
            {"when": "after", **after.to_dict()},
        ]
        throttled = sorted({*before.throttled, *after.throttled})
        return DeviceState(tuple(throttled), {**told, "sensors": sensors})

    def close(self) -> None:
        """Free the GPU, after keeping what was compiled. Can be called again."""
        self._stack.close()

    def _allocate(self) -> None:
        largest = self._session.largest
        values = math.prod(self._session.image)
        self._in = self._cuda.pinned_memory(4 * largest * values)
        self._out = self._cuda.pinned_memory(4 * largest * self._session.classes)
        self._in_device = self._cuda.device_memory(4 * largest * values)
        self._out_device = self._cuda.device_memory(4 * largest * self._session.classes)
        self._events = tuple(self._cuda.event() for _ in range(4))
        self._loop_events: list[Any] = []
        self._session.bind(self._in_device, self._out_device)

    def _check(self, images: Images) -> None:
        smallest, largest = self._session.smallest, self._session.largest
        if images.dtype != np.float32 or images.shape[1:] != self._session.image:
            expected = " x ".join(map(str, self._session.image))
            raise InputError(
                f"the engine takes float32 images of {expected}, not {images.dtype} of "
                f"{' x '.join(map(str, images.shape[1:]))}"
            )
        if not smallest <= len(images) <= largest:
            raise InputError(
                f"the engine was built for batches of {smallest} to {largest}, not {len(images)}; "
                "set the target's option batches and build again"
            )

    def _run(self, images: Images) -> None:
        batch, cuda = len(images), self._cuda
        self._prepare(batch)
        before, begin, end, after = self._events
        staged = self._in.array[: images.nbytes].view(np.float32).reshape(images.shape)
        np.copyto(staged, images)
        cuda.record(before)
        cuda.to_device(self._in_device, self._in.address, images.nbytes)
        cuda.record(begin)
        self._launch(batch)
        cuda.record(end)
        cuda.to_host(self._out.address, self._out_device, 4 * batch * self._session.classes)
        cuda.record(after)
        cuda.wait()

    def _logits(self, batch: int) -> Logits:
        values = self._out.array[: 4 * batch * self._session.classes].view(np.float32)
        return values.reshape(batch, self._session.classes).copy()

    def _prepare(self, batch: int) -> None:
        """Set the batch size; at its first use run once, so that compilation is over."""
        self._session.resize(batch)
        if batch in self.first_calls:
            return
        start = time.perf_counter()
        self._session.enqueue(self._cuda.stream)
        self._cuda.wait()
        if not self._session.library.rtx:
            self._capture(batch)
        self.first_calls[batch] = 1e3 * (time.perf_counter() - start)

    def _capture(self, batch: int) -> None:
        self._cuda.begin_capture()
        try:
            self._session.enqueue(self._cuda.stream)
        except PipelineError:
            self._cuda.abandon_capture()
            raise
        self._graphs[batch] = self._cuda.end_capture()

    def _launch(self, batch: int) -> None:
        if batch in self._graphs:
            self._cuda.launch(self._graphs[batch])
        else:
            self._session.enqueue(self._cuda.stream)

    def _loop(self, batch: int, calls: int) -> tuple[list[float], float]:
        """Milliseconds of every call, and of all with the gaps between them."""
        self._prepare(batch)
        marks = [(self._loop_event(2 * i), self._loop_event(2 * i + 1)) for i in range(_QUEUED)]
        times: list[float] = []
        total = 0.0
        while len(times) < calls:
            queued = marks[: calls - len(times)]
            for begin, end in queued:
                self._cuda.record(begin)
                self._launch(batch)
                self._cuda.record(end)
            self._cuda.wait()
            times += [self._cuda.milliseconds(begin, end) for begin, end in queued]
            total += self._cuda.milliseconds(queued[0][0], queued[-1][1])
        return times, total

    def _loop_event(self, i: int) -> Any:
        while len(self._loop_events) <= i:
            self._loop_events.append(self._cuda.event())
        return self._loop_events[i]


_QUEUED = 32
"""Calls in the queue at a time: enough that the GPU never waits for the host."""
