"""Attention and what comes with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.emulate import kernels
from pipeline.emulate.onnx.operators.table import Call, operator


@operator("Attention")
def _attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Opset 23 to 25; the whole of it is one operation, rounded once."""
    flat = query.ndim == 3
    if flat:
        query = _heads(query, call.attribute("q_num_heads", 0))
        key, value = (_heads(t, call.attribute("kv_num_heads", 0)) for t in (key, value))
    before = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    shared = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(shared, 1) for t in (key, value))
    scale = math.sqrt(call.attribute("scale", 1 / math.sqrt(query.shape[-1])))
    scores = kernels.matmul(query * scale, keys.mT * scale, partial=call.partial)
    stages = [scores]
    if call.attribute("softcap", 0.0):
        limit = call.attribute("softcap", 0.0)
        scores = limit * torch.tanh(scores / limit)
    stages.append(scores)
    bias = _Bias(scores.shape, call, before, lengths).of(mask)
    stages.append(scores + bias)
    blind = (bias == -math.inf).all(-1, keepdim=True)
    shares = torch.softmax(stages[-1], -1).masked_fill(blind, 0.0)
    stages.append(shares)
    result = kernels.matmul(shares, values, partial=call.partial)
    result = result.transpose(1, 2).flatten(2) if flat else result
    return result, key, value, stages[call.attribute("qk_matmul_output_mode", 0)]


def _heads(x: Tensor, count: int) -> Tensor:
    """(batch, tokens, heads * channels) -> (batch, heads, tokens, channels)."""
    heads: Tensor = x.unflatten(2, (count, -1)).transpose(1, 2)
    return heads


@dataclass(frozen=True, slots=True)
class _Bias:
    """What is added to the scores: 0, minus infinity where a query may not see a key, or a mask.

    Attributes:
        shape: That of the scores: (batch, heads, queries, keys).
        call: The node's attributes.
        before: Keys from an earlier call.
        lengths: Keys of each sample that are not padding; None where all count.
    """

    shape: torch.Size
    call: Call
    before: int
    lengths: Tensor | None

    def of(self, mask: Tensor | None) -> Tensor:
        bias = torch.zeros(self.shape)
        if mask is not None:
            missing = self.shape[-1] - mask.shape[-1]
            rest = [(0, 0)] * (mask.ndim - 1)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            bias = bias + kernels.pad(mask, [*rest, (0, missing)], value=-math.inf)
        return bias.masked_fill(self._hidden(), -math.inf)

    def _hidden(self) -> Tensor:
        """Which keys a query may not see, broadcastable to the scores."""
        queries, keys = self.shape[-2:]
        offset = torch.tensor(self.before)
        hidden = torch.zeros(1, 1, 1, keys, dtype=torch.bool)
        if self.lengths is not None:
            lengths = self.lengths.reshape(-1, 1, 1, 1)
            offset = lengths - queries
            hidden = torch.arange(keys) >= lengths
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - offset
        if self.call.attribute("is_causal", 0):
            hidden = hidden | (distance > 0)
        left = self.call.attribute("left_window_size", -1)
        right = self.call.attribute("right_window_size", -1)
        if left >= 0:
            hidden = hidden | (distance < -left)
        if right >= 0:
            hidden = hidden | (distance > right)
        return hidden


@operator("RotaryEmbedding")
def _rotary_embedding(
    call: Call, x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None = None
) -> Tensor:
    heads = x if x.ndim == 4 else _heads(x, call.attribute("num_heads", 0))
    turned = call.attribute("rotary_embedding_dim", 0) or heads.shape[-1]
    if positions is not None:
        cosine, sine = cosine[positions.long()], sine[positions.long()]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)  # the same for all heads
    part, rest = heads[..., :turned], heads[..., turned:]
    interleaved = call.attribute("interleaved", 0)
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).mT
    first, second = pairs.unbind(-1)
    both = torch.stack([cosine * first - sine * second, sine * first + cosine * second], -1)
    result = torch.cat([(both if interleaved else both.mT).flatten(-2), rest], -1)
    return result if x.ndim == 4 else result.transpose(1, 2).flatten(2)
