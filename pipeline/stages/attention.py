"""Attention over values of more or fewer than four axes, as the exporter takes it.

torch computes attention over any leading axes, which windowed networks use: (batch, windows,
heads, tokens, channels). The exporter to ONNX knows (batch, heads, tokens, channels) alone. Leading
axes are joined meanwhile, by which no number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AXES = 4
_VALUES = ("query", "key", "value")


@contextmanager
def four_axes() -> Iterator[None]:
    """Give attention values of four axes meanwhile.

    By another function in the place of torch's: torch.export does not work under modes of others.
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, **dict(zip((*_VALUES, "attn_mask"), args, strict=False))}
        if _can_join([given[name] for name in _VALUES]):
            return _attention(own, given, args[4:])
        return own(*args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _can_join(values: list[Tensor]) -> bool:
    """Whether they have other axes than four, and the same ones in front of the last three."""
    if all(each.ndim == AXES - 1 for each in values):
        return True
    # No set of shapes: hashing an axis that is open fixes its size.
    leading = values[0].shape[:-3]
    return values[0].ndim > AXES and all(each.shape[:-3] == leading for each in values[1:])


def _attention(function: Callable[..., Any], given: dict[str, Any], rest: tuple[Any, ...]) -> Any:
    """Attention of values with any leading axes, as that of values with four axes."""
    leading = given["query"].shape[:-3]
    values = [_four(given.pop(name)) for name in _VALUES]
    mask = given.pop("attn_mask", None)
    if mask is not None and mask.ndim > AXES:
        mask = mask.expand(*leading, *mask.shape[-3:]).flatten(0, -AXES)
    made = function(*values, mask, *rest, **given)
    return made.reshape(*leading, *made.shape[1:]) if leading else made[0]


def _four(values: Tensor) -> Tensor:
    return values[None] if values.ndim < AXES else values.flatten(0, -AXES)
