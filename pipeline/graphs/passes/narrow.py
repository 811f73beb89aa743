"""Depthwise convolutions over parts narrower than a block of channels, done on whole blocks.

A mixer that splits 32 channels in four parts of 8 wastes half of every block of 16 and reorders
around each part. This pass computes the mixer on all channels instead: every block of channels gets
one depthwise convolution that holds the filters of its parts, each in the middle of the largest one
with zeros around. Parts that pass untouched have a single 1 in the middle. The channels next to the
mixer then have all parts too, with zero weights where they did not read or write before, which
costs nothing: convolutions pad them to whole blocks anyway.

    memory, *parts = split(x)                       y = depthwise(x)
    mixed = concat(depthwise(p) for p in parts)     hidden = f(fc1(y))        fc1: zeros for memory
    hidden = f(fc1(mixed))                          joined = fc2(hidden) + y  fc2: zeros for memory
    joined = concat(memory, fc2(hidden) + mixed)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.graphs.edit import (
    Array,
    Editor,
    constant,
    integer,
    integers,
    is_depthwise,
    only_use,
    producer,
    replace,
    sides,
)


class WidenNarrowMixers(ir.passes.InPlacePass):
    """Split, depthwise convolutions, concat -> depthwise convolutions of whole blocks.

    Args:
        block: Channels of a block.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        modified = False
        for node in list(model.graph):
            if node.op_identifier() == ("", "Split", "") and node.graph is not None:
                found = _find(node, self.block)
                if found is not None:
                    _rewrite(found, self.block)
                    modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Term:
    """One depthwise convolution of a part; `source` is its weight in the graph."""

    filters: Array
    bias: Array
    source: ir.Value | None = None


@dataclass(frozen=True)
class _Mixer:
    """What `WidenNarrowMixers` looks for; names as in the module's text."""

    split: ir.Node
    parts: list[list[_Term]]
    mixed: ir.Node
    fc1: ir.Node
    fc2: ir.Node
    joined: ir.Node


def _find(split: ir.Node, block: int) -> _Mixer | None:
    shape = sides(split.inputs[0])
    widths = [(sides(part) or [None, None])[1] for part in split.outputs]
    if integer(split, "axis", 0) != 1 or shape is None or shape[1] is None or shape[1] % block:
        return None
    width = widths[0]
    # Only where whole parts fill blocks, and where some part does not.
    if width is None or set(widths) != {width} or width % block == 0 or block % width:
        return None
    mixed = _mixed(split)
    parts = [] if mixed is None else [_terms(value) for value in mixed.inputs]
    if mixed is None or [p and p[0] for p in parts] != list(split.outputs[1:]):
        return None
    ends = _ends(split, mixed)
    if ends is None:
        return None
    return _Mixer(split, [p[1] for p in parts if p is not None], mixed, *ends)


def _mixed(split: ir.Node) -> ir.Node | None:
    """The Concat of all mixed parts."""
    after = {user for part in split.outputs[1:] for user in part.consumers()}
    after |= {user for node in after for out in node.outputs for user in out.consumers()}
    found = [n for n in after if n.op_type == "Concat" and len(n.inputs) == len(split.outputs) - 1]
    return found[0] if len(found) == 1 and integer(found[0], "axis", 0) == 1 else None


def _terms(value: ir.Value | None) -> tuple[ir.Value | None, list[_Term]] | None:
    """What a part is made of: its source, and the convolutions that are added up."""
    if value is None or not only_use(value):
        return None
    add = producer(value, "Add")
    convs = [producer(v, "Conv") for v in (add.inputs if add is not None else [value])]
    terms, sources = [], set()
    for conv in convs:
        if conv is None or not only_use(conv.outputs[0]):
            return None
        term = _term(conv)
        if term is None:
            return None
        terms.append(term)
        sources.add(conv.inputs[0])
    return (sources.pop(), terms) if len(sources) == 1 else None


def _term(conv: ir.Node) -> _Term | None:
    """A depthwise convolution that keeps the size, with odd sides."""
    if not is_depthwise(conv):
        return None
    filters = constant(conv.inputs[1])
    assert filters is not None
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(len(filters), np.float32)
    height, width = filters.shape[2:]
    same = (height // 2, width // 2) * 2
    if bias is None or not (height % 2 and width % 2) or integers(conv, "pads", (0,) * 4) != same:
        return None
    ones = (1, 1)
    if integers(conv, "strides", ones) != ones or integers(conv, "dilations", ones) != ones:
        return None
    return _Term(filters, bias, conv.inputs[1])


def _ends(split: ir.Node, mixed: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """fc1, fc2 and the Concat of memory and parts."""
    users = list(mixed.outputs[0].consumers())
    fc1 = next((n for n in users if _is_pointwise(n)), None)
    add = next((n for n in users if n.op_type == "Add"), None)
    if len(users) != 2 or fc1 is None or add is None or not only_use(add.outputs[0]):
        return None
    (joined,) = add.outputs[0].consumers()
    if joined.op_type != "Concat" or integer(joined, "axis", 0) != 1:
        return None
    if list(joined.inputs) != [split.outputs[0], add.outputs[0]]:
        return None
    if not only_use(split.outputs[0]):
        return None
    fc2 = next((c for c in (producer(v, "Conv") for v in add.inputs) if c is not None), None)
    if fc2 is None or not _is_pointwise(fc2) or not only_use(fc2.outputs[0]):
        return None
    return fc1, fc2, joined


def _is_pointwise(conv: ir.Node) -> bool:
    weight = constant(conv.inputs[1]) if conv.op_identifier() == ("", "Conv", "") else None
    return (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and integer(conv, "group", 1) == 1
        and all(i is None or constant(i) is not None for i in conv.inputs[1:])
    )


def _rewrite(found: _Mixer, block: int) -> None:
    split, width = found.split, len(found.parts[0][0].filters)
    x = split.inputs[0]
    identity = _Term(np.ones((width, 1, 1, 1), np.float32), np.zeros(width, np.float32))
    parts = [[identity], *found.parts]
    per_block = block // width
    groups = [parts[i : i + per_block] for i in range(0, len(parts), per_block)]
    edit = Editor(found.mixed, "blocks")
    sizes = edit.constant(np.full(len(groups), block, np.int64))
    first = edit.add("Split", [x, sizes], {"axis": 1}, outputs=len(groups))
    pieces = first.producer()
    assert pieces is not None
    assert x is not None
    assert x.shape is not None
    for piece in pieces.outputs:
        piece.type = x.type
        piece.shape = ir.Shape([x.shape[0], block, *x.shape[2:]])
    done = [
        _convolve(edit, piece, group) for piece, group in zip(pieces.outputs, groups, strict=True)
    ]
    y = edit.add("Concat", done, {"axis": 1}, like=x)
    _widen_fc1(found.fc1, y, width)
    _widen_fc2(found, y, width)


def _convolve(edit: Editor, piece: ir.Value, group: list[list[_Term]]) -> ir.Value:
    """The convolutions of the parts in one block, as many as the part with most has."""
    made: list[ir.Value] = []
    for index in range(max(len(terms) for terms in group)):
        terms = [t[index] if index < len(t) else None for t in group]
        source = next((t.source for t in terms if t is not None and t.source is not None), None)
        filters, bias = _merge(terms)
        height, width = filters.shape[2:]
        attributes = {
            "group": len(filters),
            "kernel_shape": [height, width],
            "pads": [height // 2, width // 2] * 2,
        }
        inputs = [piece, edit.constant(filters, source), edit.constant(bias, source)]
        made.append(edit.add("Conv", inputs, attributes, like=piece))
    total = made[0]
    for other in made[1:]:
        total = edit.add("Add", [total, other], like=piece)
    return total


def _merge(terms: list[_Term | None]) -> tuple[Array, Array]:
    """Filters of several parts side by side, each in the middle of the largest size."""
    present = [t for t in terms if t is not None]
    width = len(present[0].filters)
    height, breadth = (max(t.filters.shape[axis] for t in present) for axis in (2, 3))
    filters = np.zeros((len(terms) * width, 1, height, breadth), np.float32)
    bias = np.zeros(len(terms) * width, np.float32)
    for index, term in enumerate(terms):
        if term is None:
            continue
        h, w = term.filters.shape[2:]
        top, left = (height - h) // 2, (breadth - w) // 2
        rows = slice(index * width, (index + 1) * width)
        filters[rows, :, top : top + h, left : left + w] = term.filters
        bias[rows] = term.bias
    return filters, bias


def _widen_fc1(fc1: ir.Node, y: ir.Value, width: int) -> None:
    weight = constant(fc1.inputs[1])
    assert weight is not None
    edit = Editor(fc1, "wide")
    zeros = np.zeros((len(weight), width, 1, 1), np.float32)
    fc1.replace_input_with(0, y)
    fc1.replace_input_with(1, edit.constant(np.concatenate([zeros, weight], axis=1), fc1.inputs[1]))


def _widen_fc2(found: _Mixer, y: ir.Value, width: int) -> None:
    fc2, joined = found.fc2, found.joined
    weight = constant(fc2.inputs[1])
    bias = constant(fc2.inputs[2]) if len(fc2.inputs) > 2 else None
    assert weight is not None
    edit = Editor(joined, "wide")
    zeros = np.zeros((width, *weight.shape[1:]), np.float32)
    inputs = [fc2.inputs[0], edit.constant(np.concatenate([zeros, weight]), fc2.inputs[1])]
    if bias is not None:
        inputs.append(
            edit.constant(np.concatenate([np.zeros(width, np.float32), bias]), fc2.inputs[2])
        )
    out = edit.add("Conv", inputs, {"kernel_shape": [1, 1]}, like=joined.outputs[0])
    replace(joined, edit.add("Add", [out, y], like=joined.outputs[0]))
