"""Attention over any leading axes is that over four, and reaches ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.stages.attention import four_axes
from pipeline.stages.export import trace

OWN: Any = F.scaled_dot_product_attention


def attention(*args: Any, **kwargs: Any) -> Any:
    """What networks call, whatever it is by now."""
    return F.scaled_dot_product_attention(*args, **kwargs)


def values(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


class Axes(TorchFunctionMode):
    """Notes of how many axes the queries of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is OWN:
            self.seen.append(args[0].ndim)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "mask", "more"),
    [
        ((2, 3, 4, 5, 6), None, {}),
        ((2, 3, 4, 5, 6), (5, 5), {"scale": 0.7}),
        ((2, 3, 4, 5, 6), (4, 5, 5), {}),
        ((2, 3, 4, 5, 6), (3, 4, 5, 5), {}),
        ((2, 3, 4, 5, 6), (2, 1, 4, 5, 5), {}),
        ((2, 2, 3, 4, 5, 6), (1, 2, 3, 1, 5, 5), {}),
        ((3, 5, 6), (3, 5, 5), {}),
        ((3, 5, 6), None, {"is_causal": True}),
    ],
)
def test_attention_of_four_axes_is_the_same(
    shape: tuple[int, ...], mask: tuple[int, ...] | None, more: dict[str, Any]
) -> None:
    bias = None if mask is None else torch.randn(mask, generator=torch.Generator().manual_seed(1))
    if mask == (3, 4, 5, 5):
        bias = bias[None] if bias is not None else None
    expected = attention(*values(*shape), attn_mask=bias, **more)
    with Axes() as axes, four_axes():
        found = attention(*values(*shape), attn_mask=bias, **more)
        query, key, value = values(*shape)
        named = F.scaled_dot_product_attention(
            query=query, key=key, value=value, attn_mask=bias, **more
        )
    assert axes.seen == [4, 4]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(named, expected, rtol=1e-6, atol=1e-6)


def test_what_has_four_axes_or_cannot_be_joined_stays() -> None:
    query, key, value = values(2, 3, 4, 5, 6)
    with Axes() as axes, four_axes():
        attention(*values(2, 4, 5, 6))
        found = attention(query, key[:1], value[:1])
    assert axes.seen == [4, 5]
    torch.testing.assert_close(found, OWN(query, key[:1], value[:1]))


def test_torchs_own_function_is_back_after_a_fault() -> None:
    with four_axes():
        assert F.scaled_dot_product_attention is not OWN
    with pytest.raises(IndexError), four_axes():
        attention(*values(2, 2, 2), torch.zeros(7))
    assert F.scaled_dot_product_attention is OWN


class Windowed(nn.Module):
    """Attention in windows, as Hiera and NesT have it."""

    def forward(self, images: Tensor) -> Tensor:
        windows = images.reshape(-1, 3, 4, 4, 4).permute(0, 2, 1, 3, 4).contiguous()
        return F.scaled_dot_product_attention(windows, windows, windows).mean((1, 2)).flatten(1)


def test_attention_in_windows_reaches_onnx() -> None:
    import onnxruntime

    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    graph = trace(Windowed().eval(), images)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    more = np.concatenate([images, images[:1] * 2])
    (found,) = session.run(None, {"image": more})
    np.testing.assert_allclose(found, Windowed()(torch.from_numpy(more)), rtol=1e-5, atol=1e-6)
