"""One adapter over TensorRT-RTX and full TensorRT 10 and 11.

Both take strongly typed networks, so precision is in the ONNX graph and this file needs to know
only where the two part: TensorRT-RTX compiles for compute capabilities by name and finishes on the
GPU, full TensorRT builds for the GPU that is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import (
    ArtifactError,
    BuildError,
    UnavailableError,
    UnsupportedOperatorError,
)

Choice = Literal["auto", "rtx", "tensorrt"]

RTX, FULL = "tensorrt_rtx", "tensorrt"
"""The modules' names, and the libraries' in artifacts."""

_DISTRIBUTIONS = {
    RTX: ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    FULL: ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
}

INSTALL = {
    RTX: "pip install tensorrt-rtx-cu13",
    FULL: "pip install tensorrt-cu13",
}


@dataclass(eq=False)
class Messages:
    """What the library said while it was listened to.

    Attributes:
        warnings: Lines of that severity.
        errors: Lines of that severity and above.
    """

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The first error, on one line."""
        return " ".join(self.errors[0].split()) if self.errors else "it gave no reason"


@dataclass(frozen=True)
class Library:
    """One of the two libraries, imported.

    Attributes:
        name: "tensorrt_rtx" or "tensorrt".
        module: The Python module.
        version: Its version.
    """

    name: str
    module: Any
    version: str

    @property
    def rtx(self) -> bool:
        """TensorRT-RTX, which compiles for GPUs that are not there."""
        return self.name == RTX

    @property
    def title(self) -> str:
        """Name and version for people."""
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.version}"

    @contextmanager
    def listening(self, log: Callable[[str], None]) -> Iterator[tuple[Any, Messages]]:
        """Give the process-wide logger, with its lines going to `log`.

        A line does not say which builder or engine it comes from: all who listen at the same time
        get it.
        """
        logger = _logger(self)
        listener = (log, Messages())
        logger.listeners.append(listener)
        try:
            yield logger, listener[1]
        finally:
            logger.listeners.remove(listener)

    def parse(self, builder: Any, logger: Any, graph: Path, content: bytes) -> Any:
        """Make a strongly typed network from an ONNX graph.

        Args:
            builder: The library's builder.
            logger: The process-wide logger.
            graph: Where the graph lies, for messages and for weights stored beside it.
            content: Its bytes.

        Raises:
            UnsupportedOperatorError: The parser does not know an operator.
            BuildError: The parser refuses the graph.
        """
        # The flag is the default in TensorRT-RTX and TensorRT 11; in TensorRT 10 it is not.
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.module.OnnxParser(network, logger)
        if not parser.parse(content, str(graph)):
            raise _parser_error(parser, graph)
        return network

    def configure(self, builder: Any, *, tf32: bool, workspace: int | None) -> Any:
        """Make a builder configuration.

        Args:
            builder: The library's builder.
            tf32: Let float32 products round their factors to TF32.
            workspace: Upper limit of scratch memory in bytes, or None for the library's own.
        """
        config = builder.create_builder_config()
        change = config.set_flag if tf32 else config.clear_flag
        change(self.module.BuilderFlag.TF32)
        if workspace is not None:
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, workspace)
        return config

    def aim(self, config: Any, capabilities: Sequence[str]) -> None:
        """Compile for these compute capabilities. TensorRT-RTX alone can choose.

        Raises:
            BuildError: The library does not know one of them.
        """
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            name = f"SM{capability.replace('.', '')}"
            value = getattr(self.module.ComputeCapability, name, None)
            if value is None or not config.set_compute_capability(value, i):
                raise BuildError(
                    f"{self.title} does not compile for compute capability {capability}; take it "
                    "out of compute_capabilities or install a newer version"
                )

    def add_profile(
        self, builder: Any, config: Any, network: Any, batches: tuple[int, int, int]
    ) -> None:
        """Give the network's input its smallest, usual and largest batch size."""
        port = network.get_input(0)
        profile = builder.create_optimization_profile()
        profile.set_shape(port.name, *((n, *tuple(port.shape)[1:]) for n in batches))
        config.add_optimization_profile(profile)

    def refuse_malformed(self, logger: Any, engine: bytes, path: Path) -> bool:
        """Check what can be checked of an engine without a GPU: the header.

        Returns:
            Whether there was a check: only TensorRT-RTX has one.

        Raises:
            ArtifactError: It is no engine of this library and version.
        """
        runtime = self.module.Runtime(logger)
        if not hasattr(runtime, "get_engine_validity"):
            return False
        _, problems = runtime.get_engine_validity(engine)
        kinds = self.module.EngineInvalidityDiagnostics
        for kind, words in (
            (kinds.MALFORMED_ENGINE, "is damaged or no engine of this library"),
            (kinds.VERSION_MISMATCH, "was built by another version"),
        ):
            if int(problems) & int(kind):
                raise ArtifactError(f"{path} {words} ({self.title}): build it again")
        return True


def installed(name: str) -> str | None:
    """Version of a library, without importing it; None if it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    # Installed without metadata, as some system packages are: ask the module.
    return str(importlib.import_module(name).__version__)


def cuda_major(name: str) -> int:
    """Major CUDA version for which an installed library was made."""
    for distribution in _DISTRIBUTIONS[name]:
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if "-cu" in distribution:
            return int(distribution.rpartition("-cu")[2])
    return 13


def load(name: str) -> Library:
    """Import one of the two libraries.

    Raises:
        UnavailableError: It is not installed, or its shared libraries do not load.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"cannot import {name}: {error}; {INSTALL[name]}") from error
    except (OSError, RuntimeError) as error:  # its wheels load shared libraries on import
        raise UnavailableError(
            f"{name} is installed but does not load: {error}; reinstall it ({INSTALL[name]})"
        ) from error
    return Library(name, module, str(module.__version__))


_LOGGERS: dict[str, Any] = {}


def _logger(library: Library) -> Any:
    """The library's logger: one for the process, because later ones are ignored."""
    if library.name not in _LOGGERS:
        _LOGGERS[library.name] = _make_logger(library.module)
    return _LOGGERS[library.name]


def _make_logger(module: Any) -> Any:
    severities = module.ILogger.Severity

    class Forwarding(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        """Forwards lines to those who listen, and collects warnings and errors for them."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.listeners: list[tuple[Callable[[str], None], Messages]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == severities.VERBOSE:
                return
            for sink, messages in tuple(self.listeners):
                if severity == severities.WARNING:
                    messages.warnings.append(message)
                elif severity != severities.INFO:
                    messages.errors.append(message)
                sink(f"{severity.name.lower()}: {message}")

    return Forwarding()


def _parser_error(parser: Any, graph: Path) -> BuildError:
    """The first complaint of a parser, with the node that it is about."""
    if not parser.num_errors:
        return BuildError(f"the ONNX parser refuses {graph} without a reason")
    error = parser.get_error(0)
    code = getattr(error.code(), "name", str(error.code()))
    text = " ".join(str(error.desc()).split())
    node, operator = error.node_name(), error.node_operator()
    where = f"node {node!r} ({operator})" if operator else str(graph)
    # An operator that the parser has never heard of is looked for among the plugins.
    if code.startswith("UNSUPPORTED_NODE") or "Plugin not found" in text:
        detail = "" if text == "false" else f" ({text})"
        return UnsupportedOperatorError(
            f"{where}: TensorRT does not support this operator{detail} [{code}]; export the model "
            "without it, or build the target ort"
        )
    return BuildError(f"{where}: the ONNX parser refuses it: {text} [{code}]")
