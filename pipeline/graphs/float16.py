"""Rewrites a float32 ONNX graph into 16-bit types, with float32 inputs and outputs.

Every floating-point tensor takes the 16-bit type, with three exceptions, decided by ONNX's own
operator definitions and by the caller, never by a list of operators: an input that the standard
declares as float32 (the scales of `Resize`), an operator that does not take the type (`Range`), and
nodes that shall keep float32. Between two types there is one `Cast`, however many nodes read it;
neighbours that both keep float32 have none between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference, version_converter

from pipeline.core.errors import BuildError
from pipeline.core.files import write_atomically
from pipeline.graphs.metadata import carry_metadata

Keep = Callable[[onnx.NodeProto], bool]
Choose = Callable[[onnx.NodeProto], "HalfType | None"]
"""The type in which a node computes; None for float32."""

BFLOAT16_OPSET = 22
"""First opset whose Conv, Elu and pooling operators take bfloat16."""


@dataclass(frozen=True)
class HalfType:
    """A 16-bit floating-point type.

    Attributes:
        name: Its name, as in tensor names.
        onnx: ONNX's number of it.
        numpy: NumPy's type.
        largest: Its largest finite value.
        smallest_normal: Hardware may flush smaller magnitudes to zero.
    """

    name: str
    onnx: int
    numpy: Any
    largest: float
    smallest_normal: float


FLOAT16 = HalfType("float16", TensorProto.FLOAT16, np.float16, 65504.0, 2.0**-14)
BFLOAT16 = HalfType(
    "bfloat16", TensorProto.BFLOAT16, ml_dtypes.bfloat16, 3.3895313892515355e38, 2.0**-126
)


@dataclass
class HalfFacts:
    """What the rewriting did.

    Attributes:
        casts: Casts that were inserted.
        float32_nodes: Nodes that compute in float32.
        small_constants: Constants of one value that the type holds as a subnormal number or as
            zero: an epsilon that hardware may lose.
        flushed: Weights that became zero, of all weights.
    """

    casts: int = 0
    float32_nodes: list[str] = field(default_factory=list)
    small_constants: list[str] = field(default_factory=list)
    flushed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for an artifact's facts."""
        return {
            "casts": self.casts,
            "float32_nodes": self.float32_nodes,
            "small_constants": self.small_constants,
            "flushed_weights": self.flushed,
        }


def to_half(
    model: onnx.ModelProto, half: HalfType, keep: Keep = lambda node: False
) -> tuple[onnx.ModelProto, HalfFacts]:
    """Rewrite a graph into a 16-bit type.

    Args:
        model: A float32 graph; it may hold quantized tensors. It is not changed.
        half: The type.
        keep: Says which nodes keep float32.

    Returns:
        The new model, checked, and what was done.

    Raises:
        BuildError: A constant lies beyond the type's range, or a node holds a subgraph.
    """
    return to_types(model, lambda node: None if keep(node) else half, (half,))


def to_types(
    model: onnx.ModelProto, choose: Choose, types: Collection[HalfType]
) -> tuple[onnx.ModelProto, HalfFacts]:
    """Rewrite a graph so that each node computes in the type that is chosen for it.

    Args:
        model: A float32 graph; it may hold quantized tensors. It is not changed.
        choose: Says for each node in which type it computes.
        types: The 16-bit types that it may say.

    Returns:
        The new model, checked, and what was done.

    Raises:
        BuildError: A constant lies beyond the range of a type, or a node holds a subgraph.
    """
    if BFLOAT16 in types:
        model = raise_opset(model, BFLOAT16_OPSET)
    rewriting = _Rewriting(model, choose)
    return check(rewriting.run()), rewriting.facts


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that a model declares."""
    return max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def raise_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """The model in a standard operator set of at least this version."""
    if opset(model) >= least:
        return model
    raised = version_converter.convert_version(model, least)
    carry_metadata(model, raised)
    return raised


def read_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        BuildError: The file cannot be read or is no ONNX model.
    """
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise BuildError(
            f"cannot read the graph {path}: {error}; run the export stage again"
        ) from error
    if not model.graph.node:
        raise BuildError(f"{path} holds no graph; run the export stage again")
    return model


def write_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with the same bytes for the same model, as a whole or not at all."""
    write_atomically(path, model.SerializeToString(deterministic=True))


def check(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer all types and shapes anew and check the model with ONNX's own checker.

    Raises:
        BuildError: The model is not valid; the message carries ONNX's reason.
    """
    try:
        model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise BuildError(f"the rewritten graph is not valid ONNX: {error}") from error
    return model


class _Rewriting:
    """One pass over the nodes, in order."""

    def __init__(self, model: onnx.ModelProto, choose: Choose) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.choose = choose
        self.facts = HalfFacts()
        self._opset = opset(model)
        self._initializers = {i.name: i for i in self.model.graph.initializer}
        self._versions: dict[tuple[str, str], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._converted: list[TensorProto] = []
        self._outputs = {o.name: o.type.tensor_type.elem_type for o in self.model.graph.output}
        self._names = _all_names(self.model.graph)
        # The type that each floating-point tensor has in the new graph, None for float32. Others
        # are not in it.
        self._native: dict[str, HalfType | None] = {
            v.name: None
            for v in self.model.graph.input
            if v.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self._native |= {
            i.name: None for i in self.model.graph.initializer if i.data_type == TensorProto.FLOAT
        }
        self._float32 = _float32_tensors(self.model) | set(self._native)

    def run(self) -> onnx.ModelProto:
        graph = self.model.graph
        for node in graph.node:
            if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
                raise BuildError(
                    f"node {node.name!r} ({node.op_type}) holds a subgraph, which has no 16-bit "
                    "form here; export the model without control flow"
                )
            self._rewrite(node)
        self._restore_outputs()
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        read = {name for node in self._nodes for name in node.input} | set(self._outputs)
        left = [i for i in (*graph.initializer, *self._converted) if i.name in read]
        del graph.initializer[:]
        graph.initializer.extend(left)
        return self.model

    def _rewrite(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Clip" and node.input[0] in self._float32:
            _drop_missing_bound(node)
        half = self.choose(node)
        if half is not None and not self._takes(node, half):
            half = None
        schema = _schema(node, self._opset)
        for i, name in enumerate(node.input):
            if name not in self._float32:
                continue
            declared = _formal(schema.inputs, i).type_str if schema else ""
            node.input[i] = self._version(name, None if declared == "tensor(float)" else half)
        if half is not None:
            self._retype_attributes(node, half)
        for name in node.output:
            if name in self._float32:
                self._native[name] = half
        if half is None and any(name in self._float32 for name in (*node.input, *node.output)):
            self.facts.float32_nodes.append(node.name or node.output[0])
        self._nodes.append(node)

    def _takes(self, node: onnx.NodeProto, half: HalfType) -> bool:
        """The standard allows the type wherever this node has a float32 tensor of generic type."""
        schema = _schema(node, self._opset)
        if schema is None:
            return True
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        formals = [
            *((_formal(schema.inputs, i), name) for i, name in enumerate(node.input)),
            *((_formal(schema.outputs, i), name) for i, name in enumerate(node.output)),
        ]
        return all(
            formal.type_str not in allowed or f"tensor({half.name})" in allowed[formal.type_str]
            for formal, name in formals
            if name in self._float32
        )

    def _retype_attributes(self, node: onnx.NodeProto, half: HalfType) -> None:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == (
                TensorProto.FLOAT
            ):
                attribute.i = half.onnx
            elif attribute.type == attribute.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._convert(attribute.t, node.output[0], half))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = np.asarray(helper.get_attribute_value(attribute), np.float32)
                tensor = self._convert(numpy_helper.from_array(values), node.output[0], half)
                attribute.CopyFrom(helper.make_attribute("value", tensor))

    def _version(self, name: str, wanted: HalfType | None) -> str:
        """Name under which a tensor is to be had in the wanted type; makes it if need be."""
        if self._native[name] == wanted:
            return name
        kind = wanted.name if wanted else "float32"
        if (name, kind) not in self._versions:
            version = self._fresh(f"{name}_{kind}")
            self._versions[name, kind] = version
            if wanted and name in self._initializers:
                self._converted.append(self._convert(self._initializers[name], version, wanted))
            else:
                self._cast(name, version, wanted.onnx if wanted else TensorProto.FLOAT)
        return self._versions[name, kind]

    def _cast(self, source: str, destination: str, to: int) -> None:
        node = helper.make_node(
            "Cast", [source], [destination], self._fresh(f"cast_{destination}"), to=to
        )
        self._nodes.append(node)
        self.facts.casts += 1

    def _convert(self, tensor: TensorProto, name: str, half: HalfType) -> TensorProto:
        exact = numpy_helper.to_array(tensor)
        beyond = np.isfinite(exact) & (np.abs(exact) > half.largest)
        if beyond.any():
            worst = float(np.abs(exact[beyond]).max())
            raise BuildError(
                f"the constant {tensor.name or name!r} holds {worst:.6g}, beyond {half.name}'s"
                f" largest value {half.largest:.6g}; use bf16 or fp32 for this network"
            )
        narrow = exact.astype(half.numpy)
        lost = (exact != 0) & (narrow == 0)
        self.facts.flushed += int(lost.sum())
        small = (exact != 0) & (np.abs(narrow).astype(np.float32) < half.smallest_normal)
        if exact.size == 1 and small.any():
            self.facts.small_constants.append(tensor.name or name)
        return numpy_helper.from_array(narrow, name)

    def _restore_outputs(self) -> None:
        """Give the graph's float32 outputs back their type, under their own names."""
        for name in self._outputs:
            half = self._native.get(name)
            if half is None:
                continue
            inner = self._fresh(f"{name}_{half.name}")
            for node in self._nodes:
                node.input[:] = [inner if i == name else i for i in node.input]
                node.output[:] = [inner if o == name else o for o in node.output]
            self._cast(inner, name, TensorProto.FLOAT)

    def _fresh(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def _drop_missing_bound(node: onnx.NodeProto) -> None:
    """Make a `Clip` with one bound a `Max` or `Min`.

    TensorRT's parser puts float32's largest value in the place of the missing bound, which no
    16-bit type holds, and warns of it at every build.
    """
    bounds = [*node.input[1:], "", ""][:2]
    if bool(bounds[0]) == bool(bounds[1]):
        return
    node.op_type = "Max" if bounds[0] else "Min"
    node.input[:] = [node.input[0], bounds[0] or bounds[1]]


def _all_names(graph: onnx.GraphProto) -> set[str]:
    names = {i.name for i in graph.initializer} | {i.name for i in graph.input}
    for node in graph.node:
        names.update((*node.input, *node.output, node.name))
    return names


def _float32_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all tensors that nodes write as float32."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = check(bare).graph
    return {
        v.name
        for v in (*inferred.value_info, *inferred.output)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }


def _schema(node: onnx.NodeProto, version: int) -> defs.OpSchema | None:
    """The standard's definition of a node's operator; None for one of another domain."""
    if not defs.has(node.op_type, node.domain):
        return None
    return defs.get_schema(node.op_type, version, node.domain)


def _formal(formals: Any, i: int) -> Any:
    """The formal parameter of an actual one: the last takes all that follow if it is variadic."""
    return formals[min(i, len(formals) - 1)]
