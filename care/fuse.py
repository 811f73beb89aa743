"""The exact inference form of a trained CARE network.

`fuse` rewrites a network without changing what it computes, up to float32 rounding:

- a BatchNorm before an unpadded convolution becomes part of it, and so does the stem's after one;
- the two heads share pooling, GELU and normalization, so their affine parts and linear layers
  become one linear layer;
- the layer scale becomes part of the convolution that it follows;
- linear attention takes the scale-free form below, without a transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from care.model import (
    LARGEST_HALF,
    SMALLEST_NORMAL_HALF,
    AttentionMixer,
    Block,
    Care,
    ConvMixer,
    Head,
    check_image_size,
)
from pipeline.core.errors import ModelError


def scale_free_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention of which no intermediate value grows with the scale of q or k.

    The published form multiplies queries, keys and values and then divides by what queries and keys
    brought in, so that its intermediate values leave the range of float16 although its result is a
    weighted mean of the values. Here queries are divided by their sum over channels and keys by
    their mean over channels and tokens first. Both cancel in the quotient, whatever they are; what
    remains are numbers around 1 and the values.

    With d channels, and V the largest magnitude of a value:

    - A query's channels add up to 1, or to less than d where their sum exceeds float16: it is
      bounded by 65504, which is as good a divisor, since no query exceeds it.
    - Keys have mean 1 before the factor 1 / tokens; after it they add up to d over all channels.
      So a head's products with the values are V times the keys' sum over tokens: V where channels
      share the keys evenly, d V at most, if one channel has them all.
    - `attended` is a mean of these, weighted by the query: the same bounds, V and d V. `normalizer`
      is the same mean of the keys' sums: around 1, d at most.

    The lower bounds on the divisors take the place of the published 1e-6: they act only where a
    whole query, a whole head's keys, or all that a query and its keys have in common vanish in
    float16.

    Args:
        q: Queries after the feature map, all positive, (batch, heads, dim, tokens).
        k: Keys after the feature map, all positive, (batch, heads, dim, tokens).
        v: Values, (batch, heads, dim, tokens).

    Returns:
        The attended values, (batch, heads, dim, tokens).
    """
    # An overflow of this sum becomes the upper bound.
    q = q / q.sum(-2, keepdim=True).clamp(SMALLEST_NORMAL_HALF, LARGEST_HALF)
    scale_k = k.mean((-2, -1), keepdim=True).clamp(min=SMALLEST_NORMAL_HALF)
    # In two steps: scale times number of tokens may leave the range. What float16 makes of the
    # second factor cancels too, for both products below take the same k.
    k = k / scale_k * (1 / k.shape[-1])
    attended = (v @ k.transpose(-2, -1)) @ q
    normalizer = k.sum(-1, keepdim=True).transpose(-2, -1) @ q
    return attended / normalizer.clamp(min=SMALLEST_NORMAL_HALF)


@dataclass(frozen=True)
class _Affine:
    """What a BatchNorm or an affine LayerNorm does per channel: weight * x + bias, in float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | nn.LayerNorm) -> _Affine:
        weight, bias = norm.weight.double(), norm.bias.double()
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight = weight / (norm.running_var.double() + norm.eps).sqrt()
            bias = bias - weight * norm.running_mean.double()
        return cls(weight, bias)


def _rebuild(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A convolution like `conv` with other numbers, which are rounded to float32 only here."""
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device="meta",  # its own numbers would be thrown away
    )
    _hold(fused, weight, bias)
    return fused


def _hold(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a layer its numbers in float32: as parameters, or as they are if they learn."""
    for name, value in (("weight", weight.float()), ("bias", bias.float())):
        delattr(layer, name)
        setattr(layer, name, value if value.requires_grad else nn.Parameter(value, False))


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.bias.double() if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)


def _copy(conv: nn.Conv2d) -> nn.Conv2d:
    return _rebuild(conv, conv.weight.clone(), _bias(conv))


def _norm_then_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """Fold a norm into the convolution after it; exact because that has no padding."""
    if any(conv.padding) or conv.groups != 1:
        raise ModelError(
            "a norm folds only into an ungrouped convolution without padding, this one has "
            f"padding {conv.padding} and {conv.groups} groups"
        )
    affine, weight = _Affine.of(norm), conv.weight.double()
    bias = _bias(conv) + (weight * affine.bias.reshape(1, -1, 1, 1)).sum((1, 2, 3))
    return _rebuild(conv, weight * affine.weight.reshape(1, -1, 1, 1), bias)


def _conv_then_scale(conv: nn.Conv2d, affine: _Affine) -> nn.Conv2d:
    """Fold a per-channel weight and bias into the convolution before them."""
    weight = conv.weight.double() * affine.weight.reshape(-1, 1, 1, 1)
    return _rebuild(conv, weight, _bias(conv) * affine.weight + affine.bias)


class FusedAttentionMixer(nn.Module):
    """Scale-free linear attention beside 3x3 and 7x7 depthwise convolutions.

    Args:
        mixer: The mixer whose numbers to take.
    """

    def __init__(self, mixer: AttentionMixer) -> None:
        super().__init__()
        self.mem_dim, self.heads, self.head_dim = mixer.mem_dim, mixer.heads, mixer.head_dim
        self.qk = _copy(mixer.qk)
        self.dwconv1 = _copy(mixer.dwconv1)
        self.dwconv2 = _copy(mixer.dwconv2)

    def forward(self, wide: Tensor, small: Tensor, large: Tensor) -> list[Tensor]:
        """Mix three parts, (batch, mem_dim, height, width) each."""
        height, width = wide.shape[-2:]
        tokens = height * width
        # Queries and keys stay together through the feature map: half the operations.
        qk = (F.elu(self.qk(wide)) + 1).reshape(-1, 2 * self.heads, self.head_dim, tokens)
        q, k = qk.split(self.heads, dim=1)
        v = wide.reshape(-1, self.heads, self.head_dim, tokens)
        attended = scale_free_attention(q, k, v).reshape(-1, self.mem_dim, height, width)
        return [attended, self.dwconv1(small), self.dwconv2(large)]


class FusedConvMixer(nn.Module):
    """The convolutional mixer, unchanged but for taking its parts one by one.

    Args:
        mixer: The mixer whose numbers to take.
    """

    def __init__(self, mixer: ConvMixer) -> None:
        super().__init__()
        self.mem_dim = mixer.mem_dim
        self.dwconvatt_1 = _copy(mixer.dwconvatt_1)
        self.dwconvatt_2 = _copy(mixer.dwconvatt_2)
        self.dwconv1 = _copy(mixer.dwconv1)
        self.dwconv2 = _copy(mixer.dwconv2)

    def forward(self, wide: Tensor, small: Tensor, large: Tensor) -> list[Tensor]:
        """Mix three parts, (batch, mem_dim, height, width) each."""
        wide = self.dwconvatt_1(wide) + self.dwconvatt_2(wide)
        return [wide, self.dwconv1(small), self.dwconv2(large)]


class FusedBlock(nn.Module):
    """A CARE block without norms, with the layer scale folded.

    Args:
        block: The block whose numbers to take.
    """

    gamma: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        mixer, inter = block.token_mixer, block.inter_layer
        self.last = block.last
        self.token_mixer = (
            FusedAttentionMixer(mixer)
            if isinstance(mixer, AttentionMixer)
            else FusedConvMixer(mixer)
        )
        mem_dim = mixer.mem_dim
        self.split_sizes = [block.split_sizes[0], mem_dim, mem_dim, mem_dim]
        self.inter1_fc1 = _norm_then_conv(inter.inter1_norm, inter.inter1_fc1)
        self.inter1_conv = _copy(inter.inter1_conv)
        self.inter1_fc2 = _copy(inter.inter1_fc2)
        self.inter2_fc1 = _norm_then_conv(inter.inter2_norm, inter.inter2_fc1)
        self.inter2_conv = _copy(inter.inter2_conv)
        if not block.last:
            gamma = block.gamma.double()
            scale = _Affine(gamma, torch.zeros_like(gamma))
            self.inter2_fc2 = _conv_then_scale(inter.inter2_fc2, scale)
            self.register_buffer("gamma", gamma.float().reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width) -> the same, or ratios[1] * dim channels if last."""
        memory, *parts = x.split(self.split_sizes, dim=1)
        mixed = torch.cat(self.token_mixer(*parts), dim=1)
        hidden = self.inter1_conv(F.gelu(self.inter1_fc1(mixed)))
        joined = torch.cat([memory, self.inter1_fc2(hidden) + mixed], dim=1)
        hidden = self.inter2_conv(F.gelu(self.inter2_fc1(joined)))
        if self.last:
            return hidden  # type: ignore[no-any-return]
        return self.inter2_fc2(hidden) + (joined * self.gamma + x)  # type: ignore[no-any-return]


class FusedStage(nn.Module):
    """Downsampling with its norm folded, then fused blocks.

    Args:
        downsample: The step down, or None in the first stage.
        blocks: The blocks whose numbers to take.
    """

    def __init__(self, downsample: nn.Module | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*(FusedBlock(block) for block in blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels in, height, width) -> (batch, channels out, height', width')."""
        return self.blocks(self.downsample(x))  # type: ignore[no-any-return]


class FusedCare(nn.Module):
    """The exact inference form of a CARE network; make it with `fuse`.

    Args:
        model: A CARE network.
    """

    def __init__(self, model: Care) -> None:
        super().__init__()
        self.num_classes, self.in_chans = model.num_classes, model.in_chans
        self.num_features = model.num_features
        conv, norm = model.stem
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        self.stem = _conv_then_scale(conv, _Affine.of(norm))
        stages = []
        for stage in model.stages:
            down = stage.downsample
            fused = _norm_then_conv(*down) if isinstance(down, nn.Sequential) else None
            stages.append(FusedStage(fused, list(stage.blocks)))  # type: ignore[arg-type]
        self.stages = nn.Sequential(*stages)
        self.norm_eps = model.head.norm.eps
        self.head = _join_heads(model.head, model.dist_head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images.

        Args:
            x: Images, (batch, in_chans, height, width); height and width multiples of 32.

        Returns:
            (batch, num_classes).

        Raises:
            ModelError: The image size is no multiple of 32.
        """
        check_image_size(x)
        x = self.stages(self.stem(x))
        x = F.gelu(x.mean((2, 3)))
        x = F.layer_norm(x, (self.num_features,), eps=self.norm_eps)
        return self.head(x)  # type: ignore[no-any-return]


def _join_heads(head: Head, dist_head: Head) -> nn.Linear:
    """One linear layer for the mean of both heads, over their shared normalized features."""
    weight: Tensor | int = 0
    bias: Tensor | int = 0
    for one in (head, dist_head):
        affine = _Affine.of(one.norm)
        assert isinstance(one.fc, nn.Linear)
        matrix = one.fc.weight.double()
        weight = weight + matrix * affine.weight / 2
        bias = bias + (matrix @ affine.bias + one.fc.bias.double()) / 2
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    features = head.norm.normalized_shape[0]
    joined = nn.Linear(features, head.fc.out_features, device="meta")  # type: ignore[arg-type]
    _hold(joined, weight, bias)
    return joined


def fuse(model: nn.Module) -> FusedCare:
    """Return the exact inference form of a CARE network.

    Args:
        model: A `care.model.Care` in evaluation mode, in float32, with finite weights. It stays as
            it is, and shares nothing with the result.

    Returns:
        A module in evaluation mode, on the CPU, that gives the same logits.

    Raises:
        ModelError: The model is no CARE network, or in a state that has no exact inference form.
    """
    _check(model)
    assert isinstance(model, Care)
    with torch.no_grad():
        fused = FusedCare(model)
    return fused.eval().requires_grad_(False)


def fused_weights(model: Care) -> dict[str, Tensor]:
    """The weights of the exact inference form, by their names there, with gradients to the model's.

    Statistics of norms are taken as they are.
    """
    fused = FusedCare(model)
    weights: dict[str, Tensor] = {}
    for prefix, module in fused.named_modules():
        for name in ("weight", "bias", "gamma"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor):
                weights[f"{prefix}.{name}"] = value
    return weights


def _check(model: nn.Module) -> None:
    if not isinstance(model, Care):
        remedy = "; it is in this form already" if isinstance(model, FusedCare) else ""
        raise ModelError(f"fuse takes a CARE network, not a {type(model).__name__}{remedy}")
    if model.training:
        raise ModelError("fuse takes a model in evaluation mode: call model.eval() first")
    if model.num_classes == 0:
        raise ModelError("fuse takes a model with a classifier: num_classes is 0")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ModelError(
                f"{name} is on {tensor.device}: move the model to the CPU before fusing"
            )
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}: fuse takes float32, call model.float()")
        if not tensor.isfinite().all():
            raise ModelError(f"{name} holds NaN or infinity: the checkpoint is damaged")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ModelError(f"{name} is negative: the BatchNorm statistics are damaged")
