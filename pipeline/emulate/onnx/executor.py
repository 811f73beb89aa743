"""Executes an ONNX graph on plain torch, rounding every result to its tensor's type.

This is the emulated verdict for an engine that cannot run here. Each operation reads values that
are already rounded to their tensors' types, computes in float32, and its result is rounded once. An
intermediate value beyond 65504 in a float16 graph thus becomes infinite as it would on a GPU,
which ONNX Runtime's CPU provider hides: it computes such graphs in float32.

Whatever a node computes inside, it computes in float32 and rounds once at its end: sums of
products (what tensor cores do with float32 accumulators), reductions, normalizations, Softmax,
Gelu, Attention. `accumulate="output"` asks for the pessimistic reading of sums of products instead:
the running sum of Conv, ConvTranspose, MatMul, Gemm, Einsum and Attention is rounded to the
output's type after every 16 products (`kernels.ACCUMULATION_STEP`), those of a convolution counted
with the channels of one position of the kernel side by side. Products of two tensors that were
dequantized from integers are left out: integers are summed in 32 bits. An engine fuses operations
and so rounds less often than the graph says: between the two readings it cannot be told without the
GPU which one a kernel is nearer to. `docs/targets.md` says what else is emulated, and what is not.

    >>> executor = OnnxExecutor(Path("engines/care_tiny/trt/fp16/model.onnx"), record=True)
    >>> logits = executor.run(images)
    >>> first_failure(executor.overflow_report())
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import torch
from torch import Tensor

from pipeline.core.errors import ArtifactError, DataError, PipelineError, UnsupportedOperatorError
from pipeline.core.network import in_batches
from pipeline.core.threads import SMALL, threads_that_help
from pipeline.emulate import rounding
from pipeline.emulate.beside import Beside, even_parts, side_by_side
from pipeline.emulate.onnx.graph import Graph, Node, Port, load_graph, to_numpy
from pipeline.emulate.onnx.operators import OPERATORS
from pipeline.emulate.onnx.operators.table import Function
from pipeline.emulate.onnx.pairs import ORIGIN, Pair, pairs_of
from pipeline.emulate.onnx.plan import ROUNDED, Accumulate, Step, plan
from pipeline.emulate.ranges import TensorRange, extremes_of

_FACTORS = {"Conv": 2, "ConvTranspose": 2, "MatMul": 2, "Gemm": 2, "Einsum": 2, "Attention": 3}
"""How many of an operator's first inputs tensor cores multiply."""

_MISFITS = (RuntimeError, IndexError, TypeError, ValueError, KeyError, ArithmeticError)
"""What torch and the operators' functions raise for shapes and types that do not fit."""

_WORTH_A_THREAD = 1 << 15
"""Values that take longer to count than to hand over."""

_CHUNK = 8 * 3 * 224 * 224
"""Input values at a time: larger tensors make the executor slow."""

_SMALL_CHUNK = 128
"""Small pictures at a time: of fewer, calling operations costs more than computing them."""


class GraphExecutor:
    """Runs an ONNX graph with any inputs and outputs.

    Tensors that depend on constants alone are computed once, when the executor is made; others are
    freed after their last use.

    Args:
        model: An ONNX file, or a model in memory.
        record: Record the ranges of all tensors that are rounded; see `overflow_report`.
        moved: Record those of results that need no rounding, too: reshapes, copies, extremes.
        accumulate: Where running sums are rounded; see the module's text.
        tf32: Round the factors of float32 products to TF32. A flag of the builder turns it on: the
            graph does not know of it.
        keep: Keep all tensors that depend on constants alone, for `constants`, and not only those
            that others read.

    Raises:
        ArtifactError: The model cannot be read.
        UnsupportedOperatorError: A node that this executor does not know.
    """

    _plain = True
    """Nodes run as they do here: images may run side by side, and nodes together."""

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        *,
        record: bool = False,
        moved: bool = False,
        accumulate: Accumulate = "float32",
        tf32: bool = False,
        keep: bool = False,
    ) -> None:
        graph = load_graph(model, OPERATORS)
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self._check_ports()
        self._tf32 = tf32
        self._record = record or moved
        self._moved, self._keep = moved, keep
        self._ranges: dict[str, TensorRange] = {}
        self._beside: Beside | None = None
        # Extremes of integers, where they are known.
        self._whole: dict[str, tuple[float, float]] = {}
        self._constants = {name: constant.value for name, constant in graph.constants.items()}
        steps, self._types = plan(graph, accumulate)
        self._note_constants(graph)
        self._steps = self._fold(steps)
        self._pairs = self._find_pairs()
        self._saturating: set[str] = set()
        self._of_constants = [replace(entry) for entry in self._ranges.values()]

    def evaluate(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output of the graph.

        Args:
            feeds: A value for each input; it is rounded to the input's type.

        Returns:
            The outputs by name. Narrow floating-point types come as float32 that holds rounded
            values, 4-bit integers and the unsigned ones that torch lacks in a wider integer type.

        Raises:
            ArtifactError: An operation cannot be carried out on the shapes that result.
        """
        values = dict(self._constants)
        with torch.inference_mode(), self._counting():
            for port in self.inputs:
                values[port.name] = _from_numpy(feeds[port.name], port.dtype)
            for step in self._steps:
                self._advance(step, values)
                for name in step.dead:
                    values.pop(name, None)  # an output that the operator did not have
        return {port.name: values[port.name].numpy() for port in self.outputs}

    def trace(
        self, feeds: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray] | None = None
    ) -> Iterator[tuple[Node, dict[str, np.ndarray]]]:
        """Compute node by node, and show what each gives.

        Args:
            feeds: As for `evaluate`.
            known: Values that take the place of what was computed, by tensor, before the next node
                reads it; rounded to the tensor's type. So each node is seen on inputs that are
                right, whatever those before it did.

        Yields:
            Each node that depends on the inputs, in order, and its outputs as it computed them, by
            name, as `evaluate` gives them. They hold until the next step.

        Raises:
            ArtifactError: As `evaluate`.
        """
        values = dict(self._constants)
        for port in self.inputs:
            values[port.name] = _from_numpy(feeds[port.name], port.dtype)
        for step in self._steps:
            with torch.inference_mode():
                self._execute(step, values)
            written = [name for name in step.node.outputs if name in values]
            yield step.node, {name: values[name].numpy() for name in written}
            for name in written:
                if known is not None and name in known:
                    values[name] = _from_numpy(known[name], self._types[name])
                    self._whole.pop(name, None)
            for name in step.dead:
                values.pop(name, None)

    def constants(self) -> dict[str, np.ndarray]:
        """What depends on constants alone, by name: what others read of it, or all; see `keep`."""
        return {name: value.numpy() for name, value in self._constants.items()}

    def held(self) -> dict[str, Tensor]:
        """What depends on constants alone and others read, by name, as it is stored."""
        return dict(self._constants)

    def steps(self) -> list[Step]:
        """What runs, in order: the nodes that depend on the inputs."""
        return list(self._steps)

    def nodes(self) -> list[Node]:
        """The nodes that depend on the inputs, in the order in which they run."""
        return [step.node for step in self._steps]

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, as the graph's inputs and operators tell it."""
        return self._types[name]

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether any tensor of the graph has a type."""
        return dtype in self._types.values()

    def overflow_report(self) -> list[TensorRange]:
        """The ranges of all tensors so far, in execution order.

        Reshapes, copies and other operations whose results need no rounding are left out, and so
        are constants, unless they hold infinities or NaN; `moved=True` records the former as well.

        Raises:
            PipelineError: The executor was made without `record=True` or `moved=True`.
        """
        if not self._record:
            raise PipelineError("no ranges were recorded: make the executor with record=True")
        return list(self._ranges.values())

    def go_on(self, report: Sequence[TensorRange]) -> None:
        """Take up what another executor of this graph had recorded, see `overflow_report`."""
        self._ranges = {entry.tensor: entry for entry in report}

    def begin(self) -> None:
        """Forget what was recorded of images."""
        self.go_on([replace(entry) for entry in self._of_constants])

    def joined(self, reports: Iterable[Sequence[TensorRange]]) -> list[TensorRange]:
        """The report of all images, from those of parts of them, each after a `begin`."""
        constants = {entry.tensor for entry in self._of_constants}
        found: dict[str, TensorRange] = {}
        for report in reports:
            for entry in report:
                if entry.tensor not in found:
                    found[entry.tensor] = replace(entry)
                elif entry.tensor not in constants:
                    found[entry.tensor].merge(entry)
        return list(found.values())

    def _twin(self) -> Self:
        """An executor of the same graph for another thread, which records for itself.

        It knows the largest values so far, so that it need not look for them again.
        """
        twin = copy(self)
        twin._ranges = {name: entry.emptied() for name, entry in self._ranges.items()}
        twin._whole = {}
        return twin

    def _add(self, report: Iterable[TensorRange]) -> None:
        """Take what a twin recorded into account."""
        for entry in report:
            if entry.tensor in self._ranges:
                self._ranges[entry.tensor].merge(entry)
            else:
                self._ranges[entry.tensor] = entry

    def _check_ports(self) -> None:
        """Refuse inputs and outputs that the face of this class does not serve."""

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count values in a thread of its own where torch has several: numpy uses one alone."""
        if not self._record or torch.get_num_threads() == 1:
            yield
            return
        with Beside() as self._beside:
            try:
                yield
            finally:
                self._beside = None

    def _find_pairs(self) -> dict[str, Pair]:
        if not self._plain:
            return {}
        outputs = frozenset(port.name for port in self.outputs)
        return pairs_of(self._steps, self._types, self._constants, outputs)

    def _advance(self, step: Step, values: dict[str, Tensor]) -> None:
        """Run a node, one of a pair in its short form while nothing saturates."""
        name = step.node.outputs[0]
        pair = self._pairs.get(name)
        if pair is None:
            self._execute(step, values)
        elif name != pair.quantized and values[pair.quantized].is_floating_point():
            values[name] = self._from_positions(step, pair, values[pair.quantized])
        elif name != pair.quantized or not self._to_positions(step, pair, values):
            self._execute(step, values)

    def _to_positions(self, step: Step, pair: Pair, values: dict[str, Tensor]) -> bool:
        """Quantize; False where a value is beyond the type, as then it will often be."""
        x = values[step.node.inputs[0]]
        if pair.quantized in self._saturating or not x.numel():
            return False
        positions = pair.positions(x)
        low, high = (extreme - ORIGIN for extreme in extremes_of(positions))
        if not (pair.bounds[0] <= low and high <= pair.bounds[1]):
            self._saturating.add(pair.quantized)
            return False
        if self._record:
            seen = self._range(pair.quantized, step.node, step.dtypes[0])
            seen.observe(positions, positions, step.dtypes[0], (low, high))
            self._whole[pair.quantized] = low, high
        values[pair.quantized] = positions
        return True

    def _from_positions(self, step: Step, pair: Pair, positions: Tensor) -> Tensor:
        """Dequantize, in the memory of the positions."""
        dtype = step.dtypes[0]
        exact = pair.values(positions)
        narrow = rounding.narrow(exact, dtype)
        if self._record:
            seen = self._range(step.node.outputs[0], step.node, dtype)
            farthest = max(map(abs, self._whole[pair.quantized]))
            if not _count_steps(seen, dtype, exact.numel(), farthest, np.float32(pair.scale)):
                seen.observe(exact, narrow, dtype)
        return exact.copy_(narrow)

    def _execute(self, step: Step, values: dict[str, Tensor]) -> None:
        node = step.node
        inputs = [values[name] if name else None for name in node.inputs]
        if self._tf32 and step.dtypes[0] == torch.float32:
            for position in range(_FACTORS.get(node.op_type, 0)):
                inputs[position] = _in_tf32(inputs[position])
        outputs = apply(step, inputs)
        for name, dtype, output in zip(node.outputs, step.dtypes, outputs, strict=False):
            if name:
                values[name] = self._store(step, name, dtype, output, inputs)

    def _store(
        self,
        step: Step,
        name: str,
        dtype: torch.dtype,
        exact: Tensor,
        inputs: Sequence[Tensor | None],
    ) -> Tensor:
        """Round a result to its type, in place where nothing else uses its memory."""
        if step.operator.exact:
            if self._moved and dtype.is_floating_point:
                self._range(name, step.node, dtype).observe(exact, exact.to(dtype), dtype)
            return exact
        if step.operator.quantizes and not dtype.is_floating_point:
            return self._to_integers(step, name, dtype, exact)
        narrow = _narrow(step, exact, dtype)
        if self._record and dtype.is_floating_point:
            seen = self._range(name, step.node, dtype)
            if step.node.op_type != "DequantizeLinear" or not _observe_steps(
                seen, step, inputs, self._whole.get(step.node.inputs[0])
            ):
                if self._beside is not None and _worth_a_thread(exact, narrow):
                    stored = narrow.to(torch.float32)  # the exact values will still be read
                    bits = narrow.view(torch.int16).numpy()
                    self._beside.call(seen.observe_bits, exact, bits, dtype, True)
                    return stored
                seen.observe(exact, narrow, dtype)
        if dtype not in ROUNDED:
            return narrow
        if exact.dtype != torch.float32 or _is_shared(exact, inputs):
            return narrow.to(torch.float32)
        return exact.copy_(narrow)

    def _to_integers(self, step: Step, name: str, dtype: torch.dtype, positions: Tensor) -> Tensor:
        """What `rounding.narrow` makes of whole numbers in memory that nothing else uses."""
        known = extremes_of(positions) if self._record else None
        if known:
            self._range(name, step.node, dtype).observe(positions, positions, dtype, known)
        low, high = rounding.bounds(dtype)
        self._whole.pop(name, None)
        if known and not any(map(math.isnan, known)):
            self._whole[name] = min(max(low, known[0]), high), max(min(high, known[1]), low)
        if known and low <= known[0] and known[1] <= high:
            return positions.to(rounding.storage(dtype))
        if name in self._whole:
            return positions.clamp_(low, high).to(rounding.storage(dtype))
        return rounding.saturated(positions, dtype)

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
                narrow = value.to(constant.dtype)
                self._range(name, owner, constant.dtype).observe(value, narrow, constant.dtype)

    def _fold(self, steps: list[Step]) -> list[Step]:
        """Run what depends on constants alone; returns the other steps."""
        left = []
        with torch.inference_mode():
            for step in steps:
                if all(not name or name in self._constants for name in step.node.inputs):
                    self._execute(step, self._constants)
                else:
                    left.append(step)
        needed = {name for step in left for name in step.node.inputs}
        needed |= {port.name for port in self.outputs}
        if not self._keep:
            self._constants = {n: value for n, value in self._constants.items() if n in needed}
        return [step.without(frozenset(self._constants)) for step in left]


class OnnxExecutor(GraphExecutor):
    """Runs one ONNX graph of a classifier: images in, logits out.

    A batch whose tensors stay below 32 MB runs fastest: larger ones go back to the operating system
    after every operation (measured with 48 MB: 1.8 times the time for an image).

    Args and the other errors are those of `GraphExecutor`.

    Raises:
        ArtifactError: The model cannot be read, or does not have exactly one input.
    """

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
        check_images(images, self.input)
        logits = self.evaluate({self.input.name: images})[self.outputs[0].name]
        return logits.astype(np.float32, copy=False)

    def run_all(self, images: np.ndarray) -> np.ndarray:
        """Compute the first output for any number of images, in batches of the size that is best.

        Where torch has several threads, each computes images of its own, if there are enough of
        them. A graph with a fixed batch gets batches of it, one after the other.

        Args:
            images: Preprocessed images, float32, (images, channels, height, width).

        Returns:
            Logits, float32, (images, classes).
        """
        fixed = self.input.shape[0] if self.input.shape else None
        if fixed:
            return in_batches(self.run, images, fixed, fixed)
        values = int(np.prod(images.shape[1:]))
        most = _SMALL_CHUNK if values < SMALL else max(1, _CHUNK // values)
        threads = torch.get_num_threads() if self._plain else 1
        batches = [images[part] for part in even_parts(len(images), most, threads, values)]
        with threads_that_help(values):
            if threads == 1 or len(batches) == 1:
                return np.concatenate([self.run(batch) for batch in batches])
            return self._run_beside(batches, min(threads, len(batches)))

    def _run_beside(self, batches: Sequence[np.ndarray], threads: int) -> np.ndarray:
        """Run batches side by side, and take what each thread recorded together."""
        idle = [self._twin() for _ in range(threads)]

        def run(batch: np.ndarray) -> np.ndarray:
            twin = idle.pop()
            try:
                return twin.run(batch)
            finally:
                idle.append(twin)

        with side_by_side(threads) as pool:
            logits = list(pool.map(run, batches))
        for twin in idle:
            self._add(twin.overflow_report() if self._record else ())
        return np.concatenate(logits)

    @property
    def input(self) -> Port:
        """The graph's only input."""
        return self.inputs[0]

    def _check_ports(self) -> None:
        if len(self.inputs) != 1 or not self.outputs:
            names = ", ".join(port.name for port in self.inputs) or "none"
            raise ArtifactError(
                "the reference executor needs a graph with one input and an output; "
                f"inputs: {names}"
            )


def _observe_steps(
    seen: TensorRange,
    step: Step,
    inputs: Sequence[Tensor | None],
    known: tuple[float, float] | None,
) -> bool:
    """Take a dequantized tensor into account by its steps, if they tell all; whether they do.

    With a single scale a value grows with its distance from the zero point: where one step is a
    normal number, and the farthest one is in range, nothing is lost in between.
    """
    positions, scale, zero_point = (*inputs, None)[:3]
    if positions is None or scale is None or positions.dtype not in (torch.int8, torch.uint8):
        return False
    if scale.numel() != 1 or not positions.numel():
        return False
    if zero_point is not None and zero_point.numel() != 1:
        return False
    zero = 0.0 if zero_point is None else zero_point.item()
    farthest = max(abs(extreme - zero) for extreme in known or extremes_of(positions))
    size = np.float32(abs(scale.item()))
    return _count_steps(seen, step.dtypes[0], positions.numel(), farthest, size)


def _count_steps(
    seen: TensorRange, dtype: torch.dtype, values: int, farthest: float, size: np.float32
) -> bool:
    """Take values into account by the farthest of their steps; whether that tells all."""
    largest = float(np.float32(farthest) * size)
    if not (rounding.smallest_normal(dtype) <= size and largest <= seen.limit):
        return False
    seen.largest = max(seen.largest, largest)
    seen.values += values
    return True


def _narrow(step: Step, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What a node's result is in its type."""
    if dtype in rounding.FLOAT8:
        saturate = bool(step.node.attribute("saturate", 1))
        return rounding.narrow(exact, dtype, saturate=saturate)
    return rounding.narrow(exact, dtype)


def _is_shared(exact: Tensor, inputs: Sequence[Tensor | None]) -> bool:
    """Whether a result lies in the memory of what it was computed from."""
    place = exact.data_ptr()
    return place in [x.data_ptr() for x in inputs if x is not None]


def _worth_a_thread(exact: Tensor, narrow: Tensor) -> bool:
    """Whether to count values beside: many of 16 bits, which lie in memory as they will lie then.

    The last bits of what is computed from them may depend on their order in memory.
    """
    many = narrow.element_size() == 2 and narrow.numel() >= _WORTH_A_THREAD
    return many and exact.stride() == narrow.stride()


def _in_tf32(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else rounding.to_tf32(factor)


def _from_numpy(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A rounded copy: the caller's array may be read-only."""
    wide = np.array(array, dtype=to_numpy(rounding.storage(dtype)))
    return rounding.round_to(torch.from_numpy(wide), dtype)


def apply(
    step: Step, inputs: Sequence[Tensor | None], function: Function | None = None
) -> tuple[Tensor, ...]:
    """Run a node's operator.

    Args:
        step: The node.
        inputs: What it reads; None for what is left out.
        function: Computes the outputs in place of the operator's own function.

    Raises:
        ArtifactError: It cannot be carried out on such inputs.
        UnsupportedOperatorError: Outputs are used that are not computed.
    """
    node = step.node
    function = function or step.operator.function
    try:
        result = function(step.call, *inputs)
    except _MISFITS as error:
        shapes = ", ".join(str(tuple(x.shape)) if x is not None else "-" for x in inputs)
        raise ArtifactError(
            f"node {node.name!r} ({node.op_type}) cannot run on inputs of shape {shapes}: {error}"
        ) from error
    outputs = result if isinstance(result, tuple) else (result,)
    if len(outputs) < len(node.outputs) and any(node.outputs[len(outputs) :]):
        raise UnsupportedOperatorError(
            f"node {node.name!r}: the graph uses {len(node.outputs)} outputs of the operator "
            f"{node.op_type}, the reference executor computes {len(outputs)}"
        )
    return outputs


def check_images(images: np.ndarray, port: Port) -> None:
    """Refuse images that a graph's input does not take.

    Raises:
        DataError: Type or shape do not fit.
    """
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
