from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from care.fuse import fuse, scale_free_attention
from care.model import linear_attention
from pipeline.core.errors import ModelError

Images = Callable[[int, int], npt.NDArray[np.float32]]
Maker = Callable[[str], nn.Module]

VARIANTS = {"care_s0": 224, "care_s1": 224, "care_s2": 224, "care_tiny": 64}


class RoundToHalf(TorchDispatchMode):
    """Rounds the result of every operation to float16, computing it in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return pytree.tree_map(_half, func(*args, **(kwargs or {})))


class LargestResult(TorchDispatchMode):
    """Notes the largest magnitude of any operation's result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, float(result.abs().max()))
        return result


def _half(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.half().float() if is_float else value


def half(model: nn.Module, x: Tensor) -> Tensor:
    """Output of a network of which weights and all intermediate results are float16."""
    rounded = copy.deepcopy(model)
    for tensor in (*rounded.parameters(), *rounded.buffers()):
        tensor.data = _half(tensor.data)
    with torch.no_grad(), RoundToHalf():
        output: Tensor = rounded(_half(x))
    return output


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_networks_give_the_same_logits(
    name: str, parity_model: Maker, images: Images
) -> None:
    model, x = parity_model(name), torch.from_numpy(images(2, VARIANTS[name]))
    with torch.no_grad():
        expected, fused = model(x), fuse(model)(x)
    assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_finite_and_close(name: str, parity_model: Maker, images: Images) -> None:
    model, x = parity_model(name), torch.from_numpy(images(2, VARIANTS[name]))
    with torch.no_grad():
        expected = model(x)
    result = half(fuse(model), x)
    assert result.isfinite().all()
    assert (result - expected).norm() <= 5e-3 * expected.norm()


def test_published_attention_overflows_where_the_scale_free_form_does_not() -> None:
    torch.manual_seed(0)
    q, k = (3000 * torch.rand(1, 2, 16, 196) for _ in range(2))
    v = torch.randn(1, 2, 16, 196)
    exact = linear_attention(*(t.double() for t in (q, k, v)))
    with RoundToHalf():
        published = linear_attention(_half(q), _half(k), _half(v))
        ours = scale_free_attention(_half(q), _half(k), _half(v))
    assert not published.isfinite().all()
    assert (ours - exact).norm() <= 5e-3 * exact.norm()


SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weighted mean of the values that attention is, in float64 and without an epsilon."""
    q, k, v = (t.double() for t in (q, k, v))
    k = k / k.sum((-2, -1), keepdim=True)
    q = q / q.sum(-2, keepdim=True)
    return ((v @ k.transpose(-2, -1)) @ q) / (k.sum(-1, keepdim=True).transpose(-2, -1) @ q)


@pytest.mark.parametrize(("dim", "tokens"), [(16, 196), (32, 49), (32, 784)])
@pytest.mark.parametrize("signs", [1, -1], ids=["positive", "mixed"])
def test_half_precision_holds_for_any_scale_of_queries_keys_and_values(
    dim: int, tokens: int, signs: int
) -> None:
    torch.manual_seed(0)
    shape = (1, 2, dim, tokens)
    for scales in itertools.product(SCALES, repeat=3):
        q, k, v = (_half(scale * torch.rand(shape)) for scale in scales)
        if signs < 0:
            v = v * (torch.randint(0, 2, shape) * 2 - 1)
        with RoundToHalf():
            result = scale_free_attention(q, k, v)
        # As far from the largest value as four roundings are; NaN fails.
        assert (result - attended(q, k, v)).abs().max() <= 2e-3 * v.abs().max(), scales


def test_half_precision_holds_where_a_token_stands_out() -> None:
    """Tokens of one head whose queries differ by eight orders of magnitude each keep their own."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 1, 16, 49) for _ in range(3))
    q = _half(q * torch.logspace(-4, 4, 49))
    k = _half(k * torch.logspace(-2, 4, 49))
    with RoundToHalf():
        result = scale_free_attention(q, k, _half(v))
    assert (result - attended(q, k, _half(v))).abs().max() <= 2e-3


def test_intermediate_values_stay_within_the_documented_bounds() -> None:
    """All keys and queries of a head in one channel: the worst case, d times the values."""
    dim, tokens = 16, 49
    one = torch.zeros(1, 1, dim, tokens)
    one[:, :, 3] = 5000
    v = torch.full((1, 1, dim, tokens), 4000.0)
    with LargestResult() as seen:
        result = scale_free_attention(one, one, v)
    assert seen.largest == pytest.approx(dim * 4000)
    torch.testing.assert_close(result, v)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_scale_free_attention_is_the_published_one(scale: float) -> None:
    torch.manual_seed(0)
    q, k = (scale * torch.rand(2, 2, 16, 49, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 2, 16, 49, dtype=torch.float64)
    expected, result = linear_attention(q, k, v), scale_free_attention(q, k, v)
    # What is left is the published 1e-6 beside a normalizer of about 4 scale².
    assert (result - expected).norm() <= (1e-9 + 5e-7 / scale**2) * expected.norm()


def test_vanishing_queries_and_keys_give_zero_rather_than_nan() -> None:
    v = torch.randn(1, 1, 4, 9)
    zero = torch.zeros_like(v)
    for q, k in ((zero, v.abs()), (v.abs(), zero), (zero, zero)):
        assert scale_free_attention(q, k, v).isfinite().all()


def test_trained_statistics_fold() -> None:
    torch.manual_seed(0)
    model = timm.create_model("care_tiny", init_value=0.5).train()
    for _ in range(3):
        model(3 * torch.randn(4, 3, 64, 64) + 1)
    model.eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected, fused = model(x), fuse(model)(x)
    assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_input_stays_as_it_is(parity_model: Maker, images: Images) -> None:
    model = parity_model("care_tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    for parameter in fused.parameters():
        parameter.data.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())


def test_fused_form_has_no_norm_and_one_head(parity_model: Maker) -> None:
    fused = fuse(parity_model("care_tiny"))
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    assert not any(isinstance(module, norms) for module in fused.modules())
    assert sum(isinstance(module, nn.Linear) for module in fused.modules()) == 1


def test_fused_form_exports_with_a_dynamic_batch(parity_model: Maker, images: Images) -> None:
    fused = fuse(parity_model("care_tiny"))
    x = torch.from_numpy(images(2, 64))
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("permute" in operation for operation in operations)
    three = torch.from_numpy(images(3, 64))
    torch.testing.assert_close(program.module()(three), fused(three))


def unfit(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return change(timm.create_model("care_tiny").eval())


def poison(name: str, value: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.state_dict()[name].fill_(value)
        return model

    return change


def without_classifier(model: nn.Module) -> nn.Module:
    model.reset_classifier(0)  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), "evaluation mode"),
        (lambda model: model.half(), "float32"),
        (lambda model: model.to("meta"), "is on meta"),
        (lambda model: fuse(model), "in this form already"),
        (lambda model: nn.Linear(1, 1), "not a Linear"),
        (without_classifier, "num_classes is 0"),
        (poison("stem.0.weight", float("nan")), r"stem\.0\.weight holds NaN"),
        (poison("stem.1.running_var", -1.0), r"stem\.1\.running_var is negative"),
    ],
)
def test_unexpected_states_are_refused(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        fuse(unfit(change))
