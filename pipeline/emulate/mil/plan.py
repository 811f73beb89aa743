"""Preparing an ML Program for evaluation: constants bound, weights decompressed, order of memory.

Everything that does not depend on an image is done here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import pipeline.emulate.mil.operators.layers
import pipeline.emulate.mil.operators.resize
import pipeline.emulate.mil.operators.shapes  # noqa: F401 - they register their operations
from pipeline.core.errors import ArtifactError, UnsupportedOperatorError
from pipeline.emulate.mil.constants import TensorType, Value
from pipeline.emulate.mil.operators.table import OPERATORS, Operator, ints
from pipeline.emulate.mil.program import Constant, Operation, Program
from pipeline.emulate.mil.weights import DECOMPRESSORS

_WIDER = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
"""Unsigned types that torch computes little on, and the types that hold their values."""

_DECOMPRESSED = {"FLOAT16": np.float16, "FLOAT32": np.float32}


@dataclass(slots=True)
class Step:
    """One operation, ready to run.

    Attributes:
        operation: The operation.
        operator: How to evaluate it.
        constants: Its constant inputs: tensors, strings, tuples of tensors, or of whole numbers.
        wired: For the other inputs the names of their values.
        batched: Whether its results hold something for each image. Shapes of batched values do not.
        last_uses: Values that no later operation needs.
    """

    operation: Operation
    operator: Operator
    constants: dict[str, object]
    wired: dict[str, tuple[str, ...]]
    batched: bool
    last_uses: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """A program that is ready for evaluation.

    Attributes:
        steps: Operations in order.
        types: Declared types of all values, arguments included.
        constants: Constants that are listed among values which depend on the input, by name.
        producers: The operation behind each value.
    """

    steps: list[Step]
    types: dict[str, TensorType]
    constants: dict[str, Tensor]
    producers: dict[str, Operation]


class Planner:
    """Makes the plan of a program.

    Args:
        program: The program.
        half_constant: What to make of constants of type float16, given as float32 tensors.

    Raises:
        ArtifactError: A compressed weight does not fit its data.
        UnsupportedOperatorError: An operation, or an input of one, is not known.
    """

    def __init__(self, program: Program, half_constant: Callable[[Tensor], Tensor]) -> None:
        self._program = program
        self._half_constant = half_constant
        self._values: dict[str, Value] = dict(program.constants)
        self._dynamic = {name for name, _ in program.arguments}
        self._batched = set(self._dynamic)

    def plan(self) -> Plan:
        """Prepare all operations; those of a classifier's answer are left to the caller."""
        plan = Plan([], dict(self._program.arguments), {}, {})
        for operation in self._program.operations:
            results = [name for name, _ in operation.outputs]
            plan.types.update(operation.outputs)
            plan.producers.update(dict.fromkeys(results, operation))
            if operation.type in DECOMPRESSORS:
                self._decompress(operation)
            elif operation.type not in ("const", "classify"):
                step = self._step(operation)
                plan.steps.append(step)
                self._dynamic.update(results)
                self._batched.update(results if step.batched else ())
        for step in plan.steps:
            listed = {name for names in step.wired.values() for name in names} - self._dynamic
            plan.constants.update((name, self._number(name)) for name in listed)
        _note_last_uses(plan.steps)
        return plan

    def _decompress(self, operation: Operation) -> None:
        """Evaluate a weight, rounded to its declared type: Core ML stores it no better."""
        arguments = {key: self._literal(sources[0]) for key, sources in operation.inputs.items()}
        try:
            found = DECOMPRESSORS[operation.type](**arguments)
        except (TypeError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"{self._program.package}: {operation.where} does not fit its data ({error});"
                " build the package again"
            ) from error
        results = found if isinstance(found, tuple) else (found,)
        for (name, kind), result in zip(operation.outputs, results, strict=True):
            self._values[name] = result.astype(_DECOMPRESSED.get(kind.dtype, result.dtype))

    def _step(self, operation: Operation) -> Step:
        step = Step(operation, self._operator(operation), {}, {}, batched=False)
        for parameter, sources in operation.inputs.items():
            names = tuple(source for source in sources if isinstance(source, str))
            if self._dynamic.isdisjoint(names):
                constants = tuple(self._constant(source) for source in sources)
                if parameter in step.operator.whole and isinstance(constants[0], Tensor):
                    constants = (tuple(ints(constants[0])),)
                step.constants[parameter] = constants if parameter == "values" else constants[0]
            else:
                step.wired[parameter] = names
                step.batched |= not self._batched.isdisjoint(names)
        step.batched &= operation.type != "shape"
        return step

    def _operator(self, operation: Operation) -> Operator:
        where = f"{self._program.package}: {operation.where}"
        operator = OPERATORS.get(operation.type)
        if operator is None:
            raise UnsupportedOperatorError(
                f"{where} is not supported by the executor of ML Programs"
            )
        unknown = operation.inputs.keys() - operator.required - operator.optional
        missing = operator.required - operation.inputs.keys()
        if unknown:
            raise UnsupportedOperatorError(f"{where} has an unknown input '{min(unknown)}'")
        if missing:
            raise UnsupportedOperatorError(f"{where} lacks its input '{min(missing)}'")
        return operator

    def _literal(self, source: str | Constant) -> Value:
        if isinstance(source, Constant):
            return source.value
        if source not in self._values:
            raise ArtifactError(f"{self._program.package}: the program uses '{source}' undefined")
        return self._values[source]

    def _constant(self, source: str | Constant) -> object:
        """A constant as operators take it: text as it is, numbers as a tensor."""
        value = self._literal(source)
        return value if isinstance(value, (str, list)) else self._number(source)

    def _number(self, source: str | Constant) -> Tensor:
        array = np.array(self._literal(source))
        tensor = torch.from_numpy(array)
        if array.dtype == np.float16:
            return self._half_constant(tensor.to(torch.float32))
        return tensor.to(_WIDER.get(array.dtype.name, tensor.dtype))


def _note_last_uses(steps: list[Step]) -> None:
    """Tell each step which values nothing needs after it, so that their memory can go."""
    seen: set[str] = set()
    for step in reversed(steps):
        used = {name for names in step.wired.values() for name in names}
        step.last_uses = sorted(used - seen)
        seen |= used
