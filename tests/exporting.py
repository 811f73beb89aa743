"""Exports that share what each of them would make anew, and ask for nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def remembering(export: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.onnx.export` whose table of operators is made once for a test process.

    It reads the source of 500 functions for that, in each call: 0.7 s, of 1.1 for a network of one
    layer. Each call gets lists of its own, since it may add to them.
    """
    installed: list[bool] = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        if not installed:
            installed.append(True)
            _install()
            match_own_operators()
        return export(*arguments, **options)

    return remembered


def _install() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = ONNXRegistry.from_torchlib
    made: dict[tuple[Any, ...], ONNXRegistry] = {}

    def from_torchlib(*opset: Any, **named: Any) -> ONNXRegistry:
        key = (*opset, *named.items())
        if key not in made:
            made[key] = make(*opset, **named)
        registry = ONNXRegistry()
        registry.__dict__.update(made[key].__dict__)
        registry.functions = {target: list(known) for target, known in made[key].functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]


def match_own_operators() -> None:
    """Let the optimizer of graphs try a pattern on nodes of the operator alone that it ends with.

    It tries all patterns on all nodes, and goes through the whole graph for each pattern that has
    several ends before it looks at the node: a quarter of an export.
    """
    from onnxscript.rewriter._basics import MatchResult
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    match = SimplePatternMatcher.match
    owner: Any = SimplePatternMatcher

    def matched(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        ends_with = self.pattern.output_nodes[0].op_identifier()
        if ends_with is not None and ends_with[1] != node.op_type:
            return MatchResult().fail("another operator")
        return match(self, model, graph, node, **options)

    owner.match = matched


def remember_composites() -> None:
    """Let `torch.export` look for operators made of others again only when there are more of them.

    It asks all namespaces each time, and lets each look at all operators: 0.06 s, twice an export.
    """
    from torch import _C
    from torch._export import utils

    find = utils._collect_all_valid_cia_ops_for_namespace
    found: dict[tuple[str, int], set[Any]] = {}
    owner: Any = utils

    def remembered(namespace: Any) -> set[Any]:
        registered = _C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        key = (namespace.name, len(registered))
        if key not in found:
            found[key] = find(namespace)
        return found[key]

    owner._collect_all_valid_cia_ops_for_namespace = remembered
