"""Small networks into which one fault is put, and where it lies.

Five networks, each with four faults: what a runtime's conversion does to a network by mistake, and
what its precision does to one that is fine in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["overflow", "wrong scale", "swapped axis", "lost bias"]

KINDS: tuple[Kind, ...] = get_args(Kind)
NETWORKS = 5
SIDE = 16
"""Height and width of the images, and the channels inside of a block: axes of one length, so that a
wrong order of them fits."""


class Turn(nn.Module):
    """Lets rows and columns change places: an order of axes that a conversion may mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.order = (0, 1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.order)


class Block(nn.Module):
    """A convolution, an activation, rows and columns changed, and a convolution to shrink again."""

    def __init__(self, channels: int, groups: int, act: nn.Module) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, SIDE, 3, padding=1, groups=groups)
        self.act = act
        self.turn = Turn()
        self.shrink = nn.Conv2d(SIDE, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.shrink(self.turn(self.act(self.expand(x))))
        return result


class Small(nn.Module):
    """A stem, blocks and a head, as the seed says."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        channels, groups = (8, 16, 12, 24, 16)[seed], (1, 4, 2, 8, 16)[seed]
        act = (nn.ReLU, nn.GELU, nn.SiLU, nn.GELU, nn.ReLU)[seed]
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels, groups, act()) for _ in range(2 + seed % 2)))
        self.head = nn.Linear(channels, 5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.normal_(module.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Fault:
    """A network with a fault.

    Attributes:
        kind: What is wrong.
        network: Which of the networks.
        right: The network as it should be.
        wrong: The network as it was converted; the same as `right` for an overflow, which only a
            narrow type has.
        module: Name of the module at fault.
    """

    kind: Kind
    network: int
    right: nn.Module
    wrong: nn.Module
    module: str


def fault(kind: Kind, network: int) -> Fault:
    """One of the twenty."""
    right = Small(network).eval()
    block = f"blocks.{network % 2 if kind != 'swapped axis' else 1}"
    module = {"swapped axis": f"{block}.turn", "lost bias": f"{block}.shrink"}.get(
        kind, f"{block}.expand"
    )
    if kind == "overflow":
        _enlarge(right.get_submodule(block))
        return Fault(kind, network, right, right, module)
    wrong = copy.deepcopy(right)
    place = wrong.get_submodule(module)
    with torch.no_grad():
        if kind == "wrong scale":
            place.get_parameter("weight").mul_(1.5)
        elif kind == "lost bias":
            place.get_parameter("bias").zero_()
        else:
            assert isinstance(place, Turn)
            place.order = (0, 3, 2, 1)
    return Fault(kind, network, right, wrong, module)


def _enlarge(block: nn.Module) -> None:
    """Make a block's inner values too large for float16, and what comes out of it as before."""
    factor = 2.0**16
    expand, shrink = block.get_submodule("expand"), block.get_submodule("shrink")
    with torch.no_grad():
        expand.get_parameter("weight").mul_(factor)
        expand.get_parameter("bias").zero_()  # so large a one would be no float16 at all
        shrink.get_parameter("weight").div_(factor)
