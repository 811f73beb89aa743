"""The one door to the form of a network that is deployed.

Our networks have an exact form of their own. Many of timm's have one too: branches that are added
up in training become one convolution, and a BatchNorm becomes part of the layer before it. Such a
form is taken only where it computes the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from care.fuse import fuse, fused_weights
from care.mlla import Mlla
from care.mlla import inference_form as mlla_form
from care.model import Care
from pipeline.core.words import in_short

TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest, up to which two forms are the same: deep
networks that are reparameterized in float32 reach 1e-4."""


@dataclass(frozen=True)
class InferenceForm:
    """A network as it is deployed.

    Attributes:
        module: A fresh module in evaluation mode.
        how: What was done to the trained one, for people.
    """

    module: nn.Module
    how: str


def inference_form(module: nn.Module, input_shape: tuple[int, int, int]) -> InferenceForm:
    """The form of a trained network that is deployed; the network itself stays as it is.

    Args:
        module: A classifier in evaluation mode, on the CPU.
        input_shape: (channels, height, width) of an image that it takes.

    Raises:
        ModelError: A network of ours is in a state that cannot be rewritten, see `care.fuse`.
    """
    if isinstance(module, Care):
        return InferenceForm(fuse(module), "exact inference form")
    if isinstance(module, Mlla):
        return InferenceForm(mlla_form(module), "exact inference form")
    original = copy.deepcopy(module)
    rewritable = [part for part in module.modules() if _is_rewritable(part)]
    if not rewritable:
        return InferenceForm(original, "as trained")
    from timm.utils import reparameterize_model

    try:
        rewritten = reparameterize_model(module).eval()
        difference = _difference(rewritten, original, input_shape)
    except Exception as error:  # whatever a method of that name in somebody's network raises
        return InferenceForm(
            original, f"as trained: timm's reparameterized form fails: {in_short(error)}"
        )
    if not difference <= TOLERANCE:
        return InferenceForm(
            original, f"as trained: timm's reparameterized form differs by {difference:.1e}"
        )
    parts = "1 part" if len(rewritable) == 1 else f"{len(rewritable)} parts"
    return InferenceForm(rewritten, f"reparameterized by timm ({parts})")


def deployed_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of the form that is deployed, by their names there, with gradients.

    Args:
        module: A network of which `has_deployed_weights` is true.
    """
    if isinstance(module, Care):
        return fused_weights(module)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def has_deployed_weights(module: nn.Module) -> bool:
    """Whether `deployed_weights` can tell how a network's deployed weights follow from its own."""
    if isinstance(module, Care):
        return True
    return not isinstance(module, Mlla) and not any(map(_is_rewritable, module.modules()))


def _is_rewritable(part: nn.Module) -> bool:
    """Has one of the methods that `timm.utils.reparameterize_model` calls."""
    return any(hasattr(part, name) for name in ("fuse", "reparameterize", "switch_to_deploy"))


def _difference(module: nn.Module, original: nn.Module, shape: tuple[int, int, int]) -> float:
    """Largest difference of logits on seeded noise, relative to the largest of them."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, expected = module(images), original(images)
    largest = float(expected.abs().max())
    return float((logits - expected).abs().max()) / max(largest, 1e-30)
