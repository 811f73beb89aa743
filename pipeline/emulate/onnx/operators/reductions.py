"""Reductions, running sums, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.emulate import kernels
from pipeline.emulate.onnx.graph import Node
from pipeline.emulate.onnx.operators.table import Call, fixed, ints, like, operator

_KINDS = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceSumSquare": "sum_square",
    "ReduceLogSum": "log_sum",
    "ReduceLogSumExp": "log_sum_exp",
}


def _register_reductions() -> None:
    for name, kind in _KINDS.items():

        def reduce(call: Call, x: Tensor, axes: Tensor | None = None, kind: str = kind) -> Tensor:
            # The axes were an attribute before they became an input (opset 13 and 18).
            chosen = ints(axes, call.attribute("axes", []))
            if not chosen:
                if call.attribute("noop_with_empty_axes", 0):
                    return kernels.reduce(kind, x, [], keep=True)
                chosen = list(range(x.ndim))
            return kernels.reduce(kind, x, chosen, keep=bool(call.attribute("keepdims", 1)))

        operator(name, exact=kind in ("max", "min"))(reduce)


_register_reductions()


@operator("ArgMax", result=fixed(torch.int64), exact=True)
def _argmax(call: Call, x: Tensor) -> Tensor:
    return _place(call, x, torch.argmax)


@operator("ArgMin", result=fixed(torch.int64), exact=True)
def _argmin(call: Call, x: Tensor) -> Tensor:
    return _place(call, x, torch.argmin)


def _place(call: Call, x: Tensor, find: Callable[..., Tensor]) -> Tensor:
    axis, keep = call.attribute("axis", 0), bool(call.attribute("keepdims", 1))
    if not call.attribute("select_last_index", 0):
        return find(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)


@operator("CumSum")
def _cumulative_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _running(call, x, int(axis), torch.cumsum, 0)


@operator("CumProd")
def _cumulative_product(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _running(call, x, int(axis), torch.cumprod, 1)


def _running(call: Call, x: Tensor, axis: int, run: Callable[..., Tensor], start: int) -> Tensor:
    """A running result; an exclusive one is that of what comes before, not a difference."""
    backwards = call.attribute("reverse", 0)
    x = x.flip(axis) if backwards else x
    if call.attribute("exclusive", 0):
        first = torch.full_like(x.narrow(axis, 0, min(1, x.shape[axis])), start)
        x = torch.cat([first, x.narrow(axis, 0, max(0, x.shape[axis] - 1))], axis)
    result = run(x, axis)
    return result.flip(axis) if backwards else result


def _with_places(node: Node, types: Sequence[torch.dtype | None]) -> tuple[torch.dtype, ...]:
    return like(0)(node, types), torch.int64


@operator("TopK", result=_with_places, exact=True)
def _top_k(call: Call, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    axis, largest = call.attribute("axis", -1), bool(call.attribute("largest", 1))
    # A stable sort: of equal values that of the lower index comes first.
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, int(count)), places.narrow(axis, 0, int(count))
