"""Weights under other names than the network's: what training programs and timm's history left.

Lightning puts `model.` before every name, others `net.` or `backbone.`. timm itself reads the
layouts in which networks were first published by a filter function beside each network; those
functions are used here, so that the result is timm's.

A reading counts only if it has every name and shape of the network: nothing is guessed by halves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.core.words import shown

State = dict[str, Tensor]
Filter = Callable[..., Any]

_PREFIXES = ("model.", "net.", "network.", "backbone.", "encoder.")
_COUNTER = "num_batches_tracked"

# Filters interpolate positions: what is far larger than the network is not its checkpoint.
_LARGEST_SHARE = 8


def fitting(state: State, model: nn.Module) -> State:
    """The weights under the network's names, if a known way to write them leads there.

    Args:
        state: A checkpoint's weights.
        model: The network.

    Returns:
        The first reading that has all names and shapes of the network; else `state` as it is.

    Raises:
        CheckpointError: It holds the network several times, under different prefixes.
    """
    expected = _shapes(model.state_dict())
    if _shapes(state) == expected:
        return state
    for reading in _readings(state, model, expected):
        if _shapes(reading) == expected:
            return reading
    return state


def _readings(state: State, model: nn.Module, expected: Mapping[str, Any]) -> Iterator[State]:
    parts = {
        prefix: part
        for prefix in _prefixes(state, expected)
        if _shapes(part := _below(state, prefix)) == expected
    }
    if len(parts) > 1 or (parts and expected.items() <= _shapes(state).items()):
        names = ", ".join(shown(prefix) for prefix in parts)
        raise CheckpointError(
            f"it holds this network several times, also under {names}: save only the one to take"
        )
    yield from parts.values()
    for prefix in _PREFIXES:
        yield _without(state, prefix)
    if _count(state) > _LARGEST_SHARE * _count(model.state_dict()):
        return
    for candidate in (state, *(_below(state, p) for p in _PREFIXES if _all_below(state, p))):
        yield from _filtered(candidate, model)


def _prefixes(state: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What stands before the network's names, where something does.

    A moving average beside the weights does not count.
    """
    first = next(iter(expected), "")
    found = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    trained = [prefix for prefix in found if "ema" not in prefix.lower()]
    return trained or found


def _below(state: State, prefix: str) -> State:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _without(state: State, prefix: str) -> State:
    """All weights, without the prefix where they have it: `backbone.` and a head beside it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _all_below(state: Mapping[str, Any], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in state)


def _filtered(state: State, model: nn.Module) -> Iterator[State]:
    """What timm's filter functions for this network make of the weights."""
    for function in _filters(model):
        with torch.no_grad():
            try:
                made = function(dict(state))
            except Exception:
                continue
        if isinstance(made, dict) and all(isinstance(v, Tensor) for v in made.values()):
            yield {str(name): value for name, value in made.items()}


def _filters(model: nn.Module) -> Iterator[Callable[[State], Any]]:
    """Timm's filters in the files of the network's classes."""
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    for module in modules:
        if module.__name__.startswith("timm.models."):
            for function in _functions(module):
                parameters = inspect.signature(function).parameters
                yield partial(function, model=model) if "model" in parameters else function
                if "adapt_layer_scale" in parameters:  # DeiT III
                    yield partial(function, model=model, adapt_layer_scale=True)


def _functions(module: ModuleType) -> list[Filter]:
    return [
        value
        for name, value in vars(module).items()
        if "filter" in name and inspect.isfunction(value) and _takes_state(value)
    ]


def _takes_state(function: Filter) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "state_dict"


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(_COUNTER)}


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())
