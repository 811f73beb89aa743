"""ONNX Runtime's blocked layout, kept through the whole network.

Its fast convolutions work on NCHWc: blocks of 16 channels (8 without AVX-512) in which a pixel's
channels lie side by side. ONNX Runtime chooses that layout itself when it opens a model, but goes
back to the plain one around every Split, every attention and every product with a constant: 171
reorders in CARE-S0. This pass writes the layout into the graph, so that these operators work on the
blocks too, and lets convolutions take the additions that follow them.

The result is tied to one width of blocks and to ONNX Runtime's internal operators: it accompanies
the portable graph, see `pipeline.targets.ort`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pipeline.graphs.edit import (
    INTERNAL,
    RANK_2D,
    Array,
    Editor,
    constant,
    integer,
    integers,
    is_depthwise,
    is_scalar,
    only_use,
    producer,
    sides,
)
from pipeline.graphs.passes.attention import OPERATOR as ATTENTION

NCHWC = "com.microsoft.nchwc"

_FUNCTIONS = ("Abs", "Clip", "Elu", "Erf", "Exp", "Identity", "Neg", "Sqrt")
_ACTIVATIONS = ("Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
UNARY = frozenset({*_FUNCTIONS, *_ACTIVATIONS})
"""Operators on single numbers: any layout will do. Further inputs, if any, are scalars."""

BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max"})
"""The same with two inputs, of equal shape or one a scalar."""

SUM_INPUT = 3
"""Where the internal convolution takes what is to be added to its result."""

FUSED_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh"})
"""Activations without parameters that the internal convolution applies itself."""

POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
"""Pooling operators that exist in the blocked layout."""


class BlockedLayout(ir.passes.InPlacePass):
    """Convolutions, and what lies between them, in NCHWc.

    Args:
        block: Channels of a block: 8 or 16, what the CPU's ONNX Runtime uses.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model`, in place."""
        if not _Walk(model.graph, self.block).run():
            return ir.passes.PassResult(model, False)
        model.graph.opset_imports[NCHWC] = 1
        _fuse_sums(model.graph)
        _fuse_activations(model.graph)
        model.graph.sort()
        return ir.passes.PassResult(model, True)


class _Walk:
    """Gives nodes a twin in the blocked layout, from the input to the output.

    Attributes:
        blocked: Value of the plain graph -> the same in the blocked layout.
        plain: Value of the plain graph that only a twin makes -> the same, brought back.
    """

    def __init__(self, graph: ir.Graph, block: int) -> None:
        self.graph = graph
        self.block = block
        self.blocked: dict[ir.Value, ir.Value] = {}
        self.plain: dict[ir.Value, ir.Value] = {}
        self.replaced: set[ir.Node] = set()
        self.twins: dict[str, Callable[[ir.Node], bool]] = {
            **dict.fromkeys(UNARY, self._unary),
            **dict.fromkeys(BINARY, self._binary),
            **dict.fromkeys(POOLS, self._pool),
            "Conv": self._conv,
            "Concat": self._concat,
            "Split": self._split,
            "ReduceMean": self._global_mean,
            ATTENTION: self._attention,
        }

    def run(self) -> bool:
        """Walk over all nodes; True if any was replaced."""
        for node in list(self.graph):
            twin = self.twins.get(node.op_type) if node.domain in ("", INTERNAL) else None
            if twin is not None and twin(node):
                self.replaced.add(node)
            else:
                self._feed_plain(node)
        for index, output in enumerate(self.graph.outputs):
            source = output.producer()
            if source is not None and source in self.replaced:
                self.graph.outputs[index] = self._unblock(output, source, output.name)
        # Safely: what only they read, such as the plain filters, is unused then and goes.
        self.graph.remove(self.replaced, safe=True)
        return bool(self.replaced)

    # Between the layouts.

    def _is_blocked(self, value: ir.Value | None) -> bool:
        return value in self.blocked

    def _block(self, value: ir.Value, edit: Editor) -> ir.Value:
        """The value in the blocked layout."""
        if value not in self.blocked:
            source = self.plain.get(value, value)
            self.blocked[value] = edit.add("ReorderInput", [source], domain=NCHWC, like=value)
        return self.blocked[value]

    def _feed_plain(self, node: ir.Node) -> None:
        """Let a node that stays as it is read the plain layout."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.producer() in self.replaced:
                node.replace_input_with(index, self._unblock(value, node, None))

    def _unblock(self, value: ir.Value, place: ir.Node, name: str | None) -> ir.Value:
        if value not in self.plain:
            made = self.blocked[value]
            channels = _channels(value)
            edit = Editor(place, f"plain/{value.name}")
            self.plain[value] = edit.add(
                "ReorderOutput", [made], {"channels": channels}, domain=NCHWC, like=value
            )
        if name is not None:
            value.name = f"{name}/blocked"
            self.plain[value].name = name
        return self.plain[value]

    def _fits(self, value: ir.Value | None) -> bool:
        """The value can be cut into whole blocks."""
        shape = sides(value)
        return (
            shape is not None
            and len(shape) == RANK_2D
            and shape[1] is not None
            and shape[1] % self.block == 0
        )

    # Twins: True if the node got one.

    def _conv(self, node: ir.Node) -> bool:
        filters = constant(node.inputs[1])
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if filters is None or filters.ndim != RANK_2D or filters.dtype != np.float32:
            return False
        if (len(node.inputs) > 2 and bias is None) or not self._fits(node.outputs[0]):
            return False
        x = node.inputs[0]
        assert x is not None
        group, channels = integer(node, "group", 1), _channels(x)
        few = group == 1 and channels < self.block
        if not few and not is_depthwise(node) and (group != 1 or channels % self.block):
            return False
        edit = Editor(node, "nchwc")
        if few or group != 1:
            # A few channels, such as an image's, are read in the plain layout.
            reordered = block_outputs(filters, self.block)
        else:
            reordered = block_filters(filters, self.block)
        if few:
            self._feed_plain(node)
            source = node.inputs[0]
        else:
            source = self._block(x, edit)
        inputs = [source, edit.constant(reordered, node.inputs[1])]
        if bias is not None:
            inputs.append(node.inputs[2])
        attributes = {
            "group": group,
            "kernel_shape": filters.shape[2:],
            "strides": integers(node, "strides", (1, 1)),
            "pads": integers(node, "pads", (0, 0, 0, 0)),
            "dilations": integers(node, "dilations", (1, 1)),
        }
        if (auto := node.attributes.get("auto_pad")) is not None and auto.as_string() != "NOTSET":
            return False
        self._done(node, edit.add("Conv", inputs, attributes, domain=NCHWC, like=node.outputs[0]))
        return True

    def _unary(self, node: ir.Node) -> bool:
        x, *others = node.inputs
        if not self._is_blocked(x) or not all(o is None or is_scalar(o) for o in others):
            return False
        assert x is not None
        edit = Editor(node, "nchwc")
        inputs = [self.blocked[x], *others]
        self._done(node, edit.add(node.op_type, inputs, node.attributes, like=node.outputs[0]))
        return True

    def _pool(self, node: ir.Node) -> bool:
        x = node.inputs[0]
        if x is None or not self._is_blocked(x) or len(node.outputs) != 1:
            return False
        if integer(node, "ceil_mode", 0) or any(d != 1 for d in integers(node, "dilations", ())):
            return False
        edit = Editor(node, "nchwc")
        known = {k: v for k, v in node.attributes.items() if k not in ("ceil_mode", "dilations")}
        inputs, like = [self.blocked[x]], node.outputs[0]
        self._done(node, edit.add(node.op_type, inputs, known, domain=NCHWC, like=like))
        return True

    def _binary(self, node: ir.Node) -> bool:
        if len(node.inputs) != 2 or not self._fits(node.outputs[0]):
            return False
        whole = [v for v in node.inputs if not is_scalar(v)]
        if not any(self._is_blocked(v) for v in whole):
            return False
        # Shapes in the same symbols: a broadcast would mix up the layouts.
        if any(v is None or v.shape is None or v.shape != node.outputs[0].shape for v in whole):
            return False
        edit = Editor(node, "nchwc")
        inputs = [v if is_scalar(v) or v is None else self._block(v, edit) for v in node.inputs]
        self._done(node, edit.add(node.op_type, inputs, node.attributes, like=node.outputs[0]))
        return True

    def _concat(self, node: ir.Node) -> bool:
        if integer(node, "axis", 0) != 1 or not all(self._fits(v) for v in node.inputs):
            return False
        if not any(self._is_blocked(v) for v in node.inputs):
            return False
        edit = Editor(node, "nchwc")
        inputs = [self._block(v, edit) for v in node.inputs if v is not None]
        self._done(node, edit.add("Concat", inputs, {"axis": 1}, like=node.outputs[0]))
        return True

    def _split(self, node: ir.Node) -> bool:
        x = node.inputs[0]
        if integer(node, "axis", 0) != 1 or x is None or not self._is_blocked(x):
            return False
        if not all(self._fits(part) for part in node.outputs):
            return False
        edit = Editor(node, "nchwc")
        first = edit.add(
            "Split",
            [self.blocked[x], *node.inputs[1:]],
            node.attributes,
            like=node.outputs[0],
            outputs=len(node.outputs),
        )
        made = first.producer()
        assert made is not None
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            self.blocked[old] = new
        return True

    def _global_mean(self, node: ir.Node) -> bool:
        """Mean over height and width; the result, one pixel, is the same in both layouts."""
        x = node.inputs[0]
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if (
            x is None
            or not self._is_blocked(x)
            or axes is None
            or node.outputs[0].is_graph_output()
        ):
            return False
        if sorted(int(a) % RANK_2D for a in axes) != [2, 3]:
            return False
        edit = Editor(node, "nchwc")
        pooled = edit.add("GlobalAveragePool", [self.blocked[x]], domain=NCHWC)
        keep = [1, 1] if integer(node, "keepdims", 1) else []
        shape = edit.constant(np.array([-1, _channels(x), *keep], np.int64))
        self.plain[node.outputs[0]] = edit.add("Reshape", [pooled, shape], like=node.outputs[0])
        return True

    def _attention(self, node: ir.Node) -> bool:
        """Token by token where a head is made of whole blocks."""
        if integer(node, "dim", 0) % self.block or not self._is_blocked(node.inputs[0]):
            return False
        edit = Editor(node, "nchwc")
        attributes = {n: integer(node, n, 0) for n in ("heads", "dim", "tokens")}
        inputs = [self._block(v, edit) for v in node.inputs if v is not None]
        twin = edit.add(
            ATTENTION,
            inputs,
            {**attributes, "block": self.block},
            domain=INTERNAL,
            like=node.outputs[0],
        )
        self._done(node, twin)
        return True

    def _done(self, node: ir.Node, twin: ir.Value) -> None:
        self.blocked[node.outputs[0]] = twin


def _channels(value: ir.Value) -> int:
    shape = sides(value)
    assert shape is not None
    channels = shape[1]
    assert channels is not None
    return channels


def block_filters(filters: Array, block: int) -> Array:
    """Filters for blocked inputs: (O, I, h, w) in the order (O/b, I/b, h, w, b of I, b of O).

    The order is that of ONNX Runtime's MlasReorderFilterOIHWBiBo; the shape stays as it was.
    """
    o, i, h, w = filters.shape
    cut = filters.reshape(o // block, block, i // block, block, h, w)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 5, 3, 1)).reshape(filters.shape)


def block_outputs(filters: Array, block: int) -> Array:
    """Filters of depthwise convolutions and for plain inputs: (O/b, I, h, w, b of O).

    The order is that of ONNX Runtime's MlasReorderFilterOIHWBo; the shape stays as it was.
    """
    o, i, h, w = filters.shape
    cut = filters.reshape(o // block, block, i, h, w)
    return np.ascontiguousarray(cut.transpose(0, 2, 3, 4, 1)).reshape(filters.shape)


def _fuse_sums(graph: ir.Graph) -> None:
    """Let convolutions take the additions that follow them: one pass over memory less."""
    position = {node: index for index, node in enumerate(graph)}
    for add in [n for n in graph if n.op_identifier() == ("", "Add", "")]:
        convs = [producer(value, "Conv", NCHWC) for value in add.inputs]
        able = [
            (position[conv], index)
            for index, conv in enumerate(convs)
            if conv is not None and len(conv.inputs) <= SUM_INPUT and only_use(conv.outputs[0])
        ]
        if not able:
            continue
        # The later one: what it adds is there by then.
        _, index = max(able)
        conv, other = convs[index], add.inputs[1 - index]
        assert conv is not None
        count = len(conv.inputs)
        conv.resize_inputs(SUM_INPUT + 1)
        for missing in range(count, SUM_INPUT):
            conv.replace_input_with(missing, None)
        conv.replace_input_with(SUM_INPUT, other)
        add.outputs[0].replace_all_uses_with(conv.outputs[0], replace_graph_outputs=True)
        graph.remove(add, safe=True)


def _fuse_activations(graph: ir.Graph) -> None:
    """Let convolutions apply the activations that follow them, after what they add."""
    for node in [n for n in graph if n.domain == "" and n.op_type in FUSED_ACTIVATIONS]:
        conv = producer(node.inputs[0], "Conv", NCHWC)
        if conv is None or "activation" in conv.attributes or not only_use(conv.outputs[0]):
            continue
        conv.attributes["activation"] = ir.AttrString("activation", node.op_type)
        node.outputs[0].replace_all_uses_with(conv.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
