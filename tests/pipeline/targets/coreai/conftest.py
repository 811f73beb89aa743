"""A network small enough to be converted in a second, and assets made of it by Apple's packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.network import Images, Network
from pipeline.core.preprocess import Pictures, Preprocess
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.coreai.options import CoreAIOptions
from pipeline.targets.coreai.target import CoreAITarget

LABELS = ("trouser", "coat", "bag", "boot", "größe")
Build = Callable[..., Artifact]

needs_coreai = pytest.mark.skipif(
    find_spec("coreai") is None, reason="needs Apple's packages: pip install 'care-deploy[coreai]'"
)


class Tiny(nn.Module):
    """Convolutions, a linear attention with a division, an elu, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.mixer = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, len(LABELS))
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.stem(x))
        x = x + self.mixer(x)
        q, v = self.wide(x).flatten(2).split(16, dim=1)
        q = nn.functional.elu(q) + 1
        q = q / q.mean(1, keepdim=True).clamp(min=2.0**-14)
        return self.head(self.norm((q * v).mean(2)))  # type: ignore[no-any-return]


def network(size: int = 16, **changes: Any) -> Network:
    preprocess = {
        "size": size,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "channels": "rgb",
    }
    values = {
        "name": "tiny",
        "labels": LABELS,
        "input_shape": (3, size, size),
        "preprocess": preprocess,
        "description": {"license": "MIT", "model": "tiny"},
        **changes,
    }
    return Network(**values)


def images(count: int = 6, size: int = 16) -> Images:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator).numpy()


def pictures(count: int = 6, size: int = 16) -> Pictures:
    rng = np.random.default_rng(1)
    half = Preprocess(size, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    return Pictures(rng.integers(0, 256, (count, size, size, 3), np.uint8), half)


def job(
    precision: str = "fp16",
    *,
    module: Callable[[], nn.Module] = Tiny,
    options: CoreAIOptions | None = None,
    of: Network | None = None,
) -> BuildJob:
    def calibration(count: int) -> Pictures:
        raise AssertionError("no precision asks for calibration images")

    return BuildJob(
        network=of or network(),
        precision=precision,
        options=options or CoreAIOptions(runtime_images=3, weight_threshold=64),
        graph=None,
        module=lambda: module().eval(),
        calibration=calibration,
        batch=None,
        log=lambda line: None,
    )


def made(folder: Path, wanted: BuildJob) -> Artifact:
    target = CoreAITarget()

    def build(place: Path) -> dict[str, Any]:
        facts = target.build(wanted, place)
        return {"target": "coreai", "precision": wanted.precision, **facts}

    return artifact.make(
        folder,
        kind="build",
        name=f"coreai/{wanted.precision}",
        key="0" * 64,
        made_from={},
        tools={},
        build=build,
    )


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds Tiny in a precision, once a session: nobody may change it."""
    kept: dict[str, Artifact] = {}

    def once(precision: str = "fp16") -> Artifact:
        if precision not in kept:
            place = tmp_path_factory.mktemp("coreai") / precision
            kept[precision] = made(place, job(precision))
        return kept[precision]

    return once
