"""What a network costs for one image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """What a network, or a part of it, costs for one image.

    Attributes:
        name: Of the network or the part.
        parameters: Number of trainable numbers.
        macs: Multiply-accumulates of convolutions and matrix products.
        activations: Elements that these operations write.
    """

    name: str
    parameters: int = 0
    macs: int = 0
    activations: int = 0
