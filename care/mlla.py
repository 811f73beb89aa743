"""MLLA-T, the published comparison to CARE.

Source: "Demystify Mamba in Vision: A Linear Attention Perspective" (NeurIPS 2024). State-dict
names and shapes are those of the published checkpoint, except that the rotary positions are stored
as real pairs (cosine, sine) in place of complex numbers, which no deployment format can express.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from care.model import ATTENTION_EPS, LARGEST_HALF, SMALLEST_NORMAL_HALF, check_image_size
from pipeline.core.errors import ModelError


class ConvLayer(nn.Module):
    """Convolution with an optional BatchNorm and an optional ReLU.

    Args:
        in_dim: Input channels.
        out_dim: Output channels.
        kernel: Kernel size; the padding keeps the resolution at stride 1.
        stride: Stride.
        groups: Groups of the convolution.
        bias: The convolution has a bias.
        norm: A BatchNorm follows.
        act: A ReLU ends the layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_dim) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_dim, height, width) -> (batch, out_dim, height', width')."""
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class Stem(nn.Module):
    """Five convolutions that divide the resolution by 4.

    Args:
        in_chans: Image channels.
        dim: Output channels.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvLayer(in_chans, half, 3, stride=2, bias=False)
        self.conv2 = nn.Sequential(
            ConvLayer(half, half, 3, bias=False), ConvLayer(half, half, 3, bias=False, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(half, 4 * dim, 3, stride=2, bias=False),
            ConvLayer(4 * dim, dim, 1, bias=False, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) -> (batch, dim, height / 4, width / 4)."""
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the channels by an inverted bottleneck.

    Args:
        dim: Input channels.
        ratio: Expansion, relative to the output channels.
    """

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        hidden = 2 * dim * ratio
        self.conv = nn.Sequential(
            ConvLayer(dim, hidden, 1, norm=False),
            ConvLayer(hidden, hidden, 3, stride=2, groups=hidden, norm=False),
            ConvLayer(hidden, 2 * dim, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width) -> (batch, 2 dim, height / 2, width / 2)."""
        return self.conv(x)  # type: ignore[no-any-return]


class RotaryPosition(nn.Module):
    """Two-dimensional rotary positions over all channels, as real rotations.

    Half of the channel pairs turn with the row, half with the column.

    Args:
        resolution: Height and width of the feature map.
        dim: Channels, a multiple of 4.
        base: Base of the geometric series of frequencies.
    """

    rotations: Tensor

    def __init__(self, resolution: tuple[int, int], dim: int, base: float = 10000.0) -> None:
        super().__init__()
        pairs = dim // 4
        frequencies = base ** -(torch.arange(pairs) / pairs)
        rows, columns = torch.meshgrid(*(torch.arange(size) for size in resolution), indexing="ij")
        angles = torch.cat([t.unsqueeze(-1) * frequencies for t in (rows, columns)], dim=-1)
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channel pairs of `x`, (batch, height, width, dim)."""
        even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = self.rotations.to(x.dtype).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RotaryLinearAttention(nn.Module):
    """Linear attention with rotary positions and a local positional convolution (LePE).

    Args:
        dim: Channels.
        resolution: Height and width of the feature map.
        heads: Attention heads.
    """

    def __init__(self, dim: int, resolution: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.rope = RotaryPosition(resolution, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> the same shape."""
        q, k = (F.elu(self.qk(x)) + 1).chunk(2, dim=-1)
        if torch.is_autocast_enabled(x.device.type):
            # As in care.model: this form overflows in half precision.
            with torch.autocast(x.device.type, enabled=False):
                attended = self._attend(q.float(), k.float(), x.float()).to(x.dtype)
        else:
            attended = self._attend(q, k, x)
        return attended + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with rotated queries and keys under the normalizer of the unrotated ones."""
        heads_q, heads_k = self._heads(q), self._heads(k)
        normalizer = 1 / (
            heads_k.mean(-1, keepdim=True).transpose(-2, -1) @ heads_q + ATTENTION_EPS
        )
        rotated_q, rotated_k = self._heads(self.rope(q)), self._heads(self.rope(k))
        kv = self._heads(v) @ rotated_k.transpose(-2, -1) / heads_q.shape[-1]
        return ((kv @ rotated_q) * normalizer).flatten(1, 2).transpose(1, 2).reshape(v.shape)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> (batch, heads, dim / heads, tokens)."""
        batch, height, width, dim = x.shape
        tokens = x.reshape(batch, height * width, self.heads, dim // self.heads)
        return tokens.permute(0, 2, 3, 1)


class ScaleFreeRotaryAttention(RotaryLinearAttention):
    """The same attention for inference, in the range of float16.

    As in `care.fuse.scale_free_attention`, queries are divided by their sum over a head's channels
    and keys by their mean over channels and tokens; both cancel between product and normalizer. A
    rotation is linear and turns pairs of channels of one head, so that the divisors hold for the
    rotated ones too. The lower bounds take the place of the published 1e-6.

    Args:
        trained: The attention whose layers are used.
    """

    def __init__(self, trained: RotaryLinearAttention) -> None:
        nn.Module.__init__(self)
        self.heads, self.qk, self.lepe = trained.heads, trained.qk, trained.lepe
        self.rope = trained.rope

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with rotated queries and keys under the normalizer of the unrotated ones."""
        heads_q, heads_k = self._heads(q), self._heads(k)
        # An overflow of the sum becomes the upper bound, which is as good a divisor.
        scale_q = heads_q.sum(-2, keepdim=True).clamp(SMALLEST_NORMAL_HALF, LARGEST_HALF)
        scale_k = heads_k.mean(-1, keepdim=True).mean(-2, keepdim=True)
        scale_k = scale_k.clamp(min=SMALLEST_NORMAL_HALF)
        share = 1 / heads_k.shape[-1]
        rotated_q = self._heads(self.rope(q)) / scale_q
        rotated_k = self._heads(self.rope(k)) / scale_k * share
        attended = (self._heads(v) @ rotated_k.transpose(-2, -1)) @ rotated_q
        keys = (heads_k / scale_k * share).sum(-1, keepdim=True)
        normalizer = (keys.transpose(-2, -1) @ (heads_q / scale_q)).clamp(min=SMALLEST_NORMAL_HALF)
        return (attended / normalizer).flatten(1, 2).transpose(1, 2).reshape(v.shape)


def inference_form(model: Mlla) -> Mlla:
    """A copy in evaluation mode of which the attention stays in the range of float16.

    Args:
        model: The network; it is not changed.
    """
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if isinstance(module, MllaBlock):
            module.attn = ScaleFreeRotaryAttention(module.attn)
    return copied


class MllaBlock(nn.Module):
    """Gated linear attention and an MLP, each after a positional depthwise convolution.

    Args:
        dim: Channels.
        resolution: Height and width of the feature map.
        heads: Attention heads.
        mlp_ratio: Expansion of the MLP.
        drop_path: Probability of dropping a branch in training.
    """

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        heads: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attn = RotaryLinearAttention(dim, resolution, heads)
        self.out_proj = nn.Linear(dim, dim)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width) -> the same shape."""
        x = (x + self.cpe1(x)).permute(0, 2, 3, 1)
        normed = self.norm1(x)
        gate = F.silu(self.act_proj(normed))
        inner = self.in_proj(normed).permute(0, 3, 1, 2)
        inner = F.silu(self.dwc(inner)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.out_proj(self.attn(inner) * gate))
        x = x.permute(0, 3, 1, 2)
        x = (x + self.cpe2(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class MllaStage(nn.Module):
    """Blocks at one resolution and the step down to the next.

    Args:
        blocks: The stage's blocks.
        downsample: Step to the next resolution; None in the last stage.
    """

    def __init__(self, blocks: list[MllaBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width) -> (batch, dim', height', width')."""
        return self.downsample(self.blocks(x))  # type: ignore[no-any-return]


class Mlla(nn.Module):
    """The MLLA network. Its rotary positions fix the image size.

    Args:
        embed_dim: Channels of the first stage; they double from stage to stage.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        mlp_ratio: Expansion of the MLPs.
        img_size: Height and width of the images, multiples of 32.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Image channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        mlp_ratio: float = 4.0,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        check_image_size(torch.empty(1, in_chans, height, width, device="meta"))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.patch_embed = Stem(in_chans, embed_dim)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        self.layers = nn.ModuleList()
        for i, (depth, head_count) in enumerate(zip(depths, heads, strict=True)):
            dim, reduction = embed_dim * 2**i, 4 * 2**i
            resolution = (height // reduction, width // reduction)
            blocks = [
                MllaBlock(dim, resolution, head_count, mlp_ratio, drop_paths.pop(0))
                for _ in range(depth)
            ]
            self.layers.append(
                MllaStage(blocks, PatchMerging(dim) if i < len(depths) - 1 else None)
            )
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before pooling, normalized.

        Args:
            x: Images, (batch, in_chans, height, width) as in `img_size`.

        Returns:
            (batch, num_features, height / 32, width / 32).

        Raises:
            ModelError: The images are of another size.
        """
        if tuple(x.shape[-2:]) != self.img_size:
            raise ModelError(
                f"image size {x.shape[-2]}x{x.shape[-1]} does not fit: this MLLA was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; create it with img_size=…"
            )
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify a feature map: (batch, num_features, height, width) -> (batch, num_classes)."""
        pooled: Tensor = self.head_drop(x.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits; see `forward_features` and `forward_head`."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a fresh one; `global_pool` can only be "avg"."""
        if global_pool not in (None, "avg"):
            raise ModelError(f"global_pool {global_pool!r} is not available: MLLA pools by 'avg'")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        _init_weights(self.head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for timm's layer decay."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)]}
        # A step down counts as what comes after its stage's last block.
        downsample = (r"^layers\.(\d+)\.downsample", (9999,))
        blocks = (r"^layers\.(\d+)\.blocks\.(\d+)", None)
        return {"stem": r"^patch_embed", "blocks": [blocks, downsample, (r"^norm", (99999,))]}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        "mlla_t": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.conv1.conv",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def mlla_t(pretrained: bool = False, **kwargs: Any) -> Mlla:
    """MLLA-T: 25.0 M parameters, 4.2 GMACs at 224, 83.5 % published ImageNet top-1."""
    if pretrained:
        raise ModelError(
            "mlla_t has no weights to download: create it without pretrained=True and read the "
            "published file with care.checkpoint.load"
        )
    structure = {"embed_dim": 64, "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16), **kwargs}
    builder: Callable[..., Mlla] = build_model_with_cfg
    return builder(Mlla, "mlla_t", False, **structure)
