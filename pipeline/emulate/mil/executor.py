"""Evaluate a saved Core ML package on plain torch, off a Mac.

    executor = MilExecutor(Path("model.mlpackage"))
    logits = executor.logits(images)          # float32 (batch, classes)
    answers = executor.predict(images)        # every output of the model

The package itself is read, weights included, so what is checked is what is shipped. Two modes:

- `float32`: weights as stored, activations not rounded. What the program means.
- `half`: every result that the program types float16 is rounded to float16; each operation computes
  in float32, as hardware with wide accumulators does. `accumulate='float16'` models narrow ones:
  the running sums of convolutions, products, `reduce_mean` and `reduce_sum` are rounded every 16
  terms (16 input channels of a convolution). `flush_subnormals` makes float16 subnormals zero, in
  constants, inputs and results.

Neither mode is a copy of Apple's hardware, whose order of summation is not public. They bracket it:
numbers from here are emulated ones and should be called so.

Batches of any size: `batch` tells how a program saved for one image runs on many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ArtifactError, DataError, InputError, UnsupportedOperatorError
from pipeline.core.threads import threads_that_help
from pipeline.emulate import rounding
from pipeline.emulate.beside import even_parts, side_by_side
from pipeline.emulate.kernels import Rounding
from pipeline.emulate.mil.batch import Groups, Values
from pipeline.emulate.mil.constants import Array, TensorType
from pipeline.emulate.mil.operators.table import Result
from pipeline.emulate.mil.plan import Planner, Step
from pipeline.emulate.mil.program import Feature, Operation, Program, read_program
from pipeline.emulate.mil.record import (
    FLOAT16_SMALLEST_NORMAL,
    TensorRange,
    magnitudes,
    owner,
    torch_name,
)

_TORCH_TYPES = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
}
# Measured on care_tiny at 32 and CARE-S0 at 96 pixels: more images at a time save calls, and cost
# as much in caches again from there on.
_CHUNK_PIXELS = 64 * 96 * 96
_CHUNK_LIMIT = 256
_AFTER_SOFTMAX = ("cast", "identity", "reshape", "squeeze", "expand_dims")


class MilExecutor:
    """Evaluates one package; see the module's documentation for what the modes mean.

    Args:
        package: The saved `.mlpackage`.
        precision: Round to float16 where the program says so, or nowhere.
        accumulate: The accumulator of sums of products in `half` mode.
        flush_subnormals: Make float16 subnormals zero, in `half` mode.
        record: Keep the ranges of all tensors, for `ranges`; slows evaluation down.
        chunk: Most images that are evaluated at a time, which bounds the memory; by default as many
            as suit a CPU's caches.

    Raises:
        ArtifactError: The package cannot be read; see `read_program`.
        InputError: Settings that need `half` mode in `float32` mode.
        UnsupportedOperatorError: The program has an operation that is not known; the message names
            it and its line.
    """

    def __init__(
        self,
        package: Path,
        *,
        precision: Literal["float32", "half"] = "half",
        accumulate: Literal["float32", "float16"] = "float32",
        flush_subnormals: bool = False,
        record: bool = False,
        chunk: int | None = None,
    ) -> None:
        half = precision == "half"
        if not half and (accumulate == "float16" or flush_subnormals):
            raise InputError("a float16 accumulator and flushed subnormals need precision='half'")
        self.program: Program = read_program(package)
        self._half = half
        self._flush = flush_subnormals
        self._partial: Rounding | None = self._round if accumulate == "float16" else None
        self._record = record
        self._ranges: dict[str, TensorRange] = {}
        self._plan = Planner(self.program, self._flushed).plan()
        self._input = self._only_input()
        self._chunk = chunk or self._suitable_chunk()
        self._groups = Groups(self._saved_batch())

    @property
    def labels(self) -> tuple[str, ...]:
        """Class labels of a classifier, in the order of its probabilities."""
        return self.program.labels

    @property
    def holds_float16(self) -> bool:
        """Whether any operation gives float16."""
        outputs = (kind for op in self.program.operations for _, kind in op.outputs)
        return any(kind.dtype == "FLOAT16" for kind in outputs)

    def operations(self) -> Counter[str]:
        """How often each kind of operation occurs, without constants."""
        return Counter(op.type for op in self.program.operations if op.type != "const")

    def predict(self, images: Array) -> dict[str, Any]:
        """Evaluate every output of the model.

        Args:
            images: For a model that takes images, pixels of type uint8, (batch, height, width, 3)
                in RGB order, or (batch, height, width, 1) for a greyscale one. Scale and bias are
                operations of the program. Otherwise float32 numbers in the layout of the model's
                input: (batch, channels, height, width).

        Returns:
            An array for each output by its name. A classifier's probabilities are an array
            (batch, classes) in the order of its labels, and its answer a list of labels.

        Raises:
            DataError: The images do not fit the model's input.
            UnsupportedOperatorError: An operation cannot be evaluated on this batch.
        """
        sources = {name: self._source(name) for name in self._output_names()}
        values = self._evaluate(images, list(dict.fromkeys(sources.values())))
        answers: dict[str, Any] = {name: values[source] for name, source in sources.items()}
        if self.program.label_output:
            probabilities = answers[self.program.probabilities_output]
            answers[self.program.label_output] = [
                self.labels[index] for index in probabilities.argmax(1)
            ]
        return answers

    def logits(self, images: Array) -> NDArray[np.float32]:
        """Evaluate what enters the final softmax, or the only output if there is no softmax.

        Args:
            images: As for `predict`.

        Returns:
            float32 (batch, classes).

        Raises:
            InputError: The model has several outputs and is no classifier.
            DataError: The images do not fit the model's input.
            UnsupportedOperatorError: An operation cannot be evaluated on this batch.
        """
        name = self._logits_name()
        value = self._evaluate(images, [name])[name]
        return value.reshape(len(value), -1).astype(np.float32, copy=False)

    def trace(self, images: Array, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Evaluate intermediate tensors.

        Args:
            images: As for `predict`.
            names: Tensors of the program; by default every result that depends on the input.

        Returns:
            The tensors by name, in the order of the program. Keep the batch small: all of them
            are in memory at once.

        Raises:
            InputError: A name that the program does not have.
            DataError: The images do not fit the model's input.
            UnsupportedOperatorError: An operation cannot be evaluated on this batch.
        """
        known = [name for step in self._plan.steps for name, _ in step.operation.outputs]
        wanted = set(known if names is None else names)
        unknown = wanted.difference(known)
        if unknown:
            raise InputError(
                f"{self.program.package} has no tensor '{min(unknown)}' that depends on its input"
            )
        return self._evaluate(images, [name for name in known if name in wanted])

    def ranges(self, owners: Mapping[str, str] | None = None) -> list[TensorRange]:
        """Magnitudes of every floating-point tensor over all images evaluated so far.

        Args:
            owners: Modules of the torch graph's values (`record.module_owners`); an operation
                that the conversion added belongs with its input. Without them the names of
                parameters tell, where they can.

        Returns:
            One entry a tensor, in the order of the program.

        Raises:
            InputError: The executor was made without `record=True`.
        """
        if not self._record:
            raise InputError("ranges are kept only with record=True")
        if owners is not None:
            known = self._known_casts(owners)
            for entry in self._ranges.values():
                entry.module = self._module(known.get(entry.name, entry.name), owners)
        return list(self._ranges.values())

    def go_on(self, ranges: Sequence[TensorRange]) -> None:
        """Take up what another executor of this program had recorded, see `ranges`."""
        self._ranges = {entry.name: entry for entry in ranges}

    def _known_casts(self, owners: Mapping[str, str]) -> dict[str, str]:
        """Casts that bear a value's name, by what they read: results of a fusion have none."""
        casts = (op for op in self.program.operations if op.type == "cast")
        named = ((op.inputs["x"][0], op.outputs[0][0]) for op in casts)
        return {
            str(source): name
            for source, name in named
            if torch_name(name) in owners and torch_name(str(source)) not in owners
        }

    def _module(self, name: str, owners: Mapping[str, str]) -> str:
        """The module of a tensor or, if its operation is not in the torch graph, of its input."""
        while torch_name(name) not in owners:
            producer = self._plan.producers.get(name)
            sources = producer.inputs.values() if producer else ()
            computed = (key for group in sources for key in group if key in self._ranges)
            source = next(computed, None)
            if not isinstance(source, str):
                return ""
            name = source
        return owners[torch_name(name)]

    def _saved_batch(self) -> int | None:
        """The batch size for which the program was saved."""
        return self.program.arguments[0][1].shape[0]

    def _suitable_chunk(self) -> int:
        height, width = self._input.shape[-2:] if len(self._input.shape) > 1 else (1, 1)
        return min(_CHUNK_LIMIT, max(1, _CHUNK_PIXELS // max(1, height * width)))

    def _only_input(self) -> Feature:
        if len(self.program.inputs) != 1 or len(self.program.arguments) != 1:
            raise ArtifactError(
                f"{self.program.package}: the executor takes models with one input, this one has"
                f" {[feature.name for feature in self.program.inputs]}"
            )
        return self.program.inputs[0]

    # Outputs

    def _output_names(self) -> list[str]:
        label = self.program.label_output
        return [feature.name for feature in self.program.outputs if feature.name != label]

    def _source(self, output: str) -> str:
        """The tensor behind an output: a classifier's dictionary holds its probabilities."""
        producer = self._plan.producers.get(output)
        if output == self.program.probabilities_output or (
            producer is not None and producer.type == "classify"
        ):
            classifier = next(op for op in self._plan.producers.values() if op.type == "classify")
            return str(classifier.inputs["probabilities"][0])
        return output

    def _logits_name(self) -> str:
        outputs = self._output_names()
        if len(outputs) != 1:
            raise InputError(
                f"{self.program.package} has the outputs {outputs}: which are the logits is not"
                " known; use predict"
            )
        last = name = self._source(outputs[0])
        while name in self._plan.producers:
            producer = self._plan.producers[name]
            if producer.type == "softmax":
                return str(producer.inputs["x"][0])
            if producer.type not in _AFTER_SOFTMAX:
                break
            name = str(producer.inputs["x"][0])
        return last

    # Evaluation

    def _evaluate(self, images: Array, wanted: Sequence[str]) -> dict[str, Array]:
        self._check_images(images)
        found = self._found(images, wanted)
        return {name: np.concatenate([part[name].numpy() for part in found]) for name in wanted}

    def _found(self, images: Array, wanted: Sequence[str]) -> list[Values]:
        """Evaluate images a few at a time, in every thread of torch where nothing is recorded."""

        def evaluate(part: slice) -> Values:
            with torch.inference_mode():  # of each thread its own
                return self._evaluate_chunk(self._argument(images[part]), wanted)

        values = int(np.prod(images.shape[1:]))
        threads = 1 if self._record else torch.get_num_threads()
        parts = self._parts(len(images), threads, values)
        with threads_that_help(values):
            if threads == 1 or len(parts) == 1:
                return [evaluate(part) for part in parts]
            with side_by_side(min(threads, len(parts))) as pool:
                return list(pool.map(evaluate, parts))

    def _parts(self, images: int, threads: int, values: int) -> list[slice]:
        """Whole batches of the size that was saved, in parts that suit the caches."""
        saved = self._saved_batch() or 1
        groups = -(-images // saved)
        parts = even_parts(groups, max(1, self._chunk // saved), threads, values * saved)
        return [slice(part.start * saved, part.stop * saved) for part in parts]

    def _argument(self, images: Array) -> Tensor:
        """Images as the program's argument."""
        piece = torch.from_numpy(np.array(images))
        if self._input.kind != "image":
            return piece
        planes = piece.permute(0, 3, 1, 2).to(torch.float32)
        return planes.flip(1) if self._input.colour == "BGR" else planes

    def _check_images(self, images: Array) -> None:
        declared = self._plan.types[self.program.arguments[0][0]].shape
        is_image = self._input.kind == "image"
        if is_image:
            _, channels, height, width = declared
            declared = (None, height, width, channels)
        else:
            declared = (None, *declared[1:])
        expected = np.uint8 if is_image else np.float32
        fits = images.ndim == len(declared) and all(
            size in (None, actual) for size, actual in zip(declared, images.shape, strict=True)
        )
        if not fits or images.dtype != expected or len(images) == 0:
            sizes = ", ".join("n" if size is None else str(size) for size in declared)
            raise DataError(
                f"input '{self._input.name}' takes {np.dtype(expected).name} ({sizes}), not"
                f" {images.dtype} {images.shape}"
            )

    def _evaluate_chunk(self, images: Tensor, wanted: Sequence[str]) -> Values:
        def evaluate(group: Tensor) -> tuple[Values, Values]:
            return self._evaluate_group(group, wanted)

        found, measured = self._groups.run(evaluate, images)
        for name, of_groups in measured.items():
            self._observe(name, of_groups)
        return found

    def _evaluate_group(self, images: Tensor, wanted: Sequence[str]) -> tuple[Values, Values]:
        """Evaluate images of the batch size that was saved: results and magnitudes of tensors.

        `torch.vmap` calls this with tensors that stand for all groups: it may look at their shapes,
        not at their values.
        """
        name, kind = self.program.arguments[0]
        values = {name: self._stored(images, kind, selects=False)}
        found = {key: values[key] for key in wanted if key in values}
        measured: Values = {}
        for step in self._plan.steps:
            if len(found) == len(wanted):
                break
            values.update(self._run(step, values, measured))
            found.update((key, values[key]) for key, _ in step.operation.outputs if key in wanted)
            for used in step.last_uses:
                values.pop(used, None)
        return found, measured

    def _run(self, step: Step, values: Mapping[str, Tensor], measured: Values) -> Values:
        operation = step.operation
        computed = self._compute(step, values)
        results = computed if isinstance(computed, tuple) else (computed,)
        stored = {}
        for (name, kind), result in zip(operation.outputs, results, strict=True):
            _check_shape(operation, result, kind)
            if self._record and step.batched and result.is_floating_point():
                measured[name] = magnitudes(result)
            stored[name] = self._stored(result, kind, selects=step.operator.selects)
        return stored

    def _compute(self, step: Step, values: Mapping[str, Tensor]) -> Result:
        operation = step.operation
        arguments = dict(step.constants)
        for parameter, names in step.wired.items():
            found = tuple(
                values[name] if name in values else self._plan.constants[name] for name in names
            )
            arguments[parameter] = found if parameter == "values" else found[0]
        if step.operator.sums and self._partial and operation.outputs[0][1].dtype == "FLOAT16":
            arguments["partial"] = self._partial
        try:
            return step.operator.evaluate(**arguments)
        except UnsupportedOperatorError as error:
            raise UnsupportedOperatorError(
                f"{operation.where} is not supported: {error}"
            ) from error
        except (ArithmeticError, RuntimeError, ValueError, IndexError, TypeError) as error:
            first_line = str(error).partition("\n")[0]
            raise UnsupportedOperatorError(
                f"{operation.where} cannot be evaluated: {first_line}"
            ) from error

    def _observe(self, name: str, of_groups: Tensor) -> None:
        if name not in self._ranges:
            operation = self._plan.producers[name]
            self._ranges[name] = TensorRange(name, operation.type, operation.line, owner(operation))
        for measured in of_groups:
            self._ranges[name].add(measured)

    # Rounding

    def _stored(self, value: Tensor, kind: TensorType, *, selects: bool) -> Tensor:
        """Convert a result to its declared type, float16 held in float32."""
        dtype = _TORCH_TYPES.get(kind.dtype)
        if dtype is None:
            raise UnsupportedOperatorError(
                f"{self.program.package}: results of type {kind.dtype} are not supported"
            )
        if dtype == torch.float16 and self._half and not selects:
            return self._round(value)
        return value.to(rounding.storage(dtype))

    def _round(self, value: Tensor) -> Tensor:
        return self._flushed(rounding.round_to(value, torch.float16))

    def _flushed(self, value: Tensor) -> Tensor:
        if not self._flush:
            return value
        return value.masked_fill(value.abs() < FLOAT16_SMALLEST_NORMAL, 0.0)


def _check_shape(operation: Operation, value: Tensor, kind: TensorType) -> None:
    """Compare the shape of a result with what the program declares.

    Raises:
        UnsupportedOperatorError: They differ.
    """
    fits = len(kind.shape) == value.ndim and all(
        size in (None, actual) for size, actual in zip(kind.shape, value.shape, strict=True)
    )
    if not fits:
        declared = ["n" if size is None else size for size in kind.shape]
        raise UnsupportedOperatorError(
            f"{operation.where} gives shape {list(value.shape)} where {declared} is declared"
        )
