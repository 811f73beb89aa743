"""From an ONNX graph to an engine, with the standard library and TensorRT alone.

Full TensorRT builds in the pipeline's own process. TensorRT-RTX names and orders the values of the
shape computations of a dynamic batch by where they lie in memory, and whatever is imported moves
them. `process.py` therefore runs the text of this file as a program, which finds nothing but the
standard library and TensorRT-RTX:

    python -P -S -B -c TEXT FOLDER JOB < model.onnx

FOLDER holds the packages of TensorRT-RTX, JOB is the keywords of `build` in JSON. Writes the engine
into the working directory and one JSON object a line: {"log": …}, at last {"facts": …},
{"refused": …} or {"unavailable": …}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RTX, FULL = "tensorrt_rtx", "tensorrt"
"""The modules' names, and the libraries' in artifacts."""

ENGINE = "model.engine"
LAYERS = "layers.json"

CHECKS_THAT_FAILED = ("MyelinCheckException", "CHECK(", "Assertion")
"""In a builder's reason: a check of its own did not hold, whatever the graph is. What it cannot
build it says in other words."""

REPORT = (
    "that graph stays for a bug report, for which python -m pipeline reduce finds its smallest "
    "part; install another version of the library, or build the target ort"
)
"""What to do about a fault of the library."""


class RefusedError(Exception):
    """The parser or the builder does not take the graph.

    Args:
        message: What is wrong, in one line.
        operator: The graph holds an operator that the parser does not know.
    """

    def __init__(self, message: str, *, operator: bool = False) -> None:
        super().__init__(message)
        self.operator = operator


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

    def parse(self, builder: Any, logger: Any, graph: str, content: bytes) -> Any:
        """Make a strongly typed network from an ONNX graph.

        Args:
            builder: The library's builder.
            logger: The process-wide logger.
            graph: Where the graph lies, for messages and for weights stored beside it.
            content: Its bytes.

        Raises:
            RefusedError: The parser refuses the graph.
        """
        # The flag is the default in TensorRT-RTX and TensorRT 11; in TensorRT 10 it is not.
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.module.OnnxParser(network, logger)
        if not parser.parse(content, graph):
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
            RefusedError: The library does not know one of them.
        """
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            name = f"SM{capability.replace('.', '')}"
            value = getattr(self.module.ComputeCapability, name, None)
            if value is None or not config.set_compute_capability(value, i):
                raise RefusedError(
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

    def add_shapes(
        self, builder: Any, config: Any, shapes: Mapping[str, Sequence[Sequence[int]]]
    ) -> None:
        """Give inputs their smallest, usual and largest shapes, by name."""
        profile = builder.create_optimization_profile()
        for name, three in shapes.items():
            profile.set_shape(name, *three)
        config.add_optimization_profile(profile)


def load(name: str) -> Library:
    """Import one of the two libraries; what an import raises, this raises."""
    module = importlib.import_module(name)
    return Library(name, module, str(module.__version__))


def build(
    library: Library,
    content: bytes,
    folder: Path,
    log: Callable[[str], None],
    *,
    graph: str,
    tf32: bool,
    capabilities: Sequence[str],
    batches: tuple[int, int, int],
    workspace: int | None,
    part: bool = False,
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> dict[str, Any]:
    """Write the engine and the list of its layers into `folder`.

    Args:
        library: The library.
        content: The ONNX graph.
        folder: Where to write.
        log: Gets every line that the library says.
        graph: Where the graph lies, for messages.
        tf32: Let float32 products round their factors to TF32.
        capabilities: Compute capabilities to compile for; only TensorRT-RTX can choose.
        batches: Smallest, usual and largest batch of a graph with a dynamic one.
        workspace: Upper limit of scratch memory in bytes, or None.
        part: It is a part of a network: any number of inputs and outputs.
        shapes: Of a part, smallest, usual and largest shape of each input with an open axis.

    Returns:
        The library's version, input and output, batches, warnings, the whole log.

    Raises:
        RefusedError: The parser or the builder refuses the graph; the message carries the reason.
    """
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        log(line)

    with library.listening(keep) as (logger, messages):
        builder = _builder(library, logger, messages)
        network = library.parse(builder, logger, graph, content)
        config = library.configure(builder, tf32=tf32, workspace=workspace)
        served = batches
        if not part:
            served = _profile(library, builder, config, network, graph, batches)
        elif shapes:
            library.add_shapes(builder, config, shapes)
        if library.rtx:
            library.aim(config, capabilities)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RefusedError(_refused(library, graph, messages.reason))
        (folder / ENGINE).write_bytes(plan)
        layers = [_layer(network.get_layer(i)) for i in range(network.num_layers)]
        (folder / LAYERS).write_text(json.dumps(layers, indent=0) + "\n")
        return {
            "library_version": library.version,
            "input": _port(network.get_input(0)),
            "output": _port(network.get_output(0)),
            "batches": dict(zip(("min", "opt", "max"), served, strict=True)),
            "warnings": messages.warnings,
            "log": lines,
        }


def _refused(library: Library, graph: str, reason: str) -> str:
    """What to say of a graph that was parsed and not built."""
    if any(words in reason for words in CHECKS_THAT_FAILED):
        return f"internal fault of {library.title}: it cannot build {graph}: {reason}; {REPORT}"
    return f"{library.title} cannot build {graph}: {reason}"


def _builder(library: Library, logger: Any, messages: Messages) -> Any:
    try:
        return library.module.Builder(logger)
    except TypeError as error:  # pybind11's word for a constructor that gave nothing
        raise RefusedError(f"{library.title} does not start: {messages.reason}") from error


def _profile(
    library: Library,
    builder: Any,
    config: Any,
    network: Any,
    graph: str,
    batches: tuple[int, int, int],
) -> tuple[int, int, int]:
    """The batches that the engine will serve."""
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise RefusedError(
            f"{graph} has {network.num_inputs} inputs and {network.num_outputs} outputs; a "
            "classifier has one of each"
        )
    batch, *others = tuple(network.get_input(0).shape)
    if any(extent < 0 for extent in others):
        raise RefusedError(f"{graph}: only the batch of the input may be dynamic")
    if batch >= 0:
        return (batch, batch, batch)
    smallest, _, largest = batches
    if smallest == largest:
        network.get_input(0).shape = (smallest, *others)
    else:
        library.add_profile(builder, config, network, batches)
    return batches


def _port(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _layer(layer: Any) -> dict[str, Any]:
    """A layer's name, which begins with that of the ONNX node, kind, and first output."""
    output = layer.get_output(0) if layer.num_outputs else None
    return {
        "name": layer.name,
        "kind": layer.type.name,
        "precision": output.dtype.name if output is not None else "",
        "shape": _shape(output) if output is not None else [],
    }


def _shape(tensor: Any) -> list[int]:
    try:
        return list(tensor.shape)
    except ValueError:  # what the bindings raise for a rank that is not known
        return []


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


def _parser_error(parser: Any, graph: str) -> RefusedError:
    """The first complaint of a parser, with the node that it is about."""
    if not parser.num_errors:
        return RefusedError(f"the ONNX parser refuses {graph} without a reason")
    error = parser.get_error(0)
    code = getattr(error.code(), "name", str(error.code()))
    text = " ".join(str(error.desc()).split())
    node, operator = error.node_name(), error.node_operator()
    where = f"node {node!r} ({operator})" if operator else graph
    # An operator that the parser has never heard of is looked for among the plugins.
    if code.startswith("UNSUPPORTED_NODE") or "Plugin not found" in text:
        detail = "" if text == "false" else f" ({text})"
        return RefusedError(
            f"{where}: TensorRT does not support this operator{detail} [{code}]; export the model "
            "without it, or build the target ort",
            operator=True,
        )
    return RefusedError(f"{where}: the ONNX parser refuses it: {text} [{code}]")


class _OnlyTensorRT:
    """Finds the packages of TensorRT-RTX in a folder, and nothing that lies beside them.

    On the module search path the folder would be listed, and what else is installed there would
    take memory; and other packages would be found.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The package of that name; see `importlib.abc.MetaPathFinder`."""
        file = f"{self.folder}/{name}/__init__.py"
        if path is not None or not name.startswith(RTX) or not os.path.isfile(file):  # noqa: PTH113
            return None
        return importlib.util.spec_from_file_location(name, file)


def _answer(kind: str, content: Any) -> None:
    print(json.dumps({kind: content}), flush=True)


def _main(folder: str, job: str) -> None:
    sys.meta_path.append(_OnlyTensorRT(folder))
    try:
        library = load(RTX)
    except (ImportError, OSError, RuntimeError) as error:
        _answer("unavailable", str(error))
        return
    content = sys.stdin.buffer.read()
    try:
        told = build(library, content, Path(), lambda line: _answer("log", line), **json.loads(job))
    except RefusedError as error:
        _answer("refused", {"message": str(error), "operator": error.operator})
    else:
        _answer("facts", told)


if __name__ == "__main__":
    _main(*sys.argv[1:])
