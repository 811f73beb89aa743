"""Executes an ONNX graph on plain torch, rounding every result to its tensor's type.

This is the emulated verdict for an engine that cannot run here. Each operation reads values that
are already rounded to their tensors' types, computes in float32, and its result is rounded once. An
intermediate value beyond 65504 in a float16 graph thus becomes infinite as it would on a GPU,
which ONNX Runtime's CPU provider hides: it computes such graphs in float32.

Matrix products, convolutions and reductions accumulate in float32 and round once, which is what
tensor cores do with float32 accumulators. `accumulate="output"` asks for the pessimistic reading
instead: running sums of matrix products and convolutions are rounded to the output's type every 16
products. An engine fuses operations and so rounds less often than the graph says: between these two
it cannot be told without the GPU which one a kernel is nearer to.

    >>> executor = OnnxExecutor(Path("engines/care_tiny/trt/fp16/model.onnx"), record=True)
    >>> logits = executor.run(images)
    >>> first_failure(executor.overflow_report())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor

from pipeline.core.errors import ArtifactError, DataError, PipelineError, UnsupportedOperatorError
from pipeline.core.network import in_batches
from pipeline.emulate import rounding
from pipeline.emulate.kernels import Rounding
from pipeline.emulate.onnx.graph import Graph, Node, Port, load_graph
from pipeline.emulate.onnx.operators import OPERATORS, Call, Operator
from pipeline.emulate.ranges import TensorRange

Accumulate = Literal["float32", "output"]

_PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
"""Operators whose first two inputs tensor cores multiply."""

_CHUNK = 1_200_000
"""Input values at a time: larger tensors make the executor slow."""

_ROUNDED = frozenset({torch.float16, torch.bfloat16}) | rounding.FLOAT8


@dataclass(frozen=True, slots=True)
class _Step:
    """A node, ready to run.

    Attributes:
        node: The node.
        operator: What runs it.
        call: What its function is told besides its inputs.
        dtype: Type of its outputs.
        dead: Tensors that nothing reads after this step.
    """

    node: Node
    operator: Operator
    call: Call
    dtype: torch.dtype
    dead: tuple[str, ...]


class OnnxExecutor:
    """Runs one ONNX graph of a classifier.

    Tensors that depend on constants alone are computed once, when the executor is made; others are
    freed after their last use.

    A batch whose tensors stay below 32 MB runs fastest: larger ones go back to the operating system
    after every operation (measured with 48 MB: 1.8 times the time for an image).

    Args:
        model: An ONNX file, or a model in memory.
        record: Record the ranges of all tensors that are rounded; see `overflow_report`.
        accumulate: Where running sums are rounded; see the module's text.
        tf32: Round the factors of float32 products to TF32. A flag of the builder turns it on: the
            graph does not know of it.

    Raises:
        ArtifactError: The model cannot be read, or does not have exactly one input.
        UnsupportedOperatorError: A node that this executor does not know.
    """

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        *,
        record: bool = False,
        accumulate: Accumulate = "float32",
        tf32: bool = False,
    ) -> None:
        self._tf32 = tf32
        graph = load_graph(model)
        self.input = _only_input(graph)
        self.output = graph.outputs[0]
        self._record = record
        self._ranges: dict[str, TensorRange] = {}
        self._constants = {name: constant.value for name, constant in graph.constants.items()}
        types = {name: constant.dtype for name, constant in graph.constants.items()}
        types[self.input.name] = self.input.dtype
        steps = _plan(graph, types, accumulate)
        self._note_constants(graph)
        self._steps = self._fold(steps)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Compute the graph's first output.

        Args:
            images: Preprocessed images, float32, (batch, channels, height, width).

        Returns:
            Logits, float32, (batch, classes).

        Raises:
            DataError: The images do not fit the graph's input.
            ArtifactError: An operation cannot be carried out on the shapes that result.
        """
        _check_images(images, self.input)
        values = dict(self._constants)
        with torch.inference_mode():
            batch = torch.tensor(images)  # a copy: the caller's array may be read-only
            values[self.input.name] = rounding.round_to(batch, self.input.dtype)
            for step in self._steps:
                self._execute(step, values)
                for name in step.dead:
                    del values[name]
            logits: np.ndarray = values[self.output.name].to(torch.float32).numpy()
        return logits

    def run_all(self, images: np.ndarray) -> np.ndarray:
        """Compute the first output for any number of images, in batches of the size that is best.

        A graph with a fixed batch gets batches of it.

        Args:
            images: Preprocessed images, float32, (images, channels, height, width).

        Returns:
            Logits, float32, (images, classes).
        """
        fixed = self.input.shape[0] if self.input.shape else None
        fitting = max(1, _CHUNK // max(1, int(np.prod(images.shape[1:]))))
        return in_batches(self.run, images, fixed or fitting, fixed or 1)

    def overflow_report(self) -> list[TensorRange]:
        """The ranges of all tensors so far, in execution order.

        Reshapes, copies and other operations whose results need no rounding are left out, and so
        are constants, unless they hold infinities or NaN.

        Raises:
            PipelineError: The executor was made without `record=True`.
        """
        if not self._record:
            raise PipelineError("no ranges were recorded: make the executor with record=True")
        return list(self._ranges.values())

    def _execute(self, step: _Step, values: dict[str, Tensor]) -> None:
        node = step.node
        inputs = [values[name] if name else None for name in node.inputs]
        if self._tf32 and node.op_type in _PRODUCTS and step.dtype == torch.float32:
            inputs[:2] = [rounding.to_tf32(x) if x is not None else None for x in inputs[:2]]
        try:
            result = step.operator.function(step.call, *inputs)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError) as error:
            shapes = ", ".join(str(tuple(x.shape)) if x is not None else "-" for x in inputs)
            raise ArtifactError(
                f"node {node.name!r} ({node.op_type}) cannot run on inputs of shape {shapes}: "
                f"{error}"
            ) from error
        outputs = result if isinstance(result, tuple) else (result,)
        if len(outputs) < len(node.outputs):
            raise UnsupportedOperatorError(
                f"node {node.name!r}: the graph uses {len(node.outputs)} outputs of the operator "
                f"{node.op_type}, the reference executor computes {len(outputs)}"
            )
        for name, output in zip(node.outputs, outputs, strict=False):
            if name:
                values[name] = self._store(step, name, output, inputs)

    def _store(
        self, step: _Step, name: str, exact: Tensor, inputs: Sequence[Tensor | None]
    ) -> Tensor:
        """Round a result to its type, in place where nothing else uses its memory."""
        dtype = step.dtype
        if step.operator.exact:
            return exact
        narrow = rounding.narrow(exact, dtype, saturate=bool(step.node.attribute("saturate", 1)))
        if self._record and (dtype.is_floating_point or step.operator.quantizes):
            self._range(name, step.node, dtype).observe(exact, narrow, dtype)
        if dtype not in _ROUNDED:
            return narrow
        shared = any(x is not None and x.data_ptr() == exact.data_ptr() for x in inputs)
        if shared or exact.dtype != torch.float32:
            return narrow.to(torch.float32)
        return exact.copy_(narrow)

    def _range(self, name: str, node: Node, dtype: torch.dtype) -> TensorRange:
        if name not in self._ranges:
            self._ranges[name] = TensorRange(
                tensor=name,
                node=node.name,
                op_type=node.op_type,
                module=node.module,
                block=node.block,
                dtype=rounding.name(dtype),
                limit=rounding.bounds(dtype)[1],
            )
        return self._ranges[name]

    def _note_constants(self, graph: Graph) -> None:
        """Report weights that a conversion to a narrow type has already made infinite."""
        if not self._record:
            return
        reader = {name: node for node in reversed(graph.nodes) for name in node.inputs}
        for name, constant in graph.constants.items():
            value = constant.value
            if value.is_floating_point() and not torch.isfinite(value).all() and name in reader:
                used_by = reader[name]
                owner = Node(name, "Initializer", (), (name,), {}, used_by.module)
                self._range(name, owner, constant.dtype).observe(value, value, constant.dtype)

    def _fold(self, steps: list[_Step]) -> list[_Step]:
        """Run what depends on constants alone; returns the other steps."""
        left = []
        with torch.inference_mode():
            for step in steps:
                if all(not name or name in self._constants for name in step.node.inputs):
                    self._execute(step, self._constants)
                else:
                    left.append(step)
        needed = {name for step in left for name in step.node.inputs} | {self.output.name}
        self._constants = {n: value for n, value in self._constants.items() if n in needed}
        return [_without_constants(step, self._constants) for step in left]


def _plan(graph: Graph, types: dict[str, torch.dtype], accumulate: Accumulate) -> list[_Step]:
    """Look up each node's operator, infer the type of its outputs, and note what it uses last."""
    _check_operators(graph.nodes)
    dead = _last_uses(graph)
    steps = []
    for node, names in zip(graph.nodes, dead, strict=True):
        operator = OPERATORS[node.op_type]
        dtype = operator.result(node, [types.get(name) for name in node.inputs])
        types.update(dict.fromkeys(node.outputs, dtype))
        narrow: Rounding | None = None
        if accumulate == "output" and dtype in _ROUNDED:
            narrow = partial(rounding.round_to, dtype=dtype)
        steps.append(_Step(node, operator, Call(node, dtype, narrow), dtype, names))
    return steps


def _check_operators(nodes: Sequence[Node]) -> None:
    unknown = [node for node in nodes if node.op_type not in OPERATORS]
    if unknown:
        kinds = sorted({node.op_type for node in unknown})
        raise UnsupportedOperatorError(
            f"node {unknown[0].name!r}: operator {unknown[0].op_type} of the domain 'ai.onnx' is "
            f"not known to the reference executor (unknown in this graph: {', '.join(kinds)}); "
            "add it to pipeline/reference/onnx_operators.py or export the model without it"
        )


def _last_uses(graph: Graph) -> list[tuple[str, ...]]:
    """For each node the tensors that it is the last to use."""
    alive = {port.name for port in graph.outputs} | {""}
    dead: list[tuple[str, ...]] = []
    for node in reversed(graph.nodes):
        last = [n for n in dict.fromkeys((*node.inputs, *node.outputs)) if n not in alive]
        alive.update(last)
        dead.append(tuple(last))
    return dead[::-1]


def _without_constants(step: _Step, constants: Mapping[str, Tensor]) -> _Step:
    dead = tuple(name for name in step.dead if name not in constants)
    return _Step(step.node, step.operator, step.call, step.dtype, dead)


def _only_input(graph: Graph) -> Port:
    if len(graph.inputs) != 1 or not graph.outputs:
        names = ", ".join(port.name for port in graph.inputs) or "none"
        raise ArtifactError(
            f"the reference executor needs a graph with one input and an output; inputs: {names}"
        )
    return graph.inputs[0]


def _check_images(images: np.ndarray, port: Port) -> None:
    if images.dtype != np.float32:
        raise DataError(f"images must be float32, these are {images.dtype}")
    fits = len(port.shape) == images.ndim and all(
        expected is None or expected == n
        for expected, n in zip(port.shape, images.shape, strict=True)
    )
    if not fits:
        expected = tuple("any" if n is None else n for n in port.shape)
        raise DataError(
            f"images of shape {images.shape} do not fit the graph's input {port.name!r}, "
            f"which has the shape {expected}"
        )
