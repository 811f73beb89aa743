"""Values of more than five axes, which Core ML does not have, with five.

A package is converted for one image, so that the first axis of nearly every value has the size 1.
It is dropped from the values of six axes, from the reshape that makes them to what ends them, by
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
_ENDS = ("unbind", "select", "amax")

Places = dict["Node", int]
"""Which axis is dropped from a value."""


def drop_first_axes(program: ExportedProgram) -> None:
    """Drop the first axis, of size 1, of all values of six axes.

    Values that are connected to one of more axes, or to an operation that uses the axis, stay as
    they are, and coremltools says what it cannot convert.

    Args:
        program: A program of ATen operations with a batch of 1; changed in place.
    """
    places = _places([node for node in program.graph.nodes if _axes(node) > MOST])
    ends = {user for node in places for user in node.users if _is(user, _ENDS)}
    for node in ends:
        _end(node, places[node.all_input_nodes[0]])
    for node in places:
        _drop(node, places)
    for node, place in places.items():
        node.meta["val"] = node.meta["val"].select(place, 0)


def _places(wide: list[Node]) -> Places:
    """The axis to drop from those values of many axes whose neighbours can do without it, too."""
    found: Places = {}
    for node in wide:  # each after what it is made of
        place = _place(node, found)
        if place is not None:
            found[node] = place
    while lost := [node for node in found if not _fits(node, found)]:
        for node in lost:
            del found[node]
    return found


def _fits(node: Node, found: Places) -> bool:
    """Whether all that a value is made of and all that reads it can do without its axis."""
    sources = all(_axes(source) <= MOST or source in found for source in node.all_input_nodes)
    return sources and all(
        user in found or _is(user, _RESHAPES) or _ends_without(user, found[node])
        for user in node.users
    )


def _ends_without(user: Node, place: int) -> bool:
    """Whether an operation makes fewer axes of a value, of which the one in question stays."""
    return _is(user, _ENDS) and place not in _ended(user)


def _ended(node: Node) -> list[int]:
    """The axes that an operation of `_ENDS` takes away."""
    source = node.all_input_nodes[0]
    given: Any = node.args[1] if len(node.args) > 1 else 0
    axes = given if isinstance(given, (list, tuple)) else [given]
    return [axis % (_axes(source) or 1) for axis in axes]


def _axes(node: Node) -> int:
    return len(getattr(node.meta.get("val"), "shape", ()))


def _is(node: Node, names: tuple[str, ...]) -> bool:
    packet = str(getattr(node.target, "overloadpacket", ""))
    return node.op == "call_function" and packet.rpartition(".")[2] in names


def _place(node: Node, known: Places) -> int | None:
    """Which axis of a value of six axes can be dropped; None if none can.

    Args:
        node: What makes it.
        known: Those of the values before.
    """
    axes = _axes(node)
    if axes != MOST + 1:
        return None
    if _is(node, (*_RESHAPES, "unsqueeze")):
        is_first = _is(node, ("unsqueeze",)) and node.args[1] in (0, -axes)
        return None if is_first or node.meta["val"].shape[0] != 1 else 0
    wide = [source for source in node.all_input_nodes if _axes(source) > MOST]
    places = {known.get(source) for source in wide}
    place = places.pop() if len(places) == 1 else None
    if place is None:
        return None
    if _is(node, ("permute",)):
        return _order(node).index(place)
    if _is(node, ("transpose",)):
        first, second = (int(axis) % axes for axis in node.args[1:])  # type: ignore[arg-type]
        return {first: second, second: first}.get(place, place)
    if _is(node, ("linear",)):
        return place if len(wide) == 1 and place != axes - 1 else None
    if _is(node, _BY_ELEMENT):
        same = all(_axes(each) in (0, axes) for each in node.all_input_nodes) and not node.kwargs
        return place if same else None
    return place if _is(node, _COPIES) else None


def _order(node: Node) -> list[int]:
    given: Any = node.args[1]
    return [axis % _axes(node) for axis in given]


def _drop(node: Node, places: Places) -> None:
    """Write an operation for values without their axis."""
    import torch

    aten = torch.ops.aten
    arguments: list[Any] = list(node.args)
    if _is(node, (*_RESHAPES, "unsqueeze")):
        # Also of a value with five axes: only its own first one may be gone by now.
        node.target = aten.view.default if _is(node, ("view",)) else aten.reshape.default
        arguments = [node.args[0], list(node.meta["val"].shape[1:])]
    elif _is(node, ("permute", "transpose")):
        place = places[node.all_input_nodes[0]]
        order = list(range(_axes(node)))
        if _is(node, ("permute",)):
            order = _order(node)
        else:
            first, second = arguments[1:]
            order[first], order[second] = order[second], order[first]
        node.target = aten.permute.default
        arguments[1:] = [[_without(axis, place) for axis in order if axis != place]]
    node.args = tuple(arguments)


def _without(axis: int, place: int) -> int:
    """Where an axis is once another one is gone."""
    return axis - (axis > place)


def _end(node: Node, place: int) -> None:
    """Write an operation of `_ENDS` for a value without its axis, and give its results the axis."""
    import torch

    gone = _ended(node)
    axes = [_without(axis, place) for axis in gone]
    arguments: list[Any] = [node.args[0], axes if _is(node, ("amax",)) else axes[0]]
    node.args = (*arguments, *node.args[2:])
    kept = len(node.args) > 2 and _is(node, ("amax",)) and bool(node.args[2])
    at = place if kept else place - sum(axis < place for axis in gone)
    for result in list(node.users) if _is(node, ("unbind",)) else [node]:
        whole = result.meta["val"]
        with node.graph.inserting_after(result):
            added = node.graph.call_function(torch.ops.aten.unsqueeze.default, (result, at))
        for user in list(result.users):
            if user is not added:
                user.replace_input_with(result, added)
        added.meta.update(result.meta)
        result.meta["val"] = whole.select(at, 0)
