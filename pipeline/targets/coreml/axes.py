"""Values of more than five axes, which Core ML does not have, with five.

A package is converted for one image, so that the first axis of nearly every value has the size 1. It
is dropped from the values of six axes, from the reshape that makes them to the one that ends them, by
which no number changes. For one permutation between two reshapes, coremltools finds a way itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

MOST = 5
"""Axes of a tensor of Core ML."""

_RESHAPES = ("view", "reshape", "_unsafe_view")
_COPIES = ("clone", "contiguous")
_BY_ELEMENT = ("add", "sub", "mul", "div")


def drop_first_axes(program: ExportedProgram) -> None:
    """Drop the first axis, of size 1, of all values of six axes.

    Values that are connected to one of more axes, or to an operation that uses the first axis, stay
    as they are, and coremltools says what it cannot convert.

    Args:
        program: A program of ATen operations with a batch of 1; changed in place.
    """
    dropped = _droppable([node for node in program.graph.nodes if _axes(node) > MOST])
    for node in dropped:
        _drop(node)
    for node in dropped:
        node.meta["val"] = node.meta["val"][0]


def _droppable(wide: list[Node]) -> list[Node]:
    """Those of the values of many axes whose neighbours can do without the first one, too."""
    found = [node for node in wide if _can_drop(node)]
    while lost := [node for node in found if not _fits(node, found)]:
        found = [node for node in found if node not in lost]
    return found


def _fits(node: Node, found: list[Node]) -> bool:
    """Whether all that a value is made of and all that reads it knows it without its first axis."""
    sources = all(_axes(source) <= MOST or source in found for source in node.all_input_nodes)
    return sources and all(user in found or _is(user, _RESHAPES) for user in node.users)


def _axes(node: Node) -> int:
    return len(getattr(node.meta.get("val"), "shape", ()))


def _is(node: Node, names: tuple[str, ...]) -> bool:
    packet = str(getattr(node.target, "overloadpacket", ""))
    return node.op == "call_function" and packet.rpartition(".")[2] in names


def _can_drop(node: Node) -> bool:
    """Whether a value of many axes is made in a way that leaves its first axis, of size 1, alone."""
    axes = _axes(node)
    if axes != MOST + 1 or node.meta["val"].shape[0] != 1:
        return False
    if _is(node, ("unsqueeze",)):
        return node.args[1] not in (0, -axes)
    if _is(node, ("permute",)):
        order: Any = node.args[1]
        return order[0] % axes == 0
    if _is(node, ("transpose",)):
        return all(axis not in (0, -axes) for axis in node.args[1:])
    if _is(node, ("linear",)):
        return not any(_axes(weight) > 2 for weight in node.all_input_nodes[1:])
    if _is(node, _BY_ELEMENT):
        return all(_axes(each) in (0, axes) for each in node.all_input_nodes) and not node.kwargs
    return _is(node, (*_RESHAPES, *_COPIES))


def _drop(node: Node) -> None:
    """Write an operation for values without their first axis."""
    import torch

    aten, axes = torch.ops.aten, _axes(node)
    arguments: list[Any] = list(node.args)
    if _is(node, (*_RESHAPES, "unsqueeze")):
        # Also of a value with five axes: only its own first one may be gone by now.
        node.target = aten.view.default if _is(node, ("view",)) else aten.reshape.default
        arguments = [node.args[0], list(node.meta["val"].shape[1:])]
    elif _is(node, ("permute",)):
        arguments[1] = [axis % axes - 1 for axis in arguments[1][1:]]
    elif _is(node, ("transpose",)):
        arguments[1:] = [axis % axes - 1 for axis in arguments[1:]]
    node.args = tuple(arguments)
