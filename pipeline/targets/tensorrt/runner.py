"""Running an engine on a GPU.

Images go through page-locked memory, so that copies need no detour; one stream carries copies,
engine and copies back. Stream, events, memory and graphs are those of `torch.cuda`. Both libraries
launch the engine as one CUDA graph per batch size: TensorRT-RTX captures it itself when the runtime
configuration asks for it, for full TensorRT it is captured here. TensorRT-RTX compiles the last
part of its kernels on the GPU at the first call with a batch size; what it compiled is kept in a
file beside the artifact (never inside: an artifact's files are hashed) and read at the next start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import InputError
from pipeline.core.figures import Latency, Throughput
from pipeline.core.network import Images, Logits
from pipeline.core.runner import DeviceState, Runner, Timed
from pipeline.targets.tensorrt import cuda, nvml
from pipeline.targets.tensorrt.api import Library
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
        largest: Largest batch that the engine is meant for; None for what it takes.
        log: Takes lines of the library's chatter.

    Attributes:
        first_calls: Batch size -> milliseconds of the first call with it, compilation included.
        load_ms: Milliseconds from the bytes to a runner that is ready.
        memory: Bytes that the engine and its buffers take on the GPU; torch takes memory for the
            buffers in pieces of 2 MiB and more.
        bus_id: PCI address of the GPU, by which NVML knows it.

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
        largest: int | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        start = time.perf_counter()
        self._gpu, self._path = gpu, path
        self.device = f"{library.title} on {gpu.name} (compute capability {gpu.capability})"
        self.first_calls: dict[int, float] = {}
        self._stack = ExitStack()
        self._forget()
        try:
            cuda.start()
            with cuda.explained(str(path)):
                self._open(library, engine, cache, log)
            self._before = nvml.read(self.bus_id)
        except BaseException:
            self._stack.close()
            raise
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self.smallest = self._session.smallest
        self.largest = self._most = min(self._session.largest, largest or self._session.largest)

    def __call__(self, images: Images) -> Logits:
        """Logits of preprocessed images; see `Runner`."""
        self._check(images)
        self._run(images)
        return self._result(len(images))

    def timed(self, images: Images) -> Timed:
        """Run once and time it; see `Runner`.

        Returns:
            The phases "engine" and "copies" as the GPU's own events see them, and "call", the
            host's clock around everything, which includes filling the page-locked memory.
        """
        self._check(images)
        start = time.perf_counter()
        self._run(images)
        logits = self._result(len(images))
        call = 1e3 * (time.perf_counter() - start)
        before, begin, end, after = self._events
        with self._working():
            engine, copies = begin.elapsed_time(end), before.elapsed_time(after)
        return Timed(logits, {"engine": engine, "copies": copies, "call": call})

    def engine_times(self, batch: int, calls: int) -> list[float]:
        """Time the engine alone, call after call without waiting, as `trtexec` does.

        The input is what the last call left on the GPU, zeros before the first.

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
        for batch in sorted({self.smallest, self._session.usual, self._most}):
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
        if isinstance(before, str) or isinstance(after, str):
            why = before if isinstance(before, str) else after
            return DeviceState(more={**told, "sensors": f"not read: {why}"})
        sensors = [
            {"when": "before", **before.to_dict()},
            {"when": "after", **after.to_dict()},
        ]
        throttled = sorted({*before.throttled, *after.throttled})
        return DeviceState(tuple(throttled), {**told, "sensors": sensors})

    def close(self) -> None:
        """Free the GPU, after keeping what was compiled. Can be called again."""
        self._stack.close()

    def _forget(self) -> None:
        """Let go of everything that lies on the GPU or is page-locked."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._events: list[torch.cuda.Event] = []
        self._marks: list[torch.cuda.Event] = []
        self._images = self._logits = self._gpu_images = self._gpu_logits = torch.empty(0)

    def _open(
        self, library: Library, engine: bytes, cache: Path, log: Callable[[str], None]
    ) -> None:
        self._stack.callback(self._release)
        self._stream = torch.cuda.Stream(cuda.DEVICE)
        self.bus_id = cuda.bus_id()
        free = cuda.free_memory()
        self._session = Session(library, engine, self._path, cache=cache, log=log)
        self._stack.callback(self._session.close)
        self._stack.callback(self._settle)
        with torch.cuda.stream(self._stream):  # whose work the memory is then bound to
            self._allocate()
        self.memory = max(0, free - cuda.free_memory())

    def _allocate(self) -> None:
        largest, classes = self._session.largest, self._session.classes
        images, logits = (largest, *self._session.image), (largest, classes)
        self._images = torch.empty(*images, dtype=torch.float32, pin_memory=True)
        self._logits = torch.empty(*logits, dtype=torch.float32, pin_memory=True)
        on_gpu = f"cuda:{cuda.DEVICE}"
        self._gpu_images = torch.empty(*images, dtype=torch.float32, device=on_gpu)
        self._gpu_logits = torch.empty(*logits, dtype=torch.float32, device=on_gpu)
        # A batch size's first call runs before any image lies there: not on what others left.
        self._gpu_images.zero_()
        self._session.bind(self._gpu_images.data_ptr(), self._gpu_logits.data_ptr())
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * _QUEUED)]

    def _settle(self) -> None:
        """Wait for what an error left in the stream: it uses the engine and the buffers."""
        # A GPU that is lost has said so; the engine is to be freed all the same.
        with suppress(RuntimeError):
            self._stream.synchronize()

    def _release(self) -> None:
        """Give memory back to the GPU. torch keeps page-locked memory, for whoever is next."""
        self._forget()
        # As in `_settle`: an error on the way out would hide the one that led there.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Queue what follows into the runner's own stream; CUDA's errors become our own."""
        with cuda.explained(str(self._path)), torch.cuda.stream(self._stream):
            yield

    def _check(self, images: Images) -> None:
        if images.dtype != np.float32 or images.shape[1:] != self._session.image:
            expected = " x ".join(map(str, self._session.image))
            raise InputError(
                f"the engine takes float32 images of {expected}, not {images.dtype} of "
                f"{' x '.join(map(str, images.shape[1:]))}"
            )
        if not self.smallest <= len(images) <= self._most:
            raise InputError(
                f"the engine was built for batches of {self.smallest} to {self.largest}, not "
                f"{len(images)}; set the target's option batches and build again"
            )

    def _run(self, images: Images) -> None:
        batch = len(images)
        with self._working():
            self._prepare(batch)
            before, begin, end, after = self._events
            # No name is given to a part of a buffer: an error's traceback would keep it alive.
            np.copyto(self._images[:batch].numpy(), images)
            before.record(self._stream)
            self._gpu_images[:batch].copy_(self._images[:batch], non_blocking=True)
            begin.record(self._stream)
            self._launch(batch)
            end.record(self._stream)
            self._logits[:batch].copy_(self._gpu_logits[:batch], non_blocking=True)
            after.record(self._stream)
            self._stream.synchronize()

    def _result(self, batch: int) -> Logits:
        return self._logits[:batch].numpy().copy()

    def _prepare(self, batch: int) -> None:
        """Set the batch size; at its first use run once, so that compilation is over."""
        self._session.resize(batch)
        if batch in self.first_calls:
            return
        start = time.perf_counter()
        self._session.enqueue(self._stream.cuda_stream)
        self._stream.synchronize()
        if not self._session.library.rtx:
            self._capture(batch)
        self.first_calls[batch] = 1e3 * (time.perf_counter() - start)

    def _capture(self, batch: int) -> None:
        """Record the engine with a batch size as a graph. The runner's stream is the current one.

        `torch.cuda.graph` does the same, but lets the error of a capture that came to nothing hide
        the reason, which the library told.
        """
        self._graphs[batch] = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate meanwhile.
        self._graphs[batch].capture_begin(capture_error_mode="thread_local")
        try:
            self._session.enqueue(self._stream.cuda_stream)
        except BaseException:
            with suppress(RuntimeError):
                self._graphs[batch].capture_end()
            del self._graphs[batch]
            raise
        self._graphs[batch].capture_end()

    def _launch(self, batch: int) -> None:
        if batch in self._graphs:
            self._graphs[batch].replay()
        else:
            self._session.enqueue(self._stream.cuda_stream)

    def _loop(self, batch: int, calls: int) -> tuple[list[float], float]:
        """Milliseconds of every call, and of all with the gaps between them."""
        times: list[float] = []
        total = 0.0
        with self._working():
            self._prepare(batch)
            pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
            while len(times) < calls:
                queued = pairs[: calls - len(times)]
                for begin, end in queued:
                    begin.record(self._stream)
                    self._launch(batch)
                    end.record(self._stream)
                self._stream.synchronize()
                times += [begin.elapsed_time(end) for begin, end in queued]
                total += queued[0][0].elapsed_time(queued[-1][1])
        return times, total


_QUEUED = 32
"""Calls in the queue at a time: enough that the GPU never waits for the host."""
