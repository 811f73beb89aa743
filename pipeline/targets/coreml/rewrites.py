"""Operations of an exported torch program that coremltools does not read as they are meant.

coremltools ignores keyword arguments that it does not know: a GELU by tanh becomes the exact one,
and a sum with a factor loses the factor, without a word. Some operations it refuses although they
are nothing: an alias is its input. Each is put here into an equal form which it reads right; for
what Core ML cannot express, see `refusals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.targets.coreml.axes import fold_axes
from pipeline.targets.coreml.folding import fold_resized_weights
from pipeline.targets.coreml.nodes import kind_of, made

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

_IDENTITIES = ("alias", "alias_copy", "detach", "lift_fresh", "lift_fresh_copy")
_DECOMPOSED = ("addcdiv", "addcmul", "celu", "gru", "lstm")


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """Put what coremltools misreads into equal forms.

    Args:
        program: A program of ATen operations; may be changed.

    Returns:
        The program to convert.
    """
    program = _decompose(program)
    fold_resized_weights(program)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            found = _REWRITES.get(kind_of(node))
            if found is not None:
                found(node, program)
    fold_axes(program)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _decompose(program: ExportedProgram) -> ExportedProgram:
    """Write operations that coremltools lacks as those by which torch defines them."""
    import torch

    kinds = [getattr(torch.ops.aten, name) for name in _DECOMPOSED]
    if not any(
        getattr(node.target, "overloadpacket", None) in kinds for node in program.graph.nodes
    ):
        return program
    defaults = torch.export.default_decompositions()
    table = {key: value for key, value in defaults.items() if key.overloadpacket in kinds}
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _remove(node: Node, program: ExportedProgram) -> None:
    """Give the users of an identity its input."""
    source: Any = node.args[0]
    node.replace_all_uses_with(source)
    program.graph_signature.replace_all_uses(node.name, source.name)


def _gelu(node: Node, program: ExportedProgram) -> None:
    """Write out a GELU by tanh; coremltools puts it together again, and then in the right form."""
    import torch

    if node.kwargs.get("approximate", "none") != "tanh":
        return
    aten, x = torch.ops.aten, node.args[0]
    half = made(node, aten.mul.Tensor, x, 0.5)
    cube = made(node, aten.pow.Tensor_Scalar, x, 3)
    bent = made(node, aten.add.Tensor, x, made(node, aten.mul.Tensor, cube, 0.044715))
    tanh = made(node, aten.tanh.default, made(node, aten.mul.Tensor, bent, math.sqrt(2 / math.pi)))
    share = made(node, aten.add.Tensor, tanh, 1.0)
    node.target, node.args, node.kwargs = aten.mul.Tensor, (half, share), {}


def _bound_from_below(node: Node, program: ExportedProgram) -> None:
    """Make a one-sided clamp a maximum: coremltools gives a clamp the upper bound infinity."""
    import torch

    low, high = (*node.args[1:], None, None)[:2]
    if low is not None and high is None and not node.kwargs:
        node.target, node.args = torch.ops.aten.clamp_min.default, (node.args[0], low)


def _scaled_sum(node: Node, program: ExportedProgram) -> None:
    """Write the factor in a + alpha b, a - alpha b and, for `rsub`, b - alpha a as a product."""
    import torch

    arguments: list[Any] = list(node.args)
    factor = arguments[2] if len(arguments) > 2 else node.kwargs.get("alpha", 1)
    scaled = 0 if kind_of(node) == "rsub" else 1
    part = arguments[scaled]
    if factor != 1:
        is_number = isinstance(part, (int, float))
        product = torch.ops.aten.mul.Tensor
        arguments[scaled] = part * factor if is_number else made(node, product, part, factor)
    node.args = tuple(arguments[:2])
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "alpha"}


def _reciprocal(node: Node, program: ExportedProgram) -> None:
    """Divide 1 by the value: for a reciprocal coremltools writes `inverse`, which adds 1e-4."""
    import torch

    one = made(node, torch.ops.aten.full.default, [1], 1.0)
    node.target, node.args = torch.ops.aten.div.Tensor, (one, node.args[0])


def _pad(node: Node, program: ExportedProgram) -> None:
    """Cut off what a negative number pads: coremltools only adds."""
    import torch

    image: Any = node.args[0]
    pads: list[int] = list(node.args[1])  # type: ignore[arg-type]
    rank = len(image.meta["val"].shape)
    for i in range(0, len(pads), 2):
        begin, end = max(0, -pads[i]), max(0, -pads[i + 1])
        if not begin and not end:
            continue
        axis = rank - 1 - i // 2  # pairs begin with the last axis
        last = image.meta["val"].shape[axis] - end
        image = made(node, torch.ops.aten.slice.Tensor, image, axis, begin, last)
    node.args = (image, [max(0, pad) for pad in pads], *node.args[2:])


_REWRITES: dict[str, Callable[[Node, ExportedProgram], None]] = {
    **dict.fromkeys(_IDENTITIES, _remove),
    **dict.fromkeys(("add", "sub", "rsub"), _scaled_sum),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "clamp": _bound_from_below,
    "gelu": _gelu,
    "reciprocal": _reciprocal,
}
