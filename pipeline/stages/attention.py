"""Attention with any number of axes, as an exporter takes it that knows four.

torch.onnx converts `scaled_dot_product_attention` of (batch, heads, tokens, channels) alone.
Networks that attend within windows have one axis more (hiera, nest); with one head there may be one
less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

AXES = 4


class FourAxes(TorchFunctionMode):
    """Lets attention see four axes while it is active: those before the last two become two.

    Each row of queries meets the keys that it met before, so results are the same. Attention whose
    heads share keys (`enable_gqa`) counts heads along one axis, and stays as it is.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take the place of a call of torch."""
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    """`scaled_dot_product_attention` of tensors with the same axes before the last two.

    Args:
        query: (..., queries, channels).
        key: (..., keys, channels).
        value: (..., keys, width).
        attn_mask: Anything that broadcasts to (..., queries, keys).
        rest: Further arguments by position.
        more: Further arguments by name.

    Returns:
        (..., queries, width).
    """
    if query.ndim == AXES:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **more)
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = _in_four(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
    found = F.scaled_dot_product_attention(
        _in_four(query), _in_four(key), _in_four(value), attn_mask, *rest, **more
    )
    return found.reshape(*query.shape[:-1], value.shape[-1])


def _in_four(tensor: Tensor) -> Tensor:
    """The same values in four axes; the first, which is the batch, stays what it is."""
    return tensor.unsqueeze(1) if tensor.ndim < AXES else tensor.flatten(1, -3)
