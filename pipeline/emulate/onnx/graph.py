"""Reading an ONNX model into what an executor needs: constants as tensors, nodes in order, owners.

Local functions are inlined. Of every node it says which module of the network it comes from, so
that a finding about a tensor can name the block that has to change.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, inliner, numpy_helper
from torch import Tensor

from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate import rounding

T = TypeVar("T")

MINIMUM_OPSET = 13
"""Before opset 13 operators of the same name meant other things (Softmax flattened its input)."""

_STANDARD_DOMAINS = ("", "ai.onnx")

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch.export writes for an operation that belongs to no module."""

_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    onnx.TensorProto.INT4: rounding.INT4,
    onnx.TensorProto.UINT4: rounding.UINT4,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that the model contains.

    Attributes:
        value: The values in the storage type of `dtype`.
        dtype: The type that the model declares.
    """

    value: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph; a shape's free dimensions are None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of the graph.

    Attributes:
        name: The node's name, or its first output's where it has none.
        op_type: The operator.
        inputs: Names of the tensors that it reads; "" for an optional one that is left out.
        outputs: Names of the tensors that it writes; "" for one that is left out.
        attributes: Attributes by name, tensors as `Constant`.
        module: Dotted path of the module that the operation comes from; "" if unknown.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module: str

    def attribute(self, name: str, default: T) -> T:
        """The attribute `name`, or `default` where the node does not have it."""
        value: T = self.attributes.get(name, default)
        return value

    @property
    def block(self) -> str:
        """The block of the network to which `module` belongs; see `block_of`."""
        return block_of(self.module)


@dataclass(frozen=True, slots=True)
class Graph:
    """A model, ready to be executed: every node follows those that it reads from."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def load_graph(model: Path | onnx.ModelProto, operators: Container[str] | None = None) -> Graph:
    """Read a model.

    Args:
        model: A file, or a model in memory (with its external data loaded).
        operators: Operators of the standard domain that the caller knows; None for any.

    Returns:
        The graph with local functions inlined and constant nodes turned into constants.

    Raises:
        ArtifactError: The file cannot be read or is no ONNX model; the opset is too old; a node
            reads what nothing writes; a tensor's type cannot be represented.
        UnsupportedOperatorError: A node of a foreign domain, with a subgraph, or of an operator
            that the caller does not know.
    """
    proto = load_model(model) if isinstance(model, Path) else model
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    _check_nodes(proto.graph.node, operators)
    _check_opset(proto)
    constants = {t.name: to_constant(t) for t in proto.graph.initializer}
    operations = []
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.domain in _STANDARD_DOMAINS:
            constants[node.output[0]] = _constant_of(node)
        else:
            operations.append(node)
    inputs = tuple(_port(i) for i in proto.graph.input if i.name not in constants)
    known = set(constants) | {port.name for port in inputs}
    ordered = _in_order(operations, known)
    modules = _modules(ordered, set(constants))
    return Graph(
        nodes=tuple(_node(n, module) for n, module in zip(ordered, modules, strict=True)),
        constants=constants,
        inputs=inputs,
        outputs=tuple(_port(o) for o in proto.graph.output),
    )


def graph_name(model: Path | onnx.ModelProto) -> str:
    """What messages call a model: its file, or its graph's name."""
    return str(model) if isinstance(model, Path) else model.graph.name or "the graph"


def refuse_nan(model: Path | onnx.ModelProto) -> None:
    """Refuse a model with weights that are no numbers.

    Raises:
        ArtifactError: The message names the first tensor.
    """
    proto = load_model(model) if isinstance(model, Path) else model
    for tensor in proto.graph.initializer:
        value = to_constant(tensor).value
        if value.is_floating_point() and torch.isnan(value).any():
            raise ArtifactError(
                f"{graph_name(model)}: the constant {tensor.name} holds NaN: train or export the "
                "model again"
            )


def to_constant(tensor: onnx.TensorProto) -> Constant:
    """Convert a tensor of the model.

    Raises:
        ArtifactError: Its type has no counterpart (strings, complex numbers).
    """
    dtype = to_dtype(tensor.data_type, f"tensor {tensor.name!r}")
    stored = rounding.storage(dtype)
    # onnx gives bfloat16, 8- and 4-bit types as ml_dtypes, which torch does not take.
    array = numpy_helper.to_array(tensor).astype(_NUMPY[stored], order="C")
    return Constant(torch.from_numpy(array), dtype)


def to_dtype(elem_type: int, where: str) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        ArtifactError: There is none; the message names `where`.
    """
    if elem_type not in _TYPES:
        label = onnx.TensorProto.DataType.Name(elem_type)
        raise ArtifactError(
            f"{where} has the type {label}, which the reference executor cannot represent; "
            "cast it to a numeric type in the graph"
        )
    return _TYPES[elem_type]


def to_elem_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch type: the inverse of `to_dtype`."""
    return next(elem_type for elem_type, known in _TYPES.items() if known == dtype)


def to_numpy(stored: torch.dtype) -> type[np.generic]:
    """The numpy type of a type in which tensors are stored; see `rounding.storage`."""
    return _NUMPY[stored]


def block_of(module: str) -> str:
    """The block to which a module belongs: the block of a stage, or what has the leading numbers.

    >>> block_of("stages.2.blocks.0.token_mixer.qk")
    'stages.2.blocks.0'
    >>> block_of("blocks.2.0.pw_exp.bn.act")
    'blocks.2.0'
    >>> block_of("head.fc")
    'head'
    """
    match = _BLOCK.match(module)
    return match[0] if match else ""


_BLOCK = re.compile(r"(?:stages|layers)\.\d+\.(?:blocks\.\d+|downsample)|[^.]+(?:\.\d+)*")

_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}


def load_model(path: Path) -> onnx.ModelProto:
    """Read a file.

    Raises:
        ArtifactError: It cannot be read, is no ONNX model, or holds no nodes.
    """
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ArtifactError(
            f"{path} is no ONNX model or is damaged: {error}; export it again"
        ) from error
    if not model.graph.node:
        raise ArtifactError(f"{path} holds no graph (empty or damaged); export it again")
    return model


def _check_nodes(nodes: Sequence[onnx.NodeProto], operators: Container[str] | None) -> None:
    """Refuse by name what cannot be run, before anything else about the graph is read."""
    for node in nodes:
        if node.domain not in _STANDARD_DOMAINS:
            raise UnsupportedOperatorError(
                f"node {_name(node)!r}: operator {node.op_type} of the domain {node.domain!r} is "
                "not known to the reference executor; export the model with standard ONNX operators"
            )
        if any(a.type in _GRAPHS for a in node.attribute):
            raise UnsupportedOperatorError(
                f"node {_name(node)!r}: operator {node.op_type} of the domain 'ai.onnx' has a "
                "subgraph, which the reference executor does not run; export the model without "
                "control flow"
            )
    if operators is not None:
        _check_known(nodes, operators)


def _check_known(nodes: Sequence[onnx.NodeProto], operators: Container[str]) -> None:
    unknown = [n for n in nodes if n.op_type not in operators and n.op_type != "Constant"]
    if unknown:
        kinds = sorted({node.op_type for node in unknown})
        raise UnsupportedOperatorError(
            f"node {_name(unknown[0])!r}: operator {unknown[0].op_type} of the domain 'ai.onnx' is "
            f"not known to the reference executor (unknown in this graph: {', '.join(kinds)}); "
            "export the model without it, or write a function for it in "
            "pipeline/emulate/onnx/operators/, whose __init__.py says how"
        )


def _check_opset(model: onnx.ModelProto) -> None:
    """Refuse operators that meant other things in the opset that the model declares."""
    versions = [o.version for o in model.opset_import if o.domain in _STANDARD_DOMAINS]
    version = min(versions, default=0)
    if version >= MINIMUM_OPSET:
        return
    found = f"opset {version}" if versions else "no opset of the standard domain"
    for node in model.graph.node:
        if node.op_type != "Constant" and not _unchanged(node.op_type, version):
            raise ArtifactError(
                f"node {_name(node)!r}: the model declares {found}, in which {node.op_type} may "
                f"mean another thing; the reference executor needs opset {MINIMUM_OPSET} or later: "
                "export it again with a newer one"
            )


def _unchanged(op_type: str, version: int) -> bool:
    """Whether an operator is the same in an old opset and in the oldest that we read."""
    try:
        old = onnx.defs.get_schema(op_type, version)
        return bool(old.since_version == onnx.defs.get_schema(op_type, MINIMUM_OPSET).since_version)
    except onnx.defs.SchemaError:
        return False


def _constant_of(node: onnx.NodeProto) -> Constant:
    attribute = node.attribute[0]
    if attribute.name == "value":
        return to_constant(attribute.t)
    value = helper.get_attribute_value(attribute)
    if attribute.name in ("value_float", "value_floats"):
        return Constant(torch.tensor(value, dtype=torch.float32), torch.float32)
    if attribute.name in ("value_int", "value_ints"):
        return Constant(torch.tensor(value, dtype=torch.int64), torch.int64)
    raise UnsupportedOperatorError(
        f"node {_name(node)!r}: a Constant given by {attribute.name!r} is not supported; "
        "store it as a dense numeric tensor"
    )


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


def _text(value: Any) -> Any:
    """An attribute's value with text in place of bytes."""
    if isinstance(value, list):
        return [_text(each) for each in value]
    return value.decode() if isinstance(value, bytes) else value


def _node(node: onnx.NodeProto, module: str) -> Node:
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = to_constant(value)
        attributes[attribute.name] = _text(value)
    inputs, outputs = tuple(node.input), tuple(node.output)
    return Node(_name(node), node.op_type, inputs, outputs, attributes, module)


def _port(value: onnx.ValueInfoProto) -> Port:
    if not value.type.HasField("tensor_type"):
        kind = (value.type.WhichOneof("value") or "a value without a type").removesuffix("_type")
        raise ArtifactError(
            f"{value.name!r} is no tensor ({kind}), which the reference executor cannot represent; "
            "export the model with tensors alone"
        )
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return Port(value.name, to_dtype(tensor.elem_type, f"{value.name!r}"), shape)


def _in_order(nodes: Sequence[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """Order nodes so that each follows those that it reads from; keeps an order that fits."""
    known = set(known) | {""}
    ordered: list[onnx.NodeProto] = []
    waiting = list(nodes)
    while waiting:
        left = []
        for node in waiting:
            if known.issuperset(node.input):
                known.update(node.output)
                ordered.append(node)
            else:
                left.append(node)
        if len(left) == len(waiting):
            missing = next(i for i in left[0].input if i not in known)
            raise ArtifactError(
                f"node {_name(left[0])!r} reads the tensor {missing!r}, which nothing before it "
                "writes: the graph is damaged or has a cycle; export the model again"
            )
        waiting = left
    return ordered


def _modules(nodes: Sequence[onnx.NodeProto], constants: set[str]) -> list[str]:
    """The module of each node: as it says itself, as its weights say, or that of what it reads."""
    writer: dict[str, str] = {}
    modules = []
    for node in nodes:
        candidates: Iterator[str] = (
            module
            for module in (
                _module_from_metadata(node),
                _module_from_path(node.name),
                _module_from_weights(node, constants),
                next((writer[i] for i in node.input if writer.get(i)), ""),
            )
            if module
        )
        module = next(candidates, "")
        modules.append(module)
        writer.update(dict.fromkeys(node.output, module))
    return modules


def _module_from_metadata(node: onnx.NodeProto) -> str:
    """torch.onnx records the path of modules, from the root to the operation's own name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                stated = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return ""  # somebody else's
            scopes = [s for s in stated if s != _NO_MODULE] if isinstance(stated, list) else []
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _module_from_path(name: str) -> str:
    """`/stages/stages.0/conv/Conv`, as the tracing exporter names nodes, is stages.0.conv."""
    parts = name.strip("/").split("/")[:-1]
    containers = {part for part, inner in pairwise(parts) if inner.startswith(f"{part}.")}
    return ".".join(part for part in parts if part not in containers)


def _module_from_weights(node: onnx.NodeProto, constants: set[str]) -> str:
    """`stages.2.blocks.0.token_mixer.qk.weight` belongs to stages.2.blocks.0.token_mixer.qk."""
    for name in node.input:
        if name in constants and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name):
            return str(name.rpartition(".")[0])
    return ""
