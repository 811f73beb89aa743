"""Operations of an exported torch program: what they are called, and new ones beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Node


def kind_of(node: Node) -> str:
    """The operation's name without namespace and overload; that of Python's functions as it is."""
    packet = str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2]
    return packet or getattr(node.target, "__name__", "")


def made(node: Node, target: Any, *arguments: Any, **named: Any) -> Node:
    """A new operation before `node`, of the same module, which knows its shape."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments, named)
    new.meta.update(
        (key, node.meta[key]) for key in ("nn_module_stack", "stack_trace") if key in node.meta
    )
    values = (each.meta["val"] if hasattr(each, "meta") else each for each in arguments)
    new.meta["val"] = target(*values, **named)
    return new
