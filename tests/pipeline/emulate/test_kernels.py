"""What the operator tests do not reach: narrow accumulators, axes that ONNX does not have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from pipeline.emulate import kernels, rounding
from pipeline.emulate.beside import side_by_side

MOST_SECONDS = 5.0
"""Of one core: it takes 0.3 where a step reads its own products, and 60 where each reads all."""

half = partial(rounding.round_to, dtype=torch.float16)


def test_narrow_accumulator_without_rounding_changes_nothing() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 40), torch.randn(3, 40, 7)
    torch.testing.assert_close(kernels.matmul(a, b, partial=lambda t: t), a @ b)
    torch.testing.assert_close(kernels.matmul(a, b[0, :, 0], partial=lambda t: t), a @ b[0, :, 0])
    x, w, bias = torch.randn(2, 80, 6, 6), torch.randn(8, 40, 3, 3), torch.randn(8)
    settings = {"strides": (1, 1), "pads": [(1, 1), (1, 1)], "dilations": (1, 1), "groups": 2}
    result = kernels.conv(x, w, bias, partial=lambda t: t, **settings)  # type: ignore[arg-type]
    expected = F.conv2d(x, w, bias, padding=1, groups=2)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_narrow_accumulator_overflows_where_the_sum_does_not() -> None:
    a = torch.cat([torch.full((1, 16), 100.0), torch.full((1, 16), -100.0)], dim=1)
    b = torch.full((32, 1), 50.0)
    assert kernels.matmul(a, b).item() == 0
    assert kernels.matmul(a, b, partial=half).isinf().all()
    x, w = a.reshape(1, 32, 1, 1), b.reshape(1, 32, 1, 1)
    settings = {"strides": (1, 1), "pads": [(0, 0), (0, 0)], "dilations": (1, 1)}
    assert kernels.conv(x, w, partial=half, **settings).isinf().all()  # type: ignore[arg-type]


def test_narrow_accumulators_touch_a_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier of VGG has 25,088 products: all of it at each of 1,568 steps took hours."""
    read = 0
    convolve = kernels._CONVOLVE[4]

    def counted(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        assert weight.untyped_storage().nbytes() <= 4 * weight.numel()
        nonlocal read
        read += weight.numel()
        return convolve(x, weight, *others)

    monkeypatch.setitem(kernels._CONVOLVE, 4, counted)
    x, weight = torch.ones(1, 512, 7, 7), torch.ones(64, 512, 7, 7)
    settings = {"strides": (1, 1), "pads": [(0, 0), (0, 0)], "dilations": (1, 1)}
    start = time.process_time()
    result = kernels.conv(x, weight, partial=lambda t: t, **settings)  # type: ignore[arg-type]
    assert time.process_time() - start < MOST_SECONDS
    assert torch.equal(result, torch.full((1, 64, 1, 1), 25088.0))
    assert read == weight.numel()


@pytest.mark.parametrize(
    ("channels", "out", "groups", "kernel"),
    [
        (3, 4, 1, (3, 3)),
        (16, 5, 1, (3, 2)),
        (24, 6, 2, (2, 2)),
        (40, 2, 1, (1, 1)),
        (6, 6, 6, (5, 5)),
    ],
)
def test_convolutions_round_their_sums_every_sixteen_products(
    channels: int, out: int, groups: int, kernel: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    depth = channels // groups
    x, w = half(torch.randn(2, channels, 9, 8)), half(torch.randn(out, depth, *kernel))
    settings = {"strides": (2, 1), "pads": [(1, 0), (2, 1)], "dilations": (1, 2), "groups": groups}
    result = kernels.conv(x, w, partial=half, **settings)  # type: ignore[arg-type]
    # Each product by itself, positions of the kernel after each other, channels side by side.
    padded = F.pad(x, (2, 1, 1, 0))
    columns = F.unfold(padded, kernel, dilation=(1, 2), stride=(2, 1))
    columns = columns.reshape(2, groups, depth, kernel[0] * kernel[1], -1).transpose(2, 3)
    weights = w.reshape(groups, out // groups, depth, -1).transpose(2, 3).flatten(2)
    total = torch.zeros(())
    for first in range(0, weights.shape[2], 16):
        step = slice(first, first + 16)
        total = half(total + weights[:, :, step] @ columns.flatten(2, 3)[:, :, step])
    # float32 sums of 16 products differ in their order, and so may a last place of the half.
    expected = total.reshape(result.shape)
    assert (result - expected).abs().max() <= 2**-8
    assert (result != expected).float().mean() < 0.02
    once = half(kernels.conv(x, w, **settings))  # type: ignore[arg-type]
    steps = -(-depth * kernel[0] * kernel[1] // 16)
    assert steps == 1 or (once != expected).float().mean() > 0.1


def test_einsum_with_a_narrow_accumulator_computes_the_same() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5), torch.randn(5, 2, 4, 6)
    for equation in ("abcd,dace->abe", "abcd,dace->eabc", "abcd, dace -> ", "abcd,dace"):
        expected = torch.einsum(equation.replace(" ", ""), a, b)
        result = kernels.einsum(equation, [a, b], partial=lambda t: t)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_transposed_convolution_with_a_narrow_accumulator_computes_the_same() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 6, 5, 4), torch.randn(6, 4, 3, 2)
    settings = {"strides": (2, 3), "dilations": (2, 1), "groups": 2}
    expected = kernels.conv_transpose(x, w, **settings)  # type: ignore[arg-type]
    result = kernels.conv_transpose(x, w, partial=lambda t: t, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "tried"),
    [
        ((2, 2), (7, 7), True),
        ((2, 3), (9, 9), True),
        ((2, 3), (7, 9), True),
        ((14, 14), (1, 11), True),
        ((16, 12), (13, 13), True),
        ((2, 2), (5, 5), False),
        ((3, 3), (7, 7), False),
        ((2, 9), (7, 7), False),
        ((14, 14), (11, 1), False),
    ],
)
def test_wide_kernels_have_the_bits_of_the_slow_form(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    kernel: tuple[int, int],
    biased: bool,
    tried: bool,
) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(9, 32, *size), torch.randn(32, 1, *kernel)
    bias, padding = torch.randn(32) if biased else None, [k // 2 for k in kernel]
    expected = F.conv2d(x, w, bias, 1, padding, 1, 32)
    same = kernels._has_the_same_bits(tuple(x.shape[1:]), kernel, tuple(padding))
    by_pixels: list[bool] = []
    convolve = F.conv2d

    def noted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        by_pixels.append(x.is_contiguous(memory_format=torch.channels_last))
        return convolve(x, *rest)

    monkeypatch.setattr(F, "conv2d", noted)
    monkeypatch.setitem(kernels._CONVOLVE, 4, noted)
    pads = [(p, p) for p in padding]
    found = kernels.conv(x, w, bias, strides=[1, 1], pads=pads, dilations=[1, 1], groups=32)
    assert torch.equal(found, expected)
    assert by_pixels == [tried and same]
    # The general form's own sign: on every CPU of x86 it is what such kernels meet.
    assert same or size != (2, 2) or kernel != (7, 7)


def test_wide_kernels_work_for_many_images_at_once() -> None:
    kernels._has_the_same_bits.cache_clear()  # it is asked where many images run at once
    x, w, bias = torch.randn(5, 1, 16, 2, 2), torch.randn(16, 1, 7, 7), torch.randn(16)
    settings = {"strides": [1, 1], "pads": [(3, 3)] * 2, "dilations": [1, 1], "groups": 16}
    found = torch.vmap(lambda image: kernels.conv(image, w, bias, **settings))(x)  # type: ignore[arg-type]
    assert torch.equal(found[:, 0], F.conv2d(x[:, 0], w, bias, 1, 3, 1, 16))


@pytest.mark.parametrize(("step", "apart"), [(2, 1), (1, 2)])
def test_wide_kernels_keep_strides_and_dilations(step: int, apart: int) -> None:
    x, w, pad = torch.randn(2, 16, 2, 2), torch.randn(16, 1, 7, 7), 3 * apart
    found = kernels.conv(
        x, w, strides=[step] * 2, pads=[(pad, pad)] * 2, dilations=[apart] * 2, groups=16
    )
    assert torch.equal(found, F.conv2d(x, w, None, step, pad, apart, 16))


def test_where_bits_would_differ_the_slow_form_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = torch.randn(4, 24, 2, 2), torch.randn(24, 1, 7, 7), torch.randn(24)
    expected = F.conv2d(x, w, bias, 1, 3, 1, 24)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_by_pixels", lambda x, *_: torch.zeros_like(x))
        settings = {"strides": [1, 1], "pads": [(3, 3)] * 2, "dilations": [1, 1], "groups": 24}
        assert torch.equal(kernels.conv(x, w, bias, **settings), expected)  # type: ignore[arg-type]
    kernels._has_the_same_bits.cache_clear()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("images", "size", "kernel", "stride", "groups"),
    [
        (4, 28, 1, 1, 1),
        (1, 28, 1, 1, 1),  # one image of few values has another kernel
        (1, 40, 1, 1, 1),
        (1, 28, 1, 1, 24),
        (2, 7, 1, 1, 1),
        (4, 28, 1, 2, 1),
        (4, 28, 3, 1, 1),
        (4, 28, 3, 1, 24),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_beside_have_the_bits_of_those_of_several_threads(
    images: int, size: int, kernel: int, stride: int, groups: int, biased: bool
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(images, 24, size, size), torch.randn(48, 24 // groups, kernel, kernel)
    bias = torch.randn(48) if biased else None
    pads = [(kernel // 2, kernel // 2)] * 2

    def convolved() -> torch.Tensor:
        settings = {"strides": [stride] * 2, "pads": pads, "dilations": [1, 1], "groups": groups}
        return kernels.conv(x, w, bias, **settings)  # type: ignore[arg-type]

    expected = F.conv2d(x, w, bias, stride, kernel // 2, 1, groups)
    with side_by_side(2) as pool:
        assert torch.equal(pool.submit(convolved).result(), expected)


def test_gelu_of_infinity_is_infinity() -> None:
    for x in (torch.full((1,), math.inf), torch.full((40,), math.inf)):
        assert torch.equal(kernels.gelu(x), x)
        assert kernels.gelu(-x).isnan().all()  # minus infinity times 0
    assert kernels.gelu(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


def test_gelu_of_infinity_where_torch_says_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its kernels runs depends on the CPU, and not all of them do."""

    def vectorized(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        return own(x, approximate=approximate).masked_fill(x == math.inf, math.nan)

    own = F.gelu
    monkeypatch.setattr(F, "gelu", vectorized)
    found = kernels.gelu(torch.tensor([math.inf, -math.inf, math.nan, 1.0])).tolist()
    assert found[0] == math.inf
    assert [math.isnan(value) for value in found] == [False, True, True, False]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_has_the_bits_of_the_slow_form(approximate: Literal["none", "tanh"]) -> None:
    edges = [math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45, -40.0, -5.0]
    x = torch.cat([torch.tensor(edges), 4 * torch.randn(10_000)])
    expected = torch.where(x == math.inf, x, F.gelu(x, approximate=approximate))
    result = kernels.gelu(x, approximate)
    assert torch.equal(result.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(result[known].view(torch.int32), expected[known].view(torch.int32))


def test_normalization_of_a_single_value_gives_the_shift() -> None:
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(2, 3, 1, 1), torch.randn(3), torch.randn(3)
    expected = beta[:, None, None].expand(2, 3, 1, 1)
    for result in (
        kernels.instance_norm(x, gamma, beta, 1e-5),
        kernels.group_norm(x, 3, gamma, beta, 1e-5),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_slices_backwards_begin_at_the_first_value_at_the_least() -> None:
    x = torch.arange(3)
    assert kernels.slice_axes(x, [-9], [-9], [0], [-1]).tolist() == [0]
    assert kernels.slice_axes(x, [9], [-9], [0], [-2]).tolist() == [2, 0]
    assert kernels.slice_axes(x, [-2], [9], [0], [1]).tolist() == [1, 2]
    assert kernels.slice_axes(x[:0], [-1], [-9], [0], [-1]).tolist() == []


def test_layer_norm_over_channels() -> None:
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(2, 6, 3, 4), torch.randn(6), torch.randn(6)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), gamma, beta, 1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(kernels.layer_norm(x, [1], gamma, beta, 1e-5), expected)
    plain = kernels.layer_norm(x, [1], None, None, 1e-5)
    torch.testing.assert_close(plain.mean(1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "stride"), [(7, 1), (7, 2), (8, 2), (9, 4)])
def test_same_padding_gives_every_stride_a_position(size: int, stride: int) -> None:
    for behind in (True, False):
        pads = kernels.same_pads([size], [3], [stride], [2], extra_behind=behind)
        y = kernels.conv(
            torch.ones(1, 1, size), torch.ones(1, 1, 3), strides=[stride], pads=pads, dilations=[2]
        )
        assert y.shape[-1] == -(-size // stride)
        before, after = pads[0]
        assert (after - before if behind else before - after) in (0, 1)


def test_dequantize_inverts_quantize_within_half_a_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 10)
    scale = torch.rand(3, 4) / 10 + 0.01  # blocks of 3; the last holds one entry
    position = kernels.quantize(x, scale, None, axis=1, block=3, integer=True)
    assert torch.equal(position, position.round())
    back = kernels.dequantize(position, scale, None, axis=1, block=3)
    assert ((back - x).abs() <= scale.repeat_interleave(3, 1)[:, :10] / 2 + 1e-6).all()


def test_reduce_without_axes_keeps_the_shape() -> None:
    x = torch.tensor([[-3.0, 4.0]])
    assert kernels.reduce("l2", x, [], keep=True).tolist() == [[3.0, 4.0]]
    assert kernels.reduce("sum", torch.tensor(2.0), [], keep=False).item() == 2


@pytest.mark.parametrize(
    "kernel",
    [kernels.gelu, kernels.sign, kernels.hard_swish, kernels.elu],
    ids=lambda k: k.__name__,
)
def test_kernels_ask_nothing_of_values(kernel: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Many images are evaluated at once by torch.vmap, which cannot answer."""
    values = torch.tensor([[-1.0, 0.0, 2.0], [math.inf, -2.0, 0.5]])
    expected = torch.stack([kernel(row) for row in values])
    torch.testing.assert_close(torch.vmap(kernel)(values), expected, equal_nan=True)
