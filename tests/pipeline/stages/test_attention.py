"""Attention of any number of axes computes in four what it computes in its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from care.traceable import Replaced
from pipeline.stages.attention import attention
from pipeline.stages.export import trace

FOUR_AXES = {F.scaled_dot_product_attention: attention}
QUERIES, KEYS, CHANNELS, WIDTH = 3, 4, 8, 6


class Seen(TorchFunctionMode):
    """Remembers how many axes queries have where torch itself attends."""

    def __init__(self) -> None:
        super().__init__()
        self.axes: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.axes.append(args[0].ndim)
        return function(*args, **(kwargs or {}))


def tensors(*leading: int, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    made = torch.Generator().manual_seed(len(leading))
    shapes = ((QUERIES, CHANNELS), (keys, CHANNELS), (keys, WIDTH))
    query, key, value = (torch.randn(*leading, *shape, generator=made) for shape in shapes)
    return query, key, value


def mask(*shape: int) -> Tensor:
    """Something else for each pair."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "asked",
    [{}, {"scale": 0.5}, {"is_causal": True}, {"attn_mask": mask(QUERIES, KEYS)}],
    ids=["plain", "scale", "causal", "mask of pairs"],
)
def test_four_axes_give_what_more_or_fewer_give(
    leading: tuple[int, ...], asked: dict[str, Any]
) -> None:
    given = tensors(*leading)
    expected = F.scaled_dot_product_attention(*given, **asked)
    with Seen() as seen, Replaced(FOUR_AXES):
        found = F.scaled_dot_product_attention(*given, **asked)
    assert seen.axes == [4]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "shape", [(2, 5, 3, QUERIES, KEYS), (2, 1, 3, QUERIES, KEYS), (3, 1, KEYS), (1, QUERIES, 1)]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_mask_that_broadcasts_reaches_the_same_pairs(
    shape: tuple[int, ...], by_name: bool
) -> None:
    query, key, value = tensors(2, 5, 3)
    expected = F.scaled_dot_product_attention(query, key, value, mask(*shape))
    with Seen() as seen, Replaced(FOUR_AXES):
        if by_name:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask(*shape))
        else:
            found = F.scaled_dot_product_attention(query, key, value, mask(*shape))
    assert seen.axes == [4]
    torch.testing.assert_close(found, expected)


def test_heads_that_share_keys_stay_as_they_are() -> None:
    query, _, _ = tensors(2, 4)
    _, key, value = tensors(2, 2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with Replaced(FOUR_AXES):
        found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    with Seen() as seen, Replaced(FOUR_AXES):
        F.scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True)
    assert seen.axes == [5]


class Windows(nn.Module):
    """Attends within windows of four pixels: (batch, heads, windows, pixels, channels)."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, (batch, 2)."""
        tokens = images.flatten(2).reshape(len(images), 2, 4, 4, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).mean((2, 3, 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_that_attends_within_windows_is_exported(dynamic: bool) -> None:
    images = np.random.default_rng(0).standard_normal((3, 8, 4, 4)).astype(np.float32)
    model = trace(Windows().eval(), images, dynamic=dynamic)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"image": images})
    expected = Windows()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
