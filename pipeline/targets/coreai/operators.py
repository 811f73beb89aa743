"""The operations of Core AI programs on torch tensors.

What they mean is written in the docstrings of `coreai._compiler.dialects._coreai_ops_gen`, a class
each. Floating-point tensors arrive as float32; results are not yet rounded to their declared type:
that is the executor's step. Shapes, axes and paddings are constants of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UnsupportedOperatorError

Result = Tensor | tuple[Tensor, ...]
Evaluate = Callable[[Sequence[Tensor], Mapping[str, str]], Result]


def _integers(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1).tolist()]


def _integer(value: Tensor) -> int:
    return _integers(value)[0]


def _one(function: Callable[[Tensor], Tensor]) -> Evaluate:
    return lambda x, attributes: function(x[0])


def _two(function: Callable[[Tensor, Tensor], Tensor]) -> Evaluate:
    return lambda x, attributes: function(x[0], x[1])


def _conv2d(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, weight, stride, dilation, groups = x
    return F.conv2d(
        image,
        weight,
        stride=_integers(stride),
        dilation=_integers(dilation),
        groups=_integer(groups),
    )


def _pad(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, padding, value = x
    mode = attributes.get("padding_mode", "constant")
    if "constant" not in mode:
        raise UnsupportedOperatorError(f"pad with {mode} is not emulated")
    before_after = _integers(padding)
    # torch names the last axis first.
    sizes = [size for axis in range(image.ndim)[::-1] for size in before_after[2 * axis :][:2]]
    return F.pad(image, sizes, value=float(value))


def _split(x: Sequence[Tensor], attributes: Mapping[str, str]) -> tuple[Tensor, ...]:
    image, sizes, axis = x
    section = _integers(sizes) if sizes.ndim else _integer(sizes)
    return tuple(torch.split(image, section, dim=_integer(axis)))


def _slice(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, *rest = x
    starts, ends, steps = (_integers(part) for part in rest)
    if min(steps) < 1:
        raise UnsupportedOperatorError("slice with a negative step is not emulated")
    return image[tuple(map(slice, starts, ends, steps))]


def _gelu(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    mode = attributes.get("approximate", "none")
    if mode == "sigmoid":
        return x[0] * torch.sigmoid(1.702 * x[0])
    return F.gelu(x[0], approximate=mode)


def _max_pool(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, kernel, stride, dilation, ceil = x
    return F.max_pool2d(
        image,
        _integers(kernel),
        _integers(stride),
        dilation=_integers(dilation),
        ceil_mode=bool(ceil),
    )


def _sum_pool(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, kernel, stride, dilation = x
    if set(_integers(dilation)) != {1}:
        raise UnsupportedOperatorError("sum_pool_2d with a dilation is not emulated")
    return F.avg_pool2d(image, _integers(kernel), _integers(stride), divisor_override=1)


def _reduce(function: Callable[..., Tensor]) -> Evaluate:
    def evaluate(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
        return function(x[0], dim=_integers(x[1]), keepdim=True)

    return evaluate


def _argmax(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    # torch leaves open which of several largest values it means; Core AI takes the first.
    axis = _integer(x[1])
    largest = x[0] == x[0].amax(axis, keepdim=True)
    return largest.to(torch.uint8).argmax(axis, keepdim=True)


def _sorted(which: int) -> Evaluate:
    """Values (0) or places (1) in order. Of equal ones the first comes first."""

    def evaluate(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
        image, axis, descending, _ = x
        parts: tuple[Tensor, Tensor] = torch.sort(
            image, dim=_integer(axis), descending=bool(descending), stable=True
        )
        return parts[which]

    return evaluate


def _gather(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, indices, axis = x
    return torch.gather(image, _integer(axis), indices.long())


def _expand_dims(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    image, rank = x[0], x[0].ndim + x[1].numel()
    for axis in sorted(axis % rank for axis in _integers(x[1])):
        image = image.unsqueeze(axis)
    return image


def _shrink_dims(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    axes = {axis % x[0].ndim for axis in _integers(x[1])}
    return x[0].reshape([size for axis, size in enumerate(x[0].shape) if axis not in axes])


def _blockwise(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat a value for each block of a larger tensor."""
    for axis, size in enumerate(shape):
        values = values.repeat_interleave(size // values.shape[axis], dim=axis)
    return values


def _shift_scale(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    data, scale, before, after = x
    scale, before, after = (_blockwise(part, data.shape) for part in (scale, before, after))
    return scale.float() * (data.float() - before.float()) + after.float()


def _lookup(x: Sequence[Tensor], attributes: Mapping[str, str]) -> Tensor:
    indices, table, _ = x
    entries, vector = table.shape[-2:]
    if vector != 1:
        raise UnsupportedOperatorError("palettes of vectors are not emulated")
    blocks = table.shape[:-2]
    which = torch.arange(math.prod(blocks)).reshape(blocks)
    return table.reshape(-1)[_blockwise(which, indices.shape) * entries + indices.long()]


OPERATORS: Mapping[str, Evaluate] = {
    "abs": _one(torch.abs),
    "add": _two(torch.add),
    "and": _two(torch.logical_and),
    "argmax": _argmax,
    "argsort": _sorted(1),
    "batch_matmul": _two(torch.matmul),
    "bitwise_and": _two(torch.bitwise_and),
    "bitwise_or": _two(torch.bitwise_or),
    "blockwise_shift_scale": _shift_scale,
    "broadcast_to": lambda x, attributes: x[0].broadcast_to(_integers(x[1])),
    "cast": _one(lambda x: x),
    "concat": lambda x, attributes: torch.cat(list(x[1:]), dim=_integer(x[0])),
    "conv2d": _conv2d,
    "cos": _one(torch.cos),
    "divide": _two(torch.div),
    "equal": _two(torch.eq),
    "erf": _one(torch.erf),
    "exp": _one(torch.exp),
    "expand_dims": _expand_dims,
    "gather_along_axis": _gather,
    "gelu": _gelu,
    "greater": _two(torch.gt),
    "log": _one(torch.log),
    "lut_to_dense": _lookup,
    "max_pool_2d": _max_pool,
    "maximum": _two(torch.maximum),
    "minimum": _two(torch.minimum),
    "mul": _two(torch.mul),
    "not": _one(torch.logical_not),
    "not_equal": _two(torch.ne),
    "or": _two(torch.logical_or),
    "pad": _pad,
    "pow": _two(torch.pow),
    "reduce_max": _reduce(torch.amax),
    "reduce_mean": _reduce(torch.mean),
    "reduce_min": _reduce(torch.amin),
    "reduce_sum": _reduce(torch.sum),
    "relu": _one(torch.relu),
    "reshape": lambda x, attributes: x[0].reshape(_integers(x[1])),
    "rsqrt": _one(torch.rsqrt),
    "shrink_dims": _shrink_dims,
    "sigmoid": _one(torch.sigmoid),
    "silu": _one(F.silu),
    "sin": _one(torch.sin),
    "slice": _slice,
    "sort": _sorted(0),
    "softmax": lambda x, attributes: torch.softmax(x[0], dim=_integer(x[1])),
    "split": _split,
    "sqrt": _one(torch.sqrt),
    "sub": _two(torch.sub),
    "sum_pool_2d": _sum_pool,
    "tanh": _one(torch.tanh),
    "transpose": lambda x, attributes: x[0].permute(_integers(x[1])),
    "where": lambda x, attributes: torch.where(x[0].bool(), x[1], x[2]),
}
"""By the operation's kind, see `program.Operation`."""

MOVES = frozenset(
    {"broadcast_to", "concat", "expand_dims", "pad", "reshape", "shrink_dims", "slice", "split"}
    | {"transpose", "max_pool_2d", "maximum", "minimum", "relu", "where", "reduce_max"}
    | {"reduce_min", "sort", "gather_along_axis"}
)
"""Operations whose results are among the values of their inputs: there is nothing to round."""
