"""An ONNX graph that somebody gives: what it takes and gives, and whether a run can begin with it.

It may come from anybody, so that its weights lie in its own folder, if they lie beside it at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, inliner, numpy_helper

from pipeline.core.errors import ModelError
from pipeline.core.files import digest_of, file_hash
from pipeline.core.words import in_short, shown

IMAGE, LOGITS = "image", "logits"
"""What the input and the output of every graph of a run are called."""

OLDEST_OPSET = 13
"""As for the executor in `emulate.onnx`, which would load torch; this is read while planning."""

_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
    | {"ConvInteger", "MatMulInteger"}
)
_OTHER: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Given:
    """What a graph says of itself, without its weights.

    Attributes:
        path: The file.
        input: Name of its input.
        output: Name of its output.
        batch: Images that it takes at once; None for any number.
        shape: (channels, height, width); None where it takes any.
        classes: Logits of an image; None where only running it tells.
        opset: Version of its operator set.
        external: Files beside it that hold weights, by name.
        metadata: What it says of itself in words.
    """

    path: Path
    input: str
    output: str
    batch: int | None
    shape: tuple[int | None, int | None, int | None]
    classes: int | None
    opset: int
    external: tuple[str, ...]
    metadata: Mapping[str, str]


def look(path: Path, *, built: bool = False) -> Given:
    """Read what a graph takes and gives, and refuse what no run can begin with.

    Args:
        path: The file.
        built: It only has to answer: it may be in any precision.

    Raises:
        ModelError: It is no ONNX graph, or none of a classifier in float32; the message says what
            to give in its place.
    """
    model = _parsed(path)
    external = _external(model, path)
    opset = _opset(model)
    if not built:
        _refuse_quantized(model)
        _refuse_other_types(model)
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    batch, *sides = _sides_of_images(inputs)
    output = _only_output(list(model.graph.output))
    return Given(
        path=path,
        input=inputs[0].name,
        output=output.name,
        batch=batch,
        shape=(sides[0], sides[1], sides[2]),
        classes=_classes(output),
        opset=opset,
        external=external,
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


@dataclass(frozen=True)
class Port:
    """An input or output, for people.

    Attributes:
        name: Its name.
        dtype: Type of its values.
        sides: Its shape; a name or "?" where any size is taken.
    """

    name: str
    dtype: str
    sides: tuple[str, ...]


def graph_hash(path: Path) -> str:
    """SHA-256 of a graph, in hexadecimal: of the file, or of it and of the files of its weights.

    Raises:
        ModelError: It is no ONNX graph, or names what it may not.
        OSError: A file cannot be read.
    """
    external = _external(_parsed(path), path)
    if not external:
        return file_hash(path)
    beside = [[name, file_hash(path.parent / name)] for name in external]
    return digest_of([file_hash(path), beside])


def read(given: Given) -> onnx.ModelProto:
    """The whole graph from `image` to `logits`, in one piece, without local functions.

    Raises:
        ModelError: Its weights cannot be read, or it is no valid graph.
    """
    try:
        model = onnx.load(given.path, format="protobuf")
        onnx.checker.check_model(given.path)
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{given.path} is no valid graph: {in_short(error)}") from error
    _refuse_nan(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    held = {tensor.name for tensor in model.graph.initializer}
    taken = [value for value in model.graph.input if value.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(taken)
    _rename(model.graph, _names(model, given))
    return model


def ports(path: Path) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of any graph.

    Raises:
        ModelError: It is no ONNX graph, or names weights that it may not.
    """
    model = _parsed(path)
    _external(model, path)
    held = {tensor.name for tensor in model.graph.initializer}
    taken = [value for value in model.graph.input if value.name not in held]
    return [_port(value) for value in taken], [_port(value) for value in model.graph.output]


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    sides = (dim.dim_param or dim.dim_value or "?" for dim in tensor.shape.dim)
    return Port(value.name, "float32" if kind == "float" else kind, tuple(map(str, sides)))


def parameters(model: onnx.ModelProto) -> int:
    """Numbers that a graph holds as weights: floating-point ones with more than one value."""
    held = (t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    sizes = (math.prod(tensor.dims) for tensor in held)
    return sum(size for size in sizes if size > 1)


def _parsed(path: Path) -> onnx.ModelProto:
    """The graph without the weights that lie beside it."""
    try:
        # Another ending would make onnx take it for text.
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise ModelError(f"{path} is no ONNX graph, or is damaged: export it again") from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no graph (empty or damaged): export it again")
    return model


def _external(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Files that hold weights, in order, all of them below the graph's own folder."""
    names: dict[str, None] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            stated = {entry.key: entry.value for entry in tensor.external_data}
            names[_beside(stated.get("location", ""), path)] = None
    return tuple(sorted(names))


def _beside(location: str, path: Path) -> str:
    """The name of a file with weights, which lies where the graph does.

    Raises:
        ModelError: It lies elsewhere, or is missing.
    """
    stated = (PurePosixPath(location), PureWindowsPath(location))
    if not location or any(each.is_absolute() or ".." in each.parts for each in stated):
        raise ModelError(
            f"{path} was refused: it says that weights lie in {shown(repr(location))}, and they "
            "have to lie in the graph's own folder: take a graph that you trust, or save it again "
            "in one file"
        )
    file = path.parent / location
    if not file.is_file():
        raise ModelError(
            f"{path}: the file of its weights {shown(location)} is missing: put it into "
            f"{path.parent}"
        )
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise ModelError(
            f"{path} was refused: the file of its weights {shown(location)} is a link out of the "
            "graph's folder: put the file itself there"
        )
    return location


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph and of the graphs inside of its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for inner in _inner(graph):
        yield from _tensors(inner)


def _inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Graphs inside of a graph's nodes: branches and bodies of loops."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _opset(model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in _STANDARD]
    version = min(versions, default=0)
    if version < OLDEST_OPSET:
        raise ModelError(
            f"the graph is of opset {version}, and {OLDEST_OPSET} is the oldest that is read: "
            "export it again with a newer one, or convert it (onnx.version_converter)"
        )
    return version


def _refuse_quantized(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in _QUANTIZED:
            raise ModelError(
                f"the graph is quantized already (node {shown(node.name or node.output[0])!r}, "
                f"{node.op_type}): give the float32 graph that it was made from; the precisions of "
                "the targets quantize it"
            )


def _refuse_other_types(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type in _OTHER:
            raise ModelError(
                f"the graph is not float32: its tensor {shown(tensor.name)!r} is "
                f"{_OTHER[tensor.data_type]}: give the float32 graph"
            )


def _refuse_nan(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            lost = int(np.isnan(numpy_helper.to_array(tensor)).sum())
            if lost:
                raise ModelError(
                    f"the weight {shown(tensor.name)!r} holds {lost} values that are not a number: "
                    "train or export the network again"
                )


def _sides_of_images(inputs: list[onnx.ValueInfoProto]) -> tuple[int | None, ...]:
    """Batch, channels, height and width of the only input; None where it takes any."""
    if len(inputs) != 1:
        names = ", ".join(shown(value.name) for value in inputs) or "none"
        raise ModelError(
            f"the graph has {len(inputs)} inputs ({names}), and a classifier has one, its images: "
            "export it with that alone"
        )
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ModelError(
            f"the graph's input {shown(inputs[0].name)!r} is {kind}, and it has to be float32, "
            "normalized as `preprocess` says: export it without its own conversion of pixels"
        )
    sides = tuple(dim.dim_value or None for dim in tensor.shape.dim)
    words = " x ".join("any" if side is None else str(side) for side in sides)
    if len(sides) != 4:
        missing = "no batch axis" if len(sides) == 3 else f"{len(sides)} axes"
        raise ModelError(
            f"the graph's input {shown(inputs[0].name)!r} ({words}) has {missing}, and images are "
            "(batch, channels, height, width): export it for a batch of images"
        )
    if sides[3] in (1, 3) and sides[1] not in (1, 3):
        raise ModelError(
            f"the graph's input {shown(inputs[0].name)!r} ({words}) has its channels last, and "
            "images are (batch, channels, height, width): export it with channels first"
        )
    return sides


def _only_output(outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    if len(outputs) != 1:
        names = ", ".join(shown(value.name) for value in outputs) or "none"
        raise ModelError(
            f"the graph has {len(outputs)} outputs ({names}), and a classifier has one, its "
            "logits: export it with that alone"
        )
    return outputs[0]


def _classes(output: onnx.ValueInfoProto) -> int | None:
    dims = output.type.tensor_type.shape.dim
    return dims[1].dim_value or None if len(dims) == 2 else None


def _names(model: onnx.ModelProto, given: Given) -> dict[str, str]:
    """New names of the input and the output, and of tensors that have to make way for them."""
    names = {given.input: IMAGE, given.output: LOGITS}
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for name in (IMAGE, LOGITS):
        if name not in names:
            free = (f"{name}_{number}" for number in range(len(taken) + 1))
            names[name] = next(each for each in free if each not in taken)
    return names


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give tensors other names, all at once."""
    ports: list[onnx.ValueInfoProto | TensorProto] = [*graph.input, *graph.output]
    for value in [*ports, *graph.value_info, *graph.initializer]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for inner in _inner(graph):
        _rename(inner, names)
