"""Tensors of more than five axes in at most five, which is all that Core ML has.

A tensor's elements in their order can be read with any axes whose sizes have the same product. So
a tensor with many axes is kept as one with few and the same elements, and each operation on it is
written for these: a permutation as exchanges of neighbouring blocks, what works along one axis with
that axis between all before it and all behind it, what works on each element with neighbouring axes
merged. coremltools does so itself for a reshape, a permutation and a reshape that follow each
other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.targets.coreml.nodes import kind_of, made

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

MOST = 5
"""Axes that Core ML's tensors may have."""

Shape = tuple[int, ...]

_CONVERTED = {"view", "_unsafe_view", "reshape", "permute", "transpose", "clone"}
"""What coremltools writes with fewer axes by itself."""


def fold_axes(program: ExportedProgram) -> int:
    """Write what has more axes than Core ML's tensors with fewer.

    A part of the graph that does something else with many axes than is known here stays as it is.

    Args:
        program: A program of ATen operations; changed in place.

    Returns:
        How many tensors had too many axes.
    """
    count = 0
    for part in _parts(program.graph.nodes):
        readers = [user for node in part for user in node.users if user not in part]
        kinds = {kind_of(node) for node in (*part, *readers)}
        if kinds <= _CONVERTED or not all(map(_is_known, (*part, *readers))):
            continue
        folding = _Folding(program, part)
        for node in list(program.graph.nodes):
            if node in part or node in readers:
                _WRITERS[kind_of(node)](folding, node)
        count += len(part)
    return count


def _shape(value: Any) -> Shape:
    """Of a node's value; () of a number."""
    held: Any = getattr(value, "meta", {}).get("val")
    return tuple(held.shape) if hasattr(held, "shape") else ()


def _is_wide(node: Node) -> bool:
    """Whether it has too many axes, or its parts are taken from what has."""
    if kind_of(node) == "unbind":
        return _is_wide(node.all_input_nodes[0])
    return len(_shape(node)) > MOST


def _parts(nodes: Iterable[Node]) -> list[set[Node]]:
    """Nodes with too many axes, those that read each other together."""
    found: list[set[Node]] = []
    for node in filter(_is_wide, nodes):
        joined = [part for part in found if not part.isdisjoint(node.all_input_nodes)]
        found = [part for part in found if part not in joined]
        found.append({node}.union(*joined))
    return found


def _is_known(node: Node) -> bool:
    """Whether an operation that writes or reads many axes can be written with fewer."""
    kind = kind_of(node)
    if kind not in _WRITERS or node.op != "call_function":
        return False
    if kind == "unbind":
        return all(kind_of(user) == "getitem" for user in node.users)
    if kind == "getitem":
        return kind_of(node.all_input_nodes[0]) == "unbind"
    if kind == "softmax":
        return len(node.args) == 2
    if kind in _OVER:
        axes = _axes(node) if len(node.args) > 1 and node.args[1] else []
        return bool(axes) and not node.kwargs and axes == list(range(axes[0], axes[-1] + 1))
    if kind in _BETWEEN:
        return len(_merged(_shape(node), [_shape(each) for each in node.args[:2]])) <= MOST
    return True


def _merged(whole: Shape, given: Sequence[Shape]) -> list[tuple[int, Shape]]:
    """Axes of what broadcasts, neighbours merged where each operand has all of both or none.

    Args:
        whole: Of the result.
        given: Of the operands.

    Returns:
        By axis, its size in the result, and in each operand.
    """
    padded = [(1,) * (len(whole) - len(shape)) + shape for shape in given]
    found: list[tuple[int, Shape]] = []
    for size, *own in zip(whole, *padded, strict=True):
        if size == 1:
            continue
        if found and all(
            (one == 1) == (other == 1) for one, other in zip(found[-1][1], own, strict=True)
        ):
            before, theirs = found.pop()
            size *= before
            own = [one * other for one, other in zip(theirs, own, strict=True)]
        found.append((size, tuple(own)))
    return found or [(1, (1,) * len(given))]


class _Folding:
    """A part of a graph while it is written with fewer axes.

    Args:
        program: Whose graph it is.
        part: Nodes with too many axes.

    Attributes:
        rows: By node with too many axes, one with few that holds the same elements in their order.
    """

    def __init__(self, program: ExportedProgram, part: set[Node]) -> None:
        self.signature = program.graph_signature
        self.part = part
        self.rows: dict[Node, Node] = {}

    def of(self, node: Node) -> Node:
        """What holds a node's elements in their order."""
        return self.rows.get(node, node)

    def becomes(self, node: Node, rows: Node) -> None:
        """Let a node be what holds its elements; what has few axes gets its shape."""
        if node in self.part:
            self.rows[node] = rows
            return
        narrow = _reshaped(node, rows, _shape(node))
        node.replace_all_uses_with(narrow)
        self.signature.replace_all_uses(node.name, narrow.name)


def _reshaped(node: Node, rows: Node, shape: Sequence[int]) -> Node:
    import torch

    if _shape(rows) == tuple(shape):
        return rows
    return made(node, torch.ops.aten.reshape.default, rows, list(shape))


def _as_it_is(folding: _Folding, node: Node) -> None:
    """The same elements in their order."""
    folding.becomes(node, folding.of(node.all_input_nodes[0]))


def _permute(folding: _Folding, node: Node) -> None:
    dims: Any = node.args[1]
    _permuted(folding, node, [axis % len(dims) for axis in dims])


def _transpose(folding: _Folding, node: Node) -> None:
    order = list(range(len(_shape(node))))
    dims: Any = node.args[1:3]
    one, other = (axis % len(order) for axis in dims)
    order[one], order[other] = order[other], order[one]
    _permuted(folding, node, order)


def _permuted(folding: _Folding, node: Node, order: Sequence[int]) -> None:
    """Exchange neighbouring blocks until few enough axes are left to be permuted at once."""
    import torch

    permute = torch.ops.aten.permute.default
    source = node.all_input_nodes[0]
    rows, sizes = folding.of(source), _shape(source)
    sizes, order = _together(sizes, order)
    while len(sizes) > MOST:
        begin = next(i for i, axis in enumerate(order) if i != axis)
        end = order[begin]
        before, first, behind = sizes[:begin], sizes[begin:end], sizes[end + 1 :]
        blocks = [math.prod(before), math.prod(first), sizes[end], math.prod(behind)]
        rows = made(node, permute, _reshaped(node, rows, blocks), [0, 2, 1, 3])
        moved = [*range(begin), end, *range(begin, end), *range(end + 1, len(sizes))]
        sizes = tuple(sizes[axis] for axis in moved)
        sizes, order = _together(sizes, [moved.index(axis) for axis in order])
    if len(sizes) > 1:
        rows = made(node, permute, _reshaped(node, rows, sizes), list(order))
    folding.becomes(node, rows)


def _together(sizes: Shape, order: Sequence[int]) -> tuple[Shape, list[int]]:
    """A permutation without axes of size 1, those that stay neighbours merged."""
    kept = [axis for axis in order if sizes[axis] != 1]
    runs: list[list[int]] = []
    present = sorted(kept)
    following = dict(itertools.pairwise(present))
    for axis in kept:
        if runs and following.get(runs[-1][-1]) == axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    lying = sorted(runs)
    merged = tuple(math.prod(sizes[axis] for axis in run) for run in lying)
    return merged, [lying.index(run) for run in runs]


def _around(folding: _Folding, node: Node, first: int, last: int) -> Node:
    """A node's input as (all before, axes from `first` to `last`, all behind)."""
    source = node.all_input_nodes[0]
    shape = _shape(source)
    parts = shape[:first], shape[first : last + 1], shape[last + 1 :]
    return _reshaped(node, folding.of(source), [math.prod(part) for part in parts])


def _axis(node: Node) -> int:
    """The axis that a node's second argument names; the first if there is none."""
    stated: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(stated) % len(_shape(node.all_input_nodes[0]))


def _axes(node: Node) -> list[int]:
    """The axes that a node's second argument names, in order."""
    stated: Any = node.args[1]
    axes = stated if isinstance(stated, (list, tuple)) else [stated]
    return sorted(axis % len(_shape(node.all_input_nodes[0])) for axis in axes)


def _over(folding: _Folding, node: Node) -> None:
    """One value of many along neighbouring axes; whether the axes are kept shows in the shape."""
    axes = _axes(node)
    rows = _around(folding, node, axes[0], axes[-1])
    folding.becomes(node, made(node, node.target, rows, [1]))


def _unbind(folding: _Folding, node: Node) -> None:
    """Nothing: each of its parts is taken from its input."""


def _getitem(folding: _Folding, node: Node) -> None:
    _selected(folding, node, node.all_input_nodes[0], node.args[1])


def _select(folding: _Folding, node: Node) -> None:
    _selected(folding, node, node, node.args[2])


def _selected(folding: _Folding, node: Node, along: Node, index: Any) -> None:
    import torch

    with_axis = _around(folding, along, _axis(along), _axis(along))
    folding.becomes(node, made(node, torch.ops.aten.select.int, with_axis, 1, int(index)))


def _softmax(folding: _Folding, node: Node) -> None:
    rows = _around(folding, node, _axis(node), _axis(node))
    folding.becomes(node, made(node, node.target, rows, 1, **node.kwargs))


def _linear(folding: _Folding, node: Node) -> None:
    last = len(_shape(node)) - 1
    rows = _around(folding, node, last, last)
    flat = _reshaped(node, rows, _shape(rows)[:2])
    folding.becomes(node, made(node, node.target, flat, *node.args[1:]))


def _each(folding: _Folding, node: Node) -> None:
    """An operation on each element."""
    rows = folding.of(node.all_input_nodes[0])
    folding.becomes(node, made(node, node.target, rows, *node.args[1:], **node.kwargs))


def _between(folding: _Folding, node: Node) -> None:
    """An operation on two tensors' elements, or on a tensor's and a number."""
    operands: Any = node.args[:2]
    axes = _merged(_shape(node), [_shape(each) for each in operands])
    given = [
        _reshaped(node, folding.of(each), [own[i] for _, own in axes]) if _shape(each) else each
        for i, each in enumerate(operands)
    ]
    folding.becomes(node, made(node, node.target, *given, **node.kwargs))


_BETWEEN = ("add", "sub", "rsub", "mul", "div", "maximum", "minimum")

_OVER = ("amax", "amin", "mean", "sum")

_WRITERS: dict[str, Callable[[_Folding, Node], None]] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "clone", "unsqueeze", "squeeze"), _as_it_is
    ),
    **dict.fromkeys(_BETWEEN, _between),
    **dict.fromkeys(_OVER, _over),
    **dict.fromkeys(("exp", "gelu", "neg", "relu", "sigmoid", "silu", "tanh"), _each),
    "getitem": _getitem,
    "linear": _linear,
    "permute": _permute,
    "select": _select,
    "softmax": _softmax,
    "transpose": _transpose,
    "unbind": _unbind,
}
