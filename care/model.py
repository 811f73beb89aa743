"""The CARE network: a mobile vision transformer with decoupled dual-interactive linear attention.

Source: "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction"
(CVPR 2025). State-dict names and shapes are those of the published checkpoints.

Every block splits its channels in two. A *memory* part passes untouched, the rest is mixed in three
equal parts: one with a wide view (linear attention in the late stages, crossed 11x1 and 1x11
depthwise convolutions in the early ones), one with a 3x3 and one with a 7x7 depthwise convolution.
Two interaction steps then bring the parts together again: first the three mixed parts, then these
and the memory.

    >>> import timm, care.networks
    >>> model = timm.create_model("care_s0", num_classes=1000)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from care import checkpoint
from pipeline.core.errors import ModelError

STRIDE = 32
"""Height and width of an input must be multiples of this: 4 (stem) x 2 x 2 x 2 (stages)."""

ATTENTION_EPS = 1e-6
"""What the published attention adds to its normalizer."""

SMALLEST_NORMAL_HALF = 2.0**-14
"""Smallest float16 that hardware without subnormal numbers does not flush to zero."""

LARGEST_HALF = 65504.0
"""Largest float16."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention in its published form (section 3.2 of the paper).

    This is the form to train with. In half precision its intermediate values overflow, see
    `care.fuse.scale_free_attention`.

    Args:
        q: Queries after the feature map, all positive, (batch, heads, dim, tokens).
        k: Keys after the feature map, all positive, (batch, heads, dim, tokens).
        v: Values, (batch, heads, dim, tokens).

    Returns:
        The attended values, (batch, heads, dim, tokens).
    """
    tokens = q.shape[-1]
    normalizer = 1 / (k.mean(-1, keepdim=True).transpose(-2, -1) @ q + ATTENTION_EPS)
    kv = (v @ k.transpose(-2, -1)) / tokens
    return (kv @ q) * normalizer


class AttentionMixer(nn.Module):
    """Mixes the three parts of a late stage: linear attention, 3x3 and 7x7 convolution.

    Args:
        mem_dim: Channels of each part.
        head_dim: Channels of one attention head; divides `mem_dim`.
    """

    def __init__(self, mem_dim: int, head_dim: int) -> None:
        super().__init__()
        if mem_dim % head_dim:
            raise ModelError(
                f"mem_dim {mem_dim} is no multiple of the attention head width {head_dim}; "
                "choose dimensions that divide"
            )
        self.mem_dim = mem_dim
        self.heads = mem_dim // head_dim
        self.head_dim = head_dim
        self.dwconv1 = _depthwise(mem_dim, 3)
        self.dwconv2 = _depthwise(mem_dim, 7)
        self.qk = nn.Conv2d(mem_dim, 2 * mem_dim, kernel_size=1)

    def forward(self, parts: Tensor) -> Tensor:
        """Mix `parts`, (batch, 3 mem_dim, height, width), keeping the shape."""
        wide, small, large = parts.split(self.mem_dim, dim=1)
        qk = F.elu(self.qk(wide)) + 1
        q, k = qk.split(self.mem_dim, dim=1)
        if torch.is_autocast_enabled(parts.device.type):
            # The published form overflows in half precision: mixed precision keeps it float32.
            with torch.autocast(parts.device.type, enabled=False):
                attended = linear_attention(*(self._heads(t.float()) for t in (q, k, wide)))
        else:
            attended = linear_attention(*(self._heads(t) for t in (q, k, wide)))
        wide = attended.to(wide.dtype).reshape(wide.shape)
        return torch.cat([wide, self.dwconv1(small), self.dwconv2(large)], dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, mem_dim, height, width) -> (batch, heads, head_dim, tokens)."""
        return x.reshape(x.shape[0], self.heads, self.head_dim, x.shape[2] * x.shape[3])


class ConvMixer(nn.Module):
    """Mixes the three parts of an early stage: 11x1 + 1x11, 3x3 and 7x7 depthwise convolutions.

    Args:
        mem_dim: Channels of each part.
    """

    def __init__(self, mem_dim: int) -> None:
        super().__init__()
        self.mem_dim = mem_dim
        self.dwconvatt_1 = _depthwise(mem_dim, (11, 1))
        self.dwconvatt_2 = _depthwise(mem_dim, (1, 11))
        self.dwconv1 = _depthwise(mem_dim, 3)
        self.dwconv2 = _depthwise(mem_dim, 7)

    def forward(self, parts: Tensor) -> Tensor:
        """Mix `parts`, (batch, 3 mem_dim, height, width), keeping the shape."""
        wide, small, large = parts.split(self.mem_dim, dim=1)
        wide = self.dwconvatt_1(wide) + self.dwconvatt_2(wide)
        return torch.cat([wide, self.dwconv1(small), self.dwconv2(large)], dim=1)


class Interaction(nn.Module):
    """The dual interaction: among the mixed parts, then between them and the memory.

    Args:
        dim: Channels of the block: memory and parts together.
        mem_dim: Channels of one of the three parts.
        ratios: Expansion ratios of the two steps.
        last: End after the second depthwise convolution, so that the classification heads see
            `ratios[1] * dim` channels (only the network's very last block).
    """

    def __init__(self, dim: int, mem_dim: int, ratios: tuple[int, int], last: bool) -> None:
        super().__init__()
        parts = 3 * mem_dim
        hidden1, hidden2 = ratios[0] * parts, ratios[1] * dim
        self.last = last
        self.inter1_norm = nn.BatchNorm2d(parts)
        self.inter1_fc1 = nn.Conv2d(parts, hidden1, kernel_size=1)
        self.inter1_conv = _depthwise(hidden1, 3)
        self.inter1_fc2 = nn.Conv2d(hidden1, parts, kernel_size=1)
        self.inter2_norm = nn.BatchNorm2d(dim)
        self.inter2_fc1 = nn.Conv2d(dim, hidden2, kernel_size=1)
        self.inter2_conv = _depthwise(hidden2, 3)
        if not last:
            self.inter2_fc2 = nn.Conv2d(hidden2, dim, kernel_size=1)

    def forward(self, memory: Tensor, parts: Tensor) -> Tensor:
        """Join `memory` and `parts`, (batch, channels, height, width) each."""
        x = self.inter1_conv(F.gelu(self.inter1_fc1(self.inter1_norm(parts))))
        parts = self.inter1_fc2(x) + parts
        joined = torch.cat([memory, parts], dim=1)
        hidden: Tensor = self.inter2_conv(F.gelu(self.inter2_fc1(self.inter2_norm(joined))))
        return hidden if self.last else self.inter2_fc2(hidden) + joined


class Block(nn.Module):
    """One CARE block: decouple, mix, interact, with layer scale and a residual.

    Args:
        dim: Channels.
        mem_dim: Channels of each of the three mixed parts.
        head_dim: Width of an attention head, or None for the convolutional mixer.
        ratios: Expansion ratios of the two interaction steps.
        drop_path: Probability of dropping the branch in training.
        init_value: Initial value of the layer scale.
        last: This is the network's last block, see `Interaction`.
    """

    def __init__(
        self,
        dim: int,
        mem_dim: int,
        head_dim: int | None,
        ratios: tuple[int, int],
        drop_path: float,
        init_value: float,
        last: bool,
    ) -> None:
        super().__init__()
        self.last = last
        self.split_sizes = [dim - 3 * mem_dim, 3 * mem_dim]
        self.token_mixer = AttentionMixer(mem_dim, head_dim) if head_dim else ConvMixer(mem_dim)
        self.inter_layer = Interaction(dim, mem_dim, ratios, last)
        if not last:
            self.gamma = nn.Parameter(torch.full((dim,), init_value))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width) -> the same, or ratios[1] * dim channels if last."""
        memory, parts = x.split(self.split_sizes, dim=1)
        branch = self.inter_layer(memory, self.token_mixer(parts))
        if self.last:
            return self.drop_path(branch)  # type: ignore[no-any-return]
        return x + self.drop_path(branch * self.gamma.reshape(1, -1, 1, 1))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A downsampling step and a sequence of blocks.

    Args:
        downsample: Halves the resolution and widens the channels; identity in the first stage.
        blocks: The stage's blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels in, height, width) -> (batch, channels out, height', width')."""
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)  # type: ignore[no-any-return]
        return self.blocks(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Classifier over pooled features: GELU, LayerNorm, linear.

    Args:
        in_features: Channels that the last block gives.
        num_classes: Number of classes; 0 leaves the features as they are.
        drop_rate: Dropout before the linear layer.
    """

    def __init__(self, in_features: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer by a fresh one with `num_classes` outputs."""
        features = self.norm.normalized_shape[0]
        self.fc = nn.Linear(features, num_classes) if num_classes > 0 else nn.Identity()
        _init_weights(self.fc)

    def forward(self, pooled: Tensor, pre_logits: bool = False) -> Tensor:
        """(batch, in_features) -> (batch, num_classes)."""
        features: Tensor = self.drop(self.norm(F.gelu(pooled)))
        return features if pre_logits else self.fc(features)


class Care(nn.Module):
    """The CARE network.

    In training mode `forward` returns the pair (head, distillation head); in evaluation mode it
    returns the mean of the two.

    Args:
        depths: Blocks of each stage.
        feature_dims: Channels of the three mixed parts together, of each stage.
        mem_dims: Channels of one mixed part, of each stage. The memory part is as wide, so a stage
            has `feature_dims + mem_dims` channels.
        ratios: Expansion ratios of the two interaction steps, of each stage.
        head_dims: Attention head width of each stage; None for a convolutional mixer.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Image channels.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        init_value: Initial layer scale.

    Raises:
        ModelError: The dimensions do not fit together.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        feature_dims: tuple[int, ...],
        mem_dims: tuple[int, ...],
        ratios: tuple[tuple[int, int], ...],
        head_dims: tuple[int | None, ...] = (None, None, 16, 32),
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_value: float = 1e-6,
    ) -> None:
        super().__init__()
        dims = [f + m for f, m in zip(feature_dims, mem_dims, strict=True)]
        if any(f != 3 * m for f, m in zip(feature_dims, mem_dims, strict=True)):
            raise ModelError(
                f"feature_dims {feature_dims} must be three times mem_dims {mem_dims}: "
                "the mixer has three equal parts"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), nn.BatchNorm2d(dims[0])
        )
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages = []
        for i, depth in enumerate(depths):
            is_last_stage = i == len(depths) - 1
            blocks = [
                Block(
                    dims[i],
                    mem_dims[i],
                    head_dims[i],
                    ratios[i],
                    drop_path=drop_paths.pop(0),
                    init_value=init_value,
                    last=is_last_stage and j == depth - 1,
                )
                for j in range(depth)
            ]
            stages.append(Stage(_downsample(dims[i - 1], dims[i]) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = ratios[-1][1] * dims[-1]
        self.feature_info = [
            {
                "num_chs": dims[i] if i < len(dims) - 1 else self.num_features,
                "reduction": 4 * 2**i,
                "module": f"stages.{i}",
            }
            for i in range(len(dims))
        ]
        self.head = Head(self.num_features, num_classes, drop_rate)
        self.dist_head = Head(self.num_features, num_classes, drop_rate)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before pooling.

        Args:
            x: Images, (batch, in_chans, height, width); height and width multiples of 32.

        Returns:
            (batch, num_features, height / 32, width / 32).

        Raises:
            ModelError: The image size is no multiple of 32.
        """
        check_image_size(x)
        return self.stages(self.stem(x))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify a feature map.

        Args:
            x: Feature map, (batch, num_features, height, width).
            pre_logits: Stop before the linear layers.

        Returns:
            (batch, num_classes): the mean of both heads. In training mode the pair
            (head, distillation head).
        """
        pooled = x.mean((2, 3))
        logits = self.head(pooled, pre_logits)
        distilled = self.dist_head(pooled, pre_logits)
        if self.training:
            return logits, distilled
        return (logits + distilled) / 2  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images to logits; see `forward_features` and `forward_head`."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The linear layers of (head, distillation head)."""
        return self.head.fc, self.dist_head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both linear layers by fresh ones.

        Args:
            num_classes: Number of classes of the new classifier; 0 for none.
            global_pool: For timm's interface; the network knows only "avg".

        Raises:
            ModelError: `global_pool` is something else than "avg".
        """
        if global_pool not in (None, "avg"):
            raise ModelError(f"global_pool {global_pool!r} is not available: CARE pools by 'avg'")
        self.num_classes = num_classes
        self.head.reset(num_classes)
        self.dist_head.reset(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone: the layer scales."""
        return {name for name, _ in self.named_parameters() if name.endswith("gamma")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for timm's layer decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None)]}
        # A step down counts with its stage's first block.
        downsample = (r"^stages\.(\d+)\.downsample", (0,))
        return {"stem": r"^stem", "blocks": [downsample, (r"^stages\.(\d+)\.blocks\.(\d+)", None)]}


def check_image_size(x: Tensor) -> None:
    """Raise ModelError unless height and width of (batch, channels, height, width) fit."""
    height, width = x.shape[-2:]
    if height % STRIDE or width % STRIDE:
        raise ModelError(
            f"image size {height}x{width} does not fit: height and width must be multiples of "
            f"{STRIDE}, such as {max(STRIDE, round(height / STRIDE) * STRIDE)}x"
            f"{max(STRIDE, round(width / STRIDE) * STRIDE)}"
        )


def _depthwise(channels: int, kernel: int | tuple[int, int]) -> nn.Conv2d:
    """A depthwise convolution that keeps the resolution."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2)
    return nn.Conv2d(channels, channels, (height, width), padding=padding, groups=channels)


def _downsample(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(in_dim), nn.Conv2d(in_dim, out_dim, 2, stride=2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**overrides: Any) -> dict[str, Any]:
    """How timm describes a variant: the published evaluation unless overridden."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": ("head.fc", "dist_head.fc"),
        **overrides,
    }


default_cfgs = generate_default_cfgs(
    {
        "care_s0": _cfg(),
        "care_s1": _cfg(),
        "care_s2": _cfg(),
        # Ours, not the paper's: small enough to train on two CPU cores, see configs/.
        "care_tiny": _cfg(
            num_classes=10,
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            crop_pct=1.0,
            mean=(0.286, 0.286, 0.286),
            std=(0.353, 0.353, 0.353),
        ),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **structure: Any) -> Care:
    """Build a variant; `pretrained` is possible only where this package carries the weights."""
    embedded = checkpoint.embedded(variant) if pretrained else None
    if pretrained and embedded is None:
        raise ModelError(
            f"{variant} has no weights to download: create it without pretrained=True and read "
            "the published file with care.checkpoint.load"
        )
    builder: Callable[..., Care] = build_model_with_cfg
    model = builder(
        Care,
        variant,
        False,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{"num_classes": default_cfgs[variant].default.num_classes, **structure, **kwargs},
    )
    if embedded is not None:
        checkpoint.load(embedded, model)
    return model


@register_model  # type: ignore[untyped-decorator]
def care_s0(pretrained: bool = False, **kwargs: Any) -> Care:
    """CARE-S0: 7.3 M parameters, 0.7 GMACs at 224, 78.4 % published ImageNet top-1."""
    return _create(
        "care_s0",
        pretrained,
        kwargs,
        depths=(2, 4, 8, 4),
        feature_dims=(24, 48, 96, 192),
        mem_dims=(8, 16, 32, 64),
        ratios=((2, 2), (2, 4), (4, 4), (4, 4)),
    )


@register_model  # type: ignore[untyped-decorator]
def care_s1(pretrained: bool = False, **kwargs: Any) -> Care:
    """CARE-S1: 9.6 M parameters, 1.0 GMACs at 224, 80.1 % published ImageNet top-1."""
    return _create(
        "care_s1",
        pretrained,
        kwargs,
        depths=(3, 6, 10, 6),
        feature_dims=(24, 48, 96, 192),
        mem_dims=(8, 16, 32, 64),
        ratios=((2, 4), (2, 4), (4, 4), (4, 4)),
    )


@register_model  # type: ignore[untyped-decorator]
def care_s2(pretrained: bool = False, **kwargs: Any) -> Care:
    """CARE-S2: 19.5 M parameters, 1.9 GMACs at 224, 82.1 % published ImageNet top-1."""
    return _create(
        "care_s2",
        pretrained,
        kwargs,
        depths=(3, 6, 10, 6),
        feature_dims=(24, 48, 144, 288),
        mem_dims=(8, 16, 48, 96),
        ratios=((4, 4), (4, 4), (4, 4), (4, 4)),
    )


@register_model  # type: ignore[untyped-decorator]
def care_tiny(pretrained: bool = False, **kwargs: Any) -> Care:
    """CARE-tiny: ours, not the paper's; 64x64 images, 10 classes, trained on Fashion-MNIST."""
    return _create(
        "care_tiny",
        pretrained,
        kwargs,
        depths=(1, 2, 3, 2),
        feature_dims=(24, 48, 48, 96),
        mem_dims=(8, 16, 16, 32),
        ratios=((2, 2), (2, 3), (3, 3), (3, 3)),
        head_dims=(None, None, 16, 16),
    )
