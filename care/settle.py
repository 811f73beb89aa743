"""Random weights whose activations are those of a network: BatchNorm statistics of noise.

A fresh BatchNorm takes for granted that what it gets has mean 0 and variance 1. In a deep network
with random weights it does not, and activations grow from layer to layer, beyond 1e14 in some: no
precision can be tried with such a network.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGES = 8
"""Images of noise: enough for statistics over positions, and few enough for seconds."""


def settle(module: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> int:
    """Set the statistics of all BatchNorms to those over seeded noise.

    Every BatchNorm normalizes by the batch meanwhile, so that one pass settles all of them.

    Args:
        module: A network in evaluation mode, on the CPU; changed in place.
        shape: (channels, height, width) of an image.
        seed: Of the noise.

    Returns:
        How many BatchNorms there are.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(seed))
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches, of which there is one
            norm.train()
        with torch.no_grad():
            module(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)
