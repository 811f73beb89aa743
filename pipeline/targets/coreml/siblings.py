"""Depthwise convolutions side by side become one: a pass over coremltools' programs.

A network that cuts its channels in parts, mixes each with a depthwise convolution of its own size
and joins them again, costs a device a call, a part of the split and a part of the join for each.
Where two such parts lie next to each other before and after, one depthwise convolution computes
both: the smaller kernel gets a margin of zeros, which changes no number. What it costs are
multiplications by these zeros, about 1 % of CARE-S0's; where more than half of the numbers would be
such, the pass leaves the pair alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NAME = "care_deploy::merge_depthwise"

_BEFORE = "common::dedup_op_and_var_names"
"""Follows all fusions of coremltools, and precedes the casts to float16."""


def pipeline() -> Any:
    """Coremltools' own passes, and this one."""
    import coremltools as ct

    _register()
    passes = ct.PassPipeline()
    passes.insert_pass(passes.passes.index(_BEFORE), NAME)
    return passes


@functools.cache
def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    namespace, name = NAME.split("::")

    @register_pass(namespace=namespace, name=name, override=True)
    class MergeDepthwise(AbstractGraphPass):  # type: ignore[misc]
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                with function:
                    for join in list(function.operations):
                        _merge_all(join, function)

    assert MergeDepthwise is not None


def _merge_all(join: Any, block: Any) -> None:
    """Merge pairs before a concatenation until none is left; each merge makes a new one."""
    while join.op_type == "concat" and (pair := next(_pairs(join), None)) is not None:
        join = _merge(join, pair, block)


def _pairs(join: Any) -> Iterator[int]:
    """Places of a concatenation's values which one convolution can compute with the next value."""
    if join.axis.val != 1 or (join.interleave is not None and join.interleave.val):
        return
    for place, (a, b) in enumerate(zip(join.values, join.values[1:], strict=False)):
        first, second = a.op, b.op
        if not (_is_depthwise(first, join) and _is_depthwise(second, join)):
            continue
        split, at = first.x.op, _part(first)
        if split is None or split is not second.x.op or at is None or _part(second) != at + 1:
            continue
        if _joined(first, second) is not None:
            yield place


def _is_depthwise(conv: Any, join: Any) -> bool:
    """A depthwise convolution in two dimensions of which only `join` takes the result."""
    return (
        conv is not None
        and conv.op_type == "conv"
        and conv.weight.val is not None
        and conv.weight.val.ndim == 4
        and conv.weight.val.shape[:2] == (conv.groups.val, 1)
        and conv.pad_type.val in ("custom", "valid")
        and conv.outputs[0].child_ops == [join]
    )


def _part(conv: Any) -> int | None:
    """Which part of a split along the channels a convolution takes, if it alone takes that."""
    split = conv.x.op
    if split is None or split.op_type != "split" or split.axis.val != 1:
        return None
    return split.outputs.index(conv.x) if conv.x.child_ops == [conv] else None


def _joined(first: Any, second: Any) -> tuple[Array, Array] | None:
    """Weight and padding of one convolution for two; None where there is no sensible one."""
    if any(
        list(getattr(first, name).val) != list(getattr(second, name).val)
        for name in ("strides", "dilations")
    ):
        return None
    weights = [conv.weight.val for conv in (first, second)]
    sides = np.maximum(weights[0].shape[2:], weights[1].shape[2:])
    padded, pads = [], []
    for conv, weight in zip((first, second), weights, strict=True):
        margin, rest = np.divmod(sides - weight.shape[2:], 2)
        if rest.any():
            return None
        padded.append(np.pad(weight, ((0, 0), (0, 0), *((side, side) for side in margin))))
        own = conv.pad.val if conv.pad_type.val == "custom" else np.zeros(4, np.int32)
        pads.append(own + np.repeat(margin * conv.dilations.val, 2))
    joined = np.concatenate(padded)
    if (pads[0] != pads[1]).any() or joined.size > 2 * sum(weight.size for weight in weights):
        return None
    return joined, pads[0].astype(np.int32)


def _merge(join: Any, place: int, block: Any) -> Any:
    """Replace two convolutions, their split and their concatenation; returns the new one."""
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    first, second = (value.op for value in join.values[place : place + 2])
    split, at = first.x.op, _part(first)
    assert at is not None
    found = _joined(first, second)
    assert found is not None
    weight, pad = found
    sizes = [part.shape[1] for part in split.outputs]
    sizes[at : at + 2] = [sum(sizes[at : at + 2])]
    if len(sizes) > 1:
        parts = mb.split(x=split.x, split_sizes=sizes, axis=1, name=split.name, before_op=split)
    else:
        parts = [split.x]  # all parts became one: there is nothing left to split
    kept = [part for i, part in enumerate(split.outputs) if i != at + 1]
    for old, new in zip(kept, parts, strict=True):
        if old is not first.x:
            block.replace_uses_of_var_after_op(anchor_op=split, old_var=old, new_var=new)
    mixed = mb.conv(
        x=parts[at],
        weight=weight,
        bias=np.concatenate([_bias(first), _bias(second)]),
        strides=first.strides.val,
        pad_type="custom",
        pad=pad,
        dilations=first.dilations.val,
        groups=len(weight),
        name=f"{first.name}_{second.name}",
        before_op=join,
    )
    values = [*join.values[:place], mixed, *join.values[place + 2 :]]
    # With a single value it stays for its name; coremltools takes it out.
    joined = mb.concat(values=values, axis=1, name=join.name, before_op=join)
    block.replace_uses_of_var_after_op(anchor_op=join, old_var=join.outputs[0], new_var=joined)
    block.remove_ops([join, first, second, split])
    return joined.op


def _bias(conv: Any) -> Array:
    if conv.bias is not None:
        bias: Array = conv.bias.val
        return bias
    return np.zeros(len(conv.weight.val), conv.weight.val.dtype)
