"""A deserialized engine and its execution context, for both libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, BuildError, UnavailableError
from pipeline.core.files import write_atomically
from pipeline.targets.tensorrt.api import Library


class Session:
    """An engine that is ready to be queued.

    Args:
        library: The library that built it.
        engine: The engine's bytes.
        path: Where it lies, for messages.
        cache: File for what TensorRT-RTX compiles on the GPU. It is read only if the SHA-256 that
            was written beside it matches.
        log: Takes lines of the library's chatter.

    Attributes:
        library: The library.
        image: (channels, height, width) of the input.
        classes: Number of logits.
        smallest: Smallest batch.
        usual: Batch for which the engine is tuned.
        largest: Largest batch.

    Raises:
        ArtifactError: The library does not accept the engine.
        UnavailableError: The GPU has too little memory, or the driver is too old.
    """

    def __init__(
        self,
        library: Library,
        engine: bytes,
        path: Path,
        *,
        cache: Path,
        log: Callable[[str], None],
    ) -> None:
        self.library, self._path, self._cache_path, self._log = library, path, cache, log
        self._cache: Any = None
        self._stack = ExitStack()
        # The library may speak at any call, for as long as the engine lives.
        logger, self._messages = self._stack.enter_context(library.listening(log))
        try:
            self._runtime = library.module.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                raise self._refusal(engine)
            self._read_ports()
            self._context = self._make_context()
            if self._context is None:
                raise UnavailableError(
                    f"{library.title} cannot make a context for {path}: {self._messages.reason}; "
                    "free memory on the GPU or build with a smaller largest batch"
                )
        except BaseException:
            self.close()
            raise

    def bind(self, source: int, result: int) -> None:
        """Give the addresses of input and output on the GPU."""
        self._context.set_tensor_address(self._input, source)
        self._context.set_tensor_address(self._output, result)

    def resize(self, batch: int) -> None:
        """Set the batch size of the next calls."""
        if not self._context.set_input_shape(self._input, (batch, *self.image)):
            raise BuildError(f"{self._path} does not take a batch of {batch}: {self._said()}")

    def enqueue(self, stream: int) -> None:
        """Queue the engine into a CUDA stream, by its handle."""
        if not self._context.execute_async_v3(stream):
            raise BuildError(f"{self._path} cannot run: {self._said()}")

    def close(self) -> None:
        """Keep what was compiled and free the engine. Can be called again."""
        if self._cache is not None:
            cache, self._cache = self._cache, None
            _keep(self._cache_path, bytes(cache.serialize()), self._log)
        # The order matters: a context uses its engine, an engine its runtime.
        self._context = self._engine = self._runtime = None
        self._stack.close()

    def _said(self) -> str:
        return self._messages.reason

    def _read_ports(self) -> None:
        engine, mode = self._engine, self.library.module.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == mode.INPUT]
        outputs = [n for n in names if engine.get_tensor_mode(n) == mode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ArtifactError(f"{self._path} is no classifier: its tensors are {names}")
        self._input, self._output = inputs[0], outputs[0]
        for name in names:
            if engine.get_tensor_dtype(name) != self.library.module.DataType.FLOAT:
                raise ArtifactError(f"{self._path}: the tensor {name!r} is not float32")
        lowest, usual, highest = engine.get_tensor_profile_shape(self._input, 0)
        self.smallest, *_ = (int(extent) for extent in lowest)
        self.usual, *_ = (int(extent) for extent in usual)
        self.largest, c, h, w = (int(extent) for extent in highest)
        self.image = (c, h, w)
        self.classes = int(tuple(engine.get_tensor_shape(self._output))[-1])

    def _make_context(self) -> Any:
        if not self.library.rtx:
            return self._engine.create_execution_context()
        module = self.library.module
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Otherwise kernels are compiled behind the back of whoever measures.
        kinds = module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        self._cache = config.create_runtime_cache()
        kept = _kept(self._cache_path, self._log)
        if kept is not None and not self._cache.deserialize(kept):
            self._log(f"{self._cache_path} is of another GPU, driver or version: compiling anew")
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _refusal(self, engine: bytes) -> Exception:
        """Why the library did not take the engine, in the order of likelihood."""
        reason = self._messages.reason
        problems, kinds = _diagnose(self._runtime, self.library.module, engine)
        remedies = {
            "OLD_CUDA_DRIVER": "install a newer NVIDIA driver",
            "INSUFFICIENT_GPU_MEMORY": "free memory on the GPU",
            "CUDA_ERROR": "check the driver with nvidia-smi",
        }
        for kind, remedy in remedies.items():
            if kinds is not None and problems & int(getattr(kinds, kind)):
                return UnavailableError(f"{self._path} cannot be opened: {reason}; {remedy}")
        return ArtifactError(
            f"{self.library.title} does not accept {self._path}: {reason}; build it again for "
            "this GPU and version"
        )


def digest_path(cache: Path) -> Path:
    """File with the SHA-256 of what was kept, beside it, as `sha256sum --check` reads it."""
    return cache.with_name(f"{cache.name}.sha256")


def _keep(cache: Path, content: bytes, log: Callable[[str], None]) -> None:
    try:
        # A stop between the two leaves a digest that does not match: the next start compiles anew.
        write_atomically(cache, content)
        write_atomically(digest_path(cache), _digest_line(cache, content))
    except ArtifactError as error:  # what was computed with the engine is worth more than its cache
        log(f"what was compiled on the GPU is not kept: {error}")


def _kept(cache: Path, log: Callable[[str], None]) -> bytes | None:
    """What was kept, or None if there is nothing, or not what was written."""
    if not cache.is_file():
        return None
    try:
        content = cache.read_bytes()
        stated = digest_path(cache).read_bytes() if digest_path(cache).is_file() else b""
    except OSError as error:
        log(f"{cache} cannot be read ({error.strerror}): compiling anew")
        return None
    # Machine code that the GPU will run: damage is not left to the library to find.
    if stated != _digest_line(cache, content).encode():
        log(f"{cache} does not match {digest_path(cache).name}: ignored, compiling anew")
        return None
    return content


def _digest_line(cache: Path, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {cache.name}\n"


def _diagnose(runtime: Any, module: Any, engine: bytes) -> tuple[int, Any]:
    if not hasattr(runtime, "get_engine_validity"):  # full TensorRT
        return 0, None
    return int(runtime.get_engine_validity(engine)[1]), module.EngineInvalidityDiagnostics
