"""Evaluating a program that was saved for one batch size on another.

A converter writes the batch size into the program: in declared shapes, in the targets of
`reshape`, in the ends of slices. The rule here: in every tensor that depends on the input, images
vary slowest. A declared leading size n stands for n / (saved batch) rows of each image, in the
order of the images. So a tensor of declared shape (1, 64, 49) is (batch, 64, 49), and after a
reshape to (64, 49) it is (64 batch, 49).

- The leading size of a constant reshape target, and of a slice that takes the whole leading axis,
  is scaled with the batch. Sizes that the program computes from its input (`shape`) are right
  already.
- An operation that names axis 0 as its axis (concatenation, reduction, transposition …) would mix
  images, or split what belongs to one: it is refused, not guessed at.
- After each operation the shape must be the declared one, its leading size scaled. What breaks the
  rule in another way, such as a product over rows of different images, is found there.

A program that is refused runs on batches of its own size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate.mil.constants import TensorType
from pipeline.emulate.mil.operators.table import ints
from pipeline.emulate.mil.program import Operation

_LEADING_SIZE = {"reshape": "shape", "slice_by_size": "size", "slice_by_index": "end"}
"""Operations whose constant parameter holds the batch size, and that parameter."""

# The operations' parameters that name one axis, several, or all in a new order.
_AXIS_PARAMETERS = ("axis", "axes", "perm")
_ALL_AXES_BY_DEFAULT = ("reduce_", "layer_norm", "reverse")
_FIRST_AXIS_BY_DEFAULT = ("cumsum", "gather")


class Batch:
    """How the sizes of one evaluation relate to those that the program declares.

    Args:
        images: Images that are evaluated together.
        saved: The batch size for which the program was saved; None if it leaves it open.
    """

    def __init__(self, images: int, saved: int | None) -> None:
        self.images = images
        self.saved = saved or images

    @property
    def same(self) -> bool:
        """Whether the program runs just as it was saved."""
        return self.images == self.saved

    def scale(self, leading: int) -> int | None:
        """The leading size for a declared one; None if it is no whole number."""
        size, rest = divmod(leading * self.images, self.saved)
        return None if rest else size

    def rescale(
        self,
        operation: Operation,
        constants: Mapping[str, object],
        types: Mapping[str, TensorType],
    ) -> dict[str, Tensor]:
        """Constants of an operation on batched values that must follow the batch size.

        Args:
            operation: The operation.
            constants: Its constant inputs.
            types: Declared types of all values.

        Raises:
            UnsupportedOperatorError: The operation works on the leading axis in a way that has no
                unambiguous meaning for another batch size.
        """
        if _works_on_leading_axis(operation, constants, types):
            raise self.refusal(operation, "works along the batch axis")
        parameter = _LEADING_SIZE.get(operation.type)
        value = constants.get(parameter or "")
        if parameter is None or not isinstance(value, Tensor):
            return {}
        if operation.type != "reshape" and not _takes_whole(operation, constants, types):
            raise self.refusal(operation, "slices the batch axis")
        sizes = ints(value)
        if sizes[0] <= 0:
            return {}
        leading = self.scale(sizes[0])
        if leading is None:
            raise self.refusal(operation, "has a size that does not scale")
        return {parameter: torch.tensor([leading, *sizes[1:]])}

    def check(self, operation: Operation, value: Tensor, kind: TensorType, batched: bool) -> None:
        """Compare the shape of a result with what the program declares.

        Raises:
            UnsupportedOperatorError: They differ.
        """
        if not (batched or self.same):
            return  # sizes that the program computes from its input: declared for another batch
        expected = list(kind.shape)
        if batched and expected and expected[0] is not None:
            expected[0] = self.scale(expected[0])
        fits = len(expected) == value.ndim and all(
            size is None or size == actual
            for size, actual in zip(expected, value.shape, strict=True)
        )
        if not fits:
            raise self.refusal(
                operation, f"gives shape {list(value.shape)} where {expected} is declared"
            )

    def refusal(self, operation: Operation, reason: str) -> UnsupportedOperatorError:
        """The error that says why this operation cannot be evaluated."""
        message = f"{operation.where} {reason}"
        if not self.same:
            message += f"; evaluate batches of {self.saved}, for which the program was saved"
        return UnsupportedOperatorError(message)


def _takes_whole(
    operation: Operation, constants: Mapping[str, object], types: Mapping[str, TensorType]
) -> bool:
    """Whether a slice takes the whole leading axis."""
    begin = constants.get("begin")
    begin_mask, end_mask = constants.get("begin_mask"), constants.get("end_mask")
    stride, squeezed = constants.get("stride"), constants.get("squeeze_mask")
    parameter = constants[_LEADING_SIZE[operation.type]]
    assert isinstance(parameter, Tensor)
    from_start = _first(begin_mask) or _first(begin, 1) == 0
    (source,) = operation.inputs["x"]
    size = types[source].shape[0] if isinstance(source, str) else None
    to_end = _first(end_mask) or _first(parameter) in (size, -1 if "size" in constants else size)
    return bool(from_start and to_end and _first(stride, 1) == 1 and not _first(squeezed))


def _first(constant: object, default: int = 0) -> int:
    return ints(constant)[0] if isinstance(constant, Tensor) else default


def _works_on_leading_axis(
    operation: Operation, constants: Mapping[str, object], types: Mapping[str, TensorType]
) -> bool:
    """Whether an operation names axis 0 of a batched value as an axis to work along."""
    name = operation.type
    axes: list[int] | None = None
    for parameter in _AXIS_PARAMETERS:
        value = constants.get(parameter)
        if isinstance(value, Tensor):
            axes = ints(value)
    if axes is None:
        return name.startswith(_ALL_AXES_BY_DEFAULT) or name in _FIRST_AXIS_BY_DEFAULT
    if name == "transpose":
        return axes[0] != 0
    source = next(
        (operation.inputs[key][0] for key in ("x", "values", "input") if key in operation.inputs),
        None,
    )
    inner = types[source] if isinstance(source, str) and source in types else None
    outer = types[operation.outputs[0][0]]
    kind = outer if name in ("expand_dims", "stack") or inner is None else inner
    return any(axis % max(1, len(kind.shape)) == 0 for axis in axes)
