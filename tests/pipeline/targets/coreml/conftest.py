"""A network small enough to be converted in a second, and packages made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.network import Network
from pipeline.core.preprocess import Pictures
from pipeline.steps import artifact
from pipeline.steps.artifact import Artifact
from pipeline.targets.base import BuildJob
from pipeline.targets.coreml.network import preprocess_of
from pipeline.targets.coreml.options import CoreMLOptions
from pipeline.targets.coreml.target import CoreMLTarget

LABELS = ("trouser", "coat", "bag", "boot", "größe")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tiny(nn.Module):
    """Convolutions, a linear attention with a division, pooling and a linear layer."""

    def __init__(self, channels: int = 3, *, stem: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = stem or nn.Conv2d(channels, 16, 3, 2, 1)
        self.mixer = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(16, len(LABELS))
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.stem(x))
        x = x + self.mixer(x)
        q, v = self.wide(x).flatten(2).split(16, dim=1)
        q = nn.functional.elu(q) + 1
        # Around 1e-3: where `inverse` with its default epsilon of 1e-4 would be far off.
        q = self.divide(q * 1e-3, (q.mean(1, keepdim=True) * 1e-3).clamp(min=2.0**-14))
        return self.head((q * v).mean(2))  # type: ignore[no-any-return]

    def divide(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a / b


def network(channels: int = 3, size: int = 16, **changes: Any) -> Network:
    preprocess = {
        "size": size,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": list(MEAN[:channels]),
        "std": list(STD[:channels]),
        "channels": "rgb" if channels == 3 else "gray",
    }
    return Network(
        name="tiny",
        labels=LABELS,
        input_shape=(channels, size, size),
        preprocess={**preprocess, **changes},
        description={"author": "Ada", "license": "MIT", "origin": "a test"},
    )


def photos(count: int, of: Network) -> Pictures:
    """Random pixels."""
    channels, height, width = of.input_shape
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return Pictures(pixels, preprocess_of(of))


Build = Callable[..., Artifact]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    def make(*arguments: Any, **keywords: Any) -> nn.Module:
        return Tiny(*arguments, **keywords).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def tiny_class() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Network]:
    return network


@pytest.fixture(scope="session")
def make_photos() -> Callable[[int, Network], Pictures]:
    return photos


@pytest.fixture(scope="session")
def make_job(tiny: Callable[..., nn.Module]) -> Callable[..., BuildJob]:
    def job(
        precision: str = "fp16",
        module: Callable[[], nn.Module] = tiny,
        of: Network | None = None,
        log: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> BuildJob:
        of = of or network()
        options = {"weight_threshold": 32, "calibration_images": 16, **options}
        return BuildJob(
            network=of,
            precision=precision,
            options=CoreMLOptions(**options),
            graph=None,
            module=module,
            calibration=lambda count: photos(count, of),
            batch=None,
            log=log,
        )

    return job


@pytest.fixture(scope="session")
def build(make_job: Callable[..., BuildJob], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds an artifact of the tiny network, once for each precision and options."""
    built: dict[str, Artifact] = {}

    def make(precision: str = "fp16", *, fresh: bool = False, **keywords: Any) -> Artifact:
        key = repr((precision, sorted(keywords.items())))
        if key not in built or fresh:
            job = make_job(precision, **keywords)
            built_now = artifact.make(
                tmp_path_factory.mktemp("artifact") / precision,
                kind="build",
                name=f"coreml/{precision}",
                key="",
                made_from={},
                tools={},
                build=lambda folder: CoreMLTarget().build(job, folder),
            )
            if fresh:
                return built_now
            built[key] = built_now
        return built[key]

    return make


@pytest.fixture
def package(build: Build, tmp_path: Path) -> Path:
    """A copy of the float16 package, to be damaged."""
    import shutil

    return Path(shutil.copytree(build().folder / "model.mlpackage", tmp_path / "model.mlpackage"))
