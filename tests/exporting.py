"""Exports that share what each of them would make anew."""

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
