"""Attention with any number of axes, as an exporter takes it that knows four.

torch.onnx converts `scaled_dot_product_attention` of (batch, heads, tokens, channels) alone.
Networks that attend within windows have one axis more (hiera, nest); with one head there may be one
less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

AXES = 4


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    """`scaled_dot_product_attention` by that of four axes: those before the last two become two.

    Each row of queries meets the keys that it met before, so results are the same. Attention whose
    heads share keys (`enable_gqa`) counts heads along one axis, and stays as it is.

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
    if query.ndim == AXES or more.get("enable_gqa"):
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
