"""What does coremltools itself not convert? A module of a few lines for each kind.

    python benchmarks/coremltools_refusals.py

Needs torch and coremltools alone, and nothing of this project: what is printed is coremltools' own
message. Of each kind the families of timm are named that have it. Where the pipeline knows an
equal form that is converted, they pass in docs/breadth.md all the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import coremltools as ct
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Refusal:
    """A kind of network that coremltools refuses.

    Attributes:
        kind: What it is, for people.
        families: Of timm, that have it.
        function: From images (1, 4, 8, 8) to anything.
        says: A part of coremltools' message.
    """

    kind: str
    families: str
    function: Callable[[Tensor], Tensor]
    says: str


class Recurrent(nn.Module):
    """A layer with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 4, batch_first=True).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """The memories over the rows of the first channel."""
        memories: Tensor = self.layer(images[:, 0])[0]
        return memories


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        """What the function makes of images."""
        return self.function(images)


REFUSALS = (
    Refusal(
        "blocks of an image that overlap",
        "byoanet",
        lambda x: x.unfold(2, 4, 2).unfold(3, 4, 2).sum((4, 5)),
        "Unsupported fx node unfold",
    ),
    Refusal(
        "bicubic interpolation",
        "crossvit",
        lambda x: F.interpolate(x, size=(12, 12), mode="bicubic"),
        "Unsupported fx node upsample_bicubic2d",
    ),
    Refusal(
        "a padding of less than nothing",
        "nasnet, pnasnet",
        lambda x: F.pad(x, (-1, 1, -1, 1)),
        "pad must be non-negative",
    ),
    Refusal(
        "sums over values of six axes",
        "csatv2, mvitv2",
        lambda x: x.view(1, 4, 4, 2, 4, 2) + x.view(1, 4, 4, 2, 4, 2)[..., :1],
        "rank <= 5",
    ),
    Refusal(
        "patches that overlap, added up",
        "volo",
        lambda x: F.fold(x.reshape(1, 64, 4)[:, :36], (4, 4), 3, padding=1, stride=2),
        "stride >= kernel_size",
    ),
    Refusal("a recurrent layer", "sequencer", Recurrent(), "Unsupported fx node lstm"),
)


def message(function: Callable[[Tensor], Tensor]) -> str:
    """What coremltools says to a function of images; "" where it converts it."""
    module = function if isinstance(function, nn.Module) else Function(function)
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (torch.zeros(1, 4, 8, 8),))
        program = program.run_decompositions({})
        try:
            ct.convert(program, convert_to="mlprogram", skip_model_load=True)
        except Exception as error:  # whatever its passes raise
            return " ".join(str(error).split())
    return ""


def main() -> None:
    """Print each kind and what coremltools says."""
    print(f"coremltools {ct.__version__}, torch {torch.__version__}")
    for refusal in REFUSALS:
        print(f"{refusal.kind} ({refusal.families}): {message(refusal.function) or 'converted'}")


if __name__ == "__main__":
    main()
