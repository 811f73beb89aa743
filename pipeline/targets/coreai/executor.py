"""Evaluate a saved Core AI program on plain torch: its own operations, weights and types.

    executor = Executor(program)
    logits = executor(images)             # float32 (batch, classes)

Two modes. `half`: every result that the program types float16 is rounded to float16, while each
operation computes in float32. `exact`: nothing is rounded but what is stored, which is what the
program means. Apple's own runtime judges the first on some images, see `runner`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import ArtifactError, DataError, UnsupportedOperatorError
from pipeline.core.network import Images, Logits
from pipeline.emulate import rounding
from pipeline.emulate.mil.batch import Groups, Values
from pipeline.targets.coreai.operators import MOVES, OPERATORS
from pipeline.targets.coreai.program import Graph, Operation, Program, TensorType

_FLOATS = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
_CHUNK_PIXELS = 64 * 96 * 96
_CHUNK_LIMIT = 256


class Executor:
    """Evaluates one program.

    Args:
        program: One input, (1, channels, height, width), and one output, (1, classes).
        half: Round to float16 where the program says so.
        record: Keep the largest magnitude of every float16 value, for `largest`.

    Raises:
        UnsupportedOperatorError: It has an operation that is not known.
        ArtifactError: It is no classifier of ours.
    """

    def __init__(self, program: Program, *, half: bool = True, record: bool = False) -> None:
        _check_operations(program)
        self._program, self._half, self._record = program, half, record
        self._input, self._output = _signature(program.main)
        self._constants = {name: self._fold(graph) for name, graph in program.graphs.items()}
        self._groups = Groups(self._input.shape[0])
        self._largest: dict[str, float] = {}

    def __call__(self, images: Images) -> Logits:
        """Logits of images.

        Args:
            images: float32 (batch, channels, height, width), as the program takes them.

        Returns:
            float32 (batch, classes).

        Raises:
            DataError: Their shape is another.
        """
        if images.ndim != 4 or images.shape[1:] != self._input.shape[1:]:
            raise DataError(f"the program takes {self._input.shape[1:]}, not {images.shape[1:]}")
        pixels = images.shape[-1] * images.shape[-2]
        chunk = max(1, min(_CHUNK_LIMIT, _CHUNK_PIXELS // pixels))
        with torch.inference_mode():
            parts = [self._chunk(images[i : i + chunk]) for i in range(0, len(images), chunk)]
        return np.concatenate(parts)

    def largest(self) -> Mapping[str, float]:
        """Largest magnitude of each float16 value so far, by operation and its place."""
        return self._largest

    def go_on(self, largest: Mapping[str, float]) -> None:
        """Take up what another executor of this program had seen, see `largest`."""
        self._largest = dict(largest)

    def _chunk(self, images: Images) -> Logits:
        batch = torch.from_numpy(np.ascontiguousarray(images))
        results, measured = self._groups.run(self._evaluate, batch)
        for name, values in measured.items():
            # A NaN stays one.
            found = float(values.max() if not values.isnan().any() else torch.nan)
            self._largest[name] = larger(self._largest.get(name, -1.0), found)
        logits: Logits = results["logits"].float().numpy()
        return logits

    def _evaluate(self, images: Tensor) -> tuple[Values, Values]:
        measured: Values = {}
        (logits,) = self._run("main", [images], measured)
        return {"logits": logits}, measured

    def _run(self, name: str, inputs: Sequence[Tensor], measured: Values) -> list[Tensor]:
        graph = self._program.graphs[name]
        values = dict(self._constants[name])
        for (_, number, _), value in zip(graph.inputs, inputs, strict=True):
            values[number] = value
        for place, operation in enumerate(graph.operations):
            if operation.outputs[0][0] not in values:
                self._step(operation, values, measured, f"{operation.kind} {name} {place}")
        return [values[number] for _, number in graph.outputs]

    def _step(
        self, operation: Operation, values: dict[int, Tensor], measured: Values, where: str
    ) -> None:
        taken = [values[number] for number in operation.inputs]
        if operation.kind == "invoke":
            found: Any = self._run(operation.attributes["callee"], taken, measured)
        else:
            found = OPERATORS[operation.kind](taken, operation.attributes)
        parts = [found] if isinstance(found, Tensor) else found
        for (number, kind), value in zip(operation.outputs, parts, strict=True):
            values[number] = self._stored(value, kind, operation.kind)
            if self._record and kind.dtype == "f16":
                measured[f"{where} {number}"] = values[number].abs().amax()

    def _stored(self, value: Tensor, kind: TensorType, operation: str) -> Tensor:
        dtype = _FLOATS.get(kind.dtype)
        if dtype is None:
            return value
        if dtype == torch.float16 and self._half and operation not in MOVES:
            return rounding.round_to(value.float(), dtype)
        return value if value.is_floating_point() else value.to(rounding.storage(dtype))

    def _fold(self, graph: Graph) -> dict[int, Tensor]:
        """Constants, and what follows from constants alone: weights that are stored smaller."""
        values: dict[int, Tensor] = {}
        for operation in graph.operations:
            if operation.constant is not None:
                values[operation.outputs[0][0]] = _tensor(operation)
            elif operation.kind != "invoke" and values.keys() >= set(operation.inputs):
                self._step(operation, values, {}, "")
        return values


def _check_operations(program: Program) -> None:
    for graph in program.graphs.values():
        for operation in graph.operations:
            if operation.kind not in OPERATORS and operation.kind not in ("constant", "invoke"):
                raise UnsupportedOperatorError(
                    f"the operation {operation.kind} of Core AI is not emulated"
                )


def larger(one: float, other: float) -> float:
    """The larger of two magnitudes; NaN if either is, in whichever order they come."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _signature(graph: Graph) -> tuple[TensorType, TensorType]:
    types = {number: kind for operation in graph.operations for number, kind in operation.outputs}
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.inputs[0][2].shape) != 4:
        raise ArtifactError("the Core AI program is no classifier of images: build it again")
    return graph.inputs[0][2], types[graph.outputs[0][1]]


def _tensor(operation: Operation) -> Tensor:
    constant = operation.constant
    assert constant is not None
    if constant.dtype.kind == "f":
        wide = np.float64 if constant.dtype == np.float64 else np.float32
        return torch.from_numpy(np.array(constant, wide))
    if constant.dtype == np.bool_:
        return torch.from_numpy(np.array(constant))
    return torch.from_numpy(np.array(constant, np.int64))
